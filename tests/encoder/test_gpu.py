"""Packed micro-batches give what padded ones give, on the processor: FlashAttention is replaced by its definition."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    BertConfig,
    BertModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

from codiemb.encoder import gpu
from codiemb.encoder.engine import embed
from codiemb.encoder.tokens import Text, tokenize

TEXTS = [Text("ab " * count + letter, "", 40) for count in (1, 3, 9, 17, 2) for letter in "xyz"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
MODELS = {
    "bert": (BertModel, BertConfig, {}),
    "roberta, positions from 1": (RobertaModel, RobertaConfig, {"pad_token_id": 0}),
    "modernbert, windows of 4": (
        ModernBertModel,
        ModernBertConfig,
        {"local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "qwen3, causal, grouped queries": (Qwen3Model, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral, causal windows of 5": (MistralModel, MistralConfig, {"num_key_value_heads": 4, "sliding_window": 5}),
}


def by_definition(
    query, key, value, first, first_key, longest, longest_key, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What `varlen_attn` documents: [token, head, dim], each token with those of its text within the window."""
    place = torch.arange(len(query))
    text = torch.bucketize(place, first[1:].long(), right=True)
    behind = place[:, None] - place
    seen = text[:, None] == text
    for distance, side in zip((behind, -behind), window_size, strict=True):
        seen &= (distance <= side) | (side < 0)
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, seen, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)


@pytest.fixture(params=MODELS)
def encoder(request, tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "varlen_attn", by_definition)
    monkeypatch.setattr(gpu, "_DTYPE", torch.float32)
    model, config, settings = MODELS[request.param]
    torch.manual_seed(0)
    tiny_encoder.tokenizer.save_pretrained(tmp_path)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    model(config(**{"vocab_size": len(tiny_encoder.tokenizer), **SIZES, **special, **settings})).save_pretrained(
        tmp_path
    )
    encoder = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32, "mean")], device="cpu").eval()
    encoder[0].unpad_inputs = False
    return encoder


def embeddings_and_gradients(encoder, packed, middle):
    tokens = tokenize(encoder, TEXTS, 96, packed)
    final, hidden = embed(encoder, tokens.micro_batches, tokens.place, middle)
    encoder.zero_grad()
    (final.pow(3).sum() + (hidden.pow(3).sum() if middle else 0)).backward()
    return tokens, final.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("middle", [False, True])
def test_packed_texts_have_the_embeddings_and_gradients_of_padded_ones(encoder, middle):
    padded, expected, expected_gradients = embeddings_and_gradients(encoder, False, middle)
    gpu.use(encoder[0])
    packed, found, gradients = embeddings_and_gradients(encoder, True, middle)
    assert packed.padded == packed.real == padded.real < padded.padded
    assert max(len(features["cu_seq_lens_q"]) for features in packed.micro_batches) > 4, "texts must stand together"
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-4 * max(scale, 1), msg=name)


def test_the_same_model_takes_padded_texts_too(encoder):
    """Evaluation in float32 is padded."""
    _, expected, _ = embeddings_and_gradients(encoder, False, False)
    gpu.use(encoder[0])
    _, found, _ = embeddings_and_gradients(encoder, False, False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_can_be_packed(tiny_encoder):
    """bf16 without dropout in attention, on a model that was made ready for it."""
    assert not gpu.packs(tiny_encoder, bf16=True)
    gpu.speed_up(tiny_encoder[0])
    assert not gpu.packs(tiny_encoder, bf16=True), "a processor has no FlashAttention"
    gpu.use(tiny_encoder[0])
    assert gpu.packs(tiny_encoder, bf16=True)
    assert not gpu.packs(tiny_encoder, bf16=False)
    assert not gpu.packs(tiny_encoder, bf16=True, attention_dropout=0.1)
