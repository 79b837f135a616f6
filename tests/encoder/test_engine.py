"""Many texts with little padding give what one text at a time gives: embeddings, gradients, prompts, lengths."""

import errno
import os

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from codiemb.encoder import engine
from codiemb.encoder.engine import embed, encode
from codiemb.encoder.model import max_length, open_model, prompt, save_encoder, set_lengths
from codiemb.encoder.tokens import Text, tokenize
from codiemb.errors import CheckpointError, EvaluationError

PROMPTS = {"query": "query: ", "document": "text. ", "similarity": ""}
LENGTHS = {"query": 12, "document": 24, "similarity": 9}
WORDS = ("ab", "codi", "emb", "a", "sentence of some length", "graded pairs", "q")


@pytest.fixture
def encoder(tiny_encoder):
    tiny_encoder.prompts = dict(PROMPTS)
    set_lengths(tiny_encoder, LENGTHS)
    return tiny_encoder


def texts_of_all_roles(encoder):
    """21 texts, lengths mixed, 3 of them repeated; some longer than their role keeps."""
    listed = [
        Text(f"{word} {role}", prompt(encoder, role), max_length(encoder, role)) for word in WORDS for role in PROMPTS
    ]
    return [*listed, listed[4], listed[0], listed[4]]


def one_at_a_time(encoder, texts):
    """Each text by sentence-transformers itself, cut to its length."""
    rows = []
    for text in texts:
        kept = {"text": {"max_length": text.max_length, "truncation": True}}
        before = text.prompt or None
        rows.append(encoder.encode(text.text, prompt=before, convert_to_tensor=True, processing_kwargs=kept))
    return torch.stack(rows)


def leave_out_prompts(encoder):
    encoder[1].include_prompt = False


@pytest.mark.parametrize("budget", [1, 40, 100, 100_000])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_embeddings_equal_those_of_one_text_at_a_time(encoder, budget, include_prompt):
    if not include_prompt:
        leave_out_prompts(encoder)
    texts = texts_of_all_roles(encoder)
    tokens = tokenize(encoder, texts, budget)
    with torch.no_grad():
        found = embed(encoder, tokens.micro_batches, tokens.place).final
    expected = one_at_a_time(encoder, texts)
    assert torch.pdist(expected.unique(dim=0)).min() > 1e-3, "the texts must differ for their order to be tested"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_leaving_the_prompt_out_of_the_pooling_changes_the_embedding(encoder):
    """Without this the parameter `include_prompt` above could be without effect."""
    text = [Text("codi", "query: ", None)]
    before = encode(encoder, text)
    leave_out_prompts(encoder)
    assert not torch.allclose(encode(encoder, text), before, atol=1e-2)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_padding_on_the_left(encoder, include_prompt):
    """Position embeddings are set to 0: BERT counts positions from the first column, padding or not."""
    if not include_prompt:
        leave_out_prompts(encoder)
    torch.nn.init.zeros_(encoder[0].model.embeddings.position_embeddings.weight)
    encoder.tokenizer.padding_side = "left"
    texts = texts_of_all_roles(encoder)
    tokens = tokenize(encoder, texts, 100)
    assert any(batch["attention_mask"][:, 0].min() == 0 for batch in tokens.micro_batches), "nothing padded on the left"
    with torch.no_grad():
        found = embed(encoder, tokens.micro_batches, tokens.place).final
    torch.testing.assert_close(found, one_at_a_time(encoder, texts), rtol=0, atol=1e-5)


def test_equal_texts_are_tokenised_once(encoder):
    """A text with another prompt or another length is another input."""
    ab = Text("ab", "", 9)
    texts = [ab, Text("cd", "", 9), ab, Text("ab", "query: ", 9), Text("ab", "", 3), ab]
    tokens = tokenize(encoder, texts)
    assert sum(len(batch["input_ids"]) for batch in tokens.micro_batches) == 4
    assert tokens.place[0] == tokens.place[2] == tokens.place[5]
    assert len(set(tokens.place.tolist())) == 4


@pytest.mark.parametrize("include_prompt", [True, False])
def test_texts_of_all_roles_share_micro_batches(encoder, include_prompt):
    """But where pooling leaves the prompt out: it knows one length of prompt for a micro-batch."""
    if not include_prompt:
        leave_out_prompts(encoder)
    texts = [Text("ab", prompt(encoder, role), max_length(encoder, role)) for role in PROMPTS]
    tokens = tokenize(encoder, [*texts, Text("ab cd", "query: ", 9)])
    assert len(tokens.micro_batches) == (1 if include_prompt else 3)


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_micro_batches_keep_to_the_budget_and_counts_are_exact(encoder, budget):
    """One token a letter, and [CLS] and [SEP]: "ab" has 4."""
    texts = [Text("ab" * n, "", None) for n in (1, 2, 9, 3, 1, 11, 2)]
    tokens = tokenize(encoder, texts, budget)
    sizes = [batch["input_ids"].numel() for batch in tokens.micro_batches]
    rows = [len(batch["input_ids"]) for batch in tokens.micro_batches]
    assert all(size <= budget or n == 1 for size, n in zip(sizes, rows, strict=True))
    assert tokens.padded == sum(sizes)
    assert tokens.real == sum(2 * n + 2 for n in (1, 2, 9, 3, 11))


@pytest.mark.parametrize("role", PROMPTS)
def test_each_role_keeps_its_own_number_of_tokens(encoder, role):
    texts = [Text("abcdefgh" * 6, prompt(encoder, role), max_length(encoder, role))]
    assert tokenize(encoder, texts).real == LENGTHS[role]


def test_middle_layer_is_pooled_like_the_last(encoder):
    """hidden_states[len // 2] of 4 states (embeddings and 3 layers) is the third; the prompt is left out by hand."""
    leave_out_prompts(encoder)
    texts = texts_of_all_roles(encoder)
    tokens = tokenize(encoder, texts, 60)
    with torch.no_grad():
        found = embed(encoder, tokens.micro_batches, tokens.place, middle=True)
        expected = []
        for text in texts:
            inputs = encoder.tokenizer(
                text.prompt + text.text, return_tensors="pt", truncation=True, max_length=text.max_length
            )
            states = encoder[0].model(**inputs, output_hidden_states=True).hidden_states
            assert len(states) == 4
            skipped = len(encoder.tokenizer(text.prompt)["input_ids"]) - 1 if text.prompt else 0  # its [SEP] aside
            expected.append(states[2][0, skipped:].mean(dim=0))
    torch.testing.assert_close(found.middle, torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.final, one_at_a_time(encoder, texts), rtol=0, atol=1e-5)
    assert not encoder[0].config.output_hidden_states, "the model is left as it was"


def test_gradients_equal_those_of_one_plain_batch(encoder):
    """A weighted sum of embeddings, repeated texts included, by both ways: every parameter's gradient agrees."""
    texts = [Text(f"{word} x", "query: ", 24) for word in WORDS] + [Text(f"{WORDS[1]} x", "query: ", 24)]
    weights = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(0))

    tokens = tokenize(encoder, texts, 40)
    assert len(tokens.micro_batches) > 2
    (embed(encoder, tokens.micro_batches, tokens.place).final * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in encoder.named_parameters()}

    encoder.zero_grad(set_to_none=True)
    features = encoder.preprocess([text.text for text in texts], prompt="query: ", max_length=24)
    (encoder(features)["sentence_embedding"] * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in encoder.named_parameters()}

    assert {name for name, gradient in expected.items() if gradient is None} == {
        name for name, gradient in found.items() if gradient is None
    }
    compared = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert sum(gradient.abs().max() > 1e-3 for gradient in compared.values()) > 30
    for name, gradient in compared.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("piece", [2048, 4])
def test_encode_equals_sentence_transformers_normalised(encoder, piece, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", piece)  # with 4 the texts go through in several pieces
    texts = texts_of_all_roles(encoder)
    expected = torch.nn.functional.normalize(one_at_a_time(encoder, texts), dim=1)
    torch.testing.assert_close(encode(encoder, texts), expected, rtol=0, atol=1e-5)


def test_embeddings_too_large_for_memory_are_in_a_file(encoder, monkeypatch):
    """The same numbers, repeated texts included; and no file is left that has a name."""
    texts = texts_of_all_roles(encoder)
    expected = encode(encoder, texts)
    monkeypatch.setattr(engine, "_LARGEST_IN_MEMORY", 8)
    monkeypatch.setattr(engine, "PIECE", 4)
    mapped = []
    original = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **kwargs: mapped.append(original(*args, **kwargs)) or mapped[-1])
    found = encode(encoder, texts)
    assert mapped[0].shape == tuple(found.shape)
    assert found.data_ptr() == mapped[0].ctypes.data
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_room_for_embeddings_is_one_line(encoder, monkeypatch):
    """Without it the process would be killed at the first page that finds no room."""
    texts = texts_of_all_roles(encoder)

    def full(file, start, size):
        assert (start, size) == (0, 4 * len(texts) * encoder.get_embedding_dimension())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine, "_LARGEST_IN_MEMORY", 8)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*set TMPDIR"):
        encode(encoder, texts)


def test_encode_uses_no_dropout_and_leaves_the_mode_as_it_was(encoder):
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    texts = texts_of_all_roles(encoder)
    expected = encode(encoder, texts)
    assert not encoder.training
    encoder.train()
    assert torch.equal(encode(encoder, texts), expected)
    assert encoder.training
    tokens = tokenize(encoder, texts)
    trained = torch.nn.functional.normalize(embed(encoder, tokens.micro_batches, tokens.place).final, dim=1)
    assert not torch.allclose(trained, expected, atol=1e-2), "there is dropout to leave out"


def test_a_saved_encoder_opens_with_its_prompts_and_lengths(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "saved")
    opened = open_model(str(tmp_path / "saved")).to("cpu")
    assert {role: prompt(opened, role) for role in PROMPTS} == PROMPTS
    assert {role: max_length(opened, role) for role in PROMPTS} == LENGTHS
    texts = texts_of_all_roles(encoder)
    torch.testing.assert_close(encode(opened, texts), encode(encoder, texts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("role", ["query", "document"])
def test_sentence_transformers_encodes_a_role_as_training_sees_it(encoder, role, include_prompt, tmp_path):
    """The texts are longer than the role keeps, so prompt and length both matter."""
    if not include_prompt:
        leave_out_prompts(encoder)
    words = ["codi", "a text of many letters that is cut"]
    tokens = tokenize(encoder, [Text(word, prompt(encoder, role), max_length(encoder, role)) for word in words])
    with torch.no_grad():
        trained = embed(encoder, tokens.micro_batches, tokens.place).final
    save_encoder(encoder, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    encode_role = plain.encode_query if role == "query" else plain.encode_document
    torch.testing.assert_close(encode_role(words, convert_to_tensor=True), trained, rtol=0, atol=1e-5)
    assert not torch.allclose(plain.encode(words, convert_to_tensor=True, prompt_name=None), trained, atol=1e-2)


def test_a_model_of_two_ways_is_refused(tiny_encoder):
    """Its queries would be taken through the modules of its documents."""
    router = Router.for_query_document([tiny_encoder[0]], [tiny_encoder[0]])
    encoder = SentenceTransformer(modules=[router, *list(tiny_encoder)[1:]], device="cpu")
    with pytest.raises(EvaluationError, match="a Router with ways for query, document"):
        encode(encoder, [Text("a", "", None)])
