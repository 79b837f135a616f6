"""On a GPU the encoder is the ordinary one, and gives what it gives on the processor."""

import pytest
import torch

from codiemb.encoder import cpu
from codiemb.encoder.engine import embed, encode
from codiemb.encoder.gpu import packs
from codiemb.encoder.model import open_model, save_encoder
from codiemb.encoder.tokens import Text, tokenize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_embeddings_are_those_of_the_processor(tiny_encoder, tmp_path):
    """Attention and dropout made for processors must not run on a GPU; embeddings agree to 1e-3."""
    save_encoder(tiny_encoder, tmp_path / "model")
    texts = [Text("ab " * count, "", 12) for count in range(1, 9)]
    on_processor, on_gpu = (open_model(str(tmp_path / "model"), device=device) for device in ("cpu", "cuda"))
    assert on_gpu[0].config._attn_implementation != cpu.ATTENTION
    assert not [module for module in on_gpu.modules() if isinstance(module, cpu.Dropout)]
    found, expected = encode(on_gpu, texts).cpu(), encode(on_processor, texts)
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_packed_texts_have_the_gradients_of_padded_ones(tiny_encoder, tmp_path):
    """FlashAttention over texts one behind the other, in bf16, beside padded texts in float32."""
    save_encoder(tiny_encoder, tmp_path / "model")
    encoder = open_model(str(tmp_path / "model"), device="cuda").train()
    assert packs(encoder, bf16=True)
    texts = [Text("ab " * count, "", 40) for count in range(1, 9)]
    found = []
    for packed in (False, True):
        tokens = tokenize(encoder, texts, 64, packed)
        micro_batches = [
            {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in features.items()}
            for features in tokens.micro_batches
        ]
        encoder.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=packed):
            final = embed(encoder, micro_batches, tokens.place.cuda()).final
        final.square().sum().backward()
        found.append((final.detach(), encoder[0].model.encoder.layer[0].attention.self.query.weight.grad.clone()))
    for padded, packed in zip(*found, strict=True):
        assert torch.cosine_similarity(padded.flatten(), packed.flatten(), dim=0) > 0.999
