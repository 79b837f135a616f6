"""What a step keeps is known before it is made, and what does not fit is made again."""

import weakref

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dropout
from torch.autograd.graph import saved_tensors_hooks

from codiemb.encoder import memory, threads
from codiemb.encoder.activations import outputs_made_again
from codiemb.encoder.engine import embed
from codiemb.encoder.memory import Footprint, Memory, measure, plan_memory
from codiemb.encoder.model import open_model
from codiemb.encoder.threads import trained_embeddings
from codiemb.encoder.tokens import Text, tokenize
from codiemb.errors import ConfigError


def kept_bytes(encoder, run):
    """Bytes of what autograd saves while `run` goes on, parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("rows", "letters"), [(7, 6), (2, 30), (1, 62)])
def test_the_footprint_measured_on_short_texts_holds_for_other_shapes(tiny_encoder, attention, rows, letters):
    tiny_encoder[0].model.set_attn_implementation(attention)
    found = measure(tiny_encoder, 32, bf16=False)
    assert found.square > 20 if attention == "eager" else found.square < 0.1, "scores: 3 layers of 2 heads of 4 bytes"
    texts = [Text("abcdefghijklmnopqrstuvwxyz"[place:][:1] * letters, "", None) for place in range(rows)]
    tokens = tokenize(tiny_encoder, texts)
    (features,) = tokens.micro_batches
    expected = kept_bytes(tiny_encoder, lambda: tiny_encoder(dict(features))["sentence_embedding"])
    assert found.of(*features["attention_mask"].shape) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("foreign_dropout", [False, True])
def test_the_footprint_is_that_of_the_way_a_step_goes(tiny_model_folder, monkeypatch, foreign_dropout):
    """Side by side without outputs of activation functions; one after the other, as other dropout needs it, with."""
    encoder = open_model(str(tiny_model_folder), device="cpu").train()
    if foreign_dropout:
        encoder.append(Dropout(0.1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    storages, shown = {}, []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    monkeypatch.setattr(threads, "outputs_made_again", lambda: shown.append(1) or outputs_made_again(keep))
    tokens = tokenize(encoder, [Text(letter * 20, "", None) for letter in "abcdefgh"], 88)
    assert len(tokens.micro_batches) == 2
    with saved_tensors_hooks(lambda tensor: keep(tensor) or tensor.detach(), lambda tensor: tensor):
        output = embed(encoder, tokens.micro_batches, tokens.place).final
    assert output.requires_grad
    assert len(shown) == (0 if foreign_dropout else 2)
    kept = sum(storage.nbytes() for storage in storages.values())
    footprint = measure(encoder, 32, bf16=False)
    expected = sum(footprint.of(*features["attention_mask"].shape) for features in tokens.micro_batches)
    assert kept == pytest.approx(expected, rel=0.03)


def test_measuring_leaves_no_trace(tiny_encoder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for module in tiny_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    outputs = []
    tiny_encoder[0].register_forward_hook(
        lambda module, inputs, output: outputs.append(weakref.ref(output["token_embeddings"].untyped_storage()))
    )
    measure(tiny_encoder, 32, bf16=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not tiny_encoder.training
    assert len(outputs) == 3
    assert all(output() is None for output in outputs), "a graph that holds itself is never freed"
    assert all(parameter.grad is None for parameter in tiny_encoder.parameters())


def test_the_last_micro_batches_that_fit_keep_their_activations():
    """A byte a token: [4, 8] takes 32, [2, 8] takes 16. From the last: 16, 48, 80."""
    micro_batches = [{"attention_mask": torch.ones(rows, 8)} for rows in (4, 4, 2)]
    recomputed = {
        room: Memory(room, Footprint(1, 0), 32).recomputed(micro_batches) for room in (-1, 0, 16, 47, 48, 79, 80)
    }
    assert recomputed == {-1: 3, 0: 3, 16: 2, 47: 2, 48: 1, 79: 1, 80: 0}


def test_cached_micro_batches_hold_no_activations(tiny_encoder):
    """Counted as autograd saves them: all, some, none."""
    texts = [Text("ab" * n, "", None) for n in range(1, 20)]
    tokens = tokenize(tiny_encoder, texts, 64)
    count = len(tokens.micro_batches)

    def kept(recomputed):
        return kept_bytes(
            tiny_encoder, lambda: embed(tiny_encoder, tokens.micro_batches, tokens.place, recomputed=recomputed).final
        )

    everything, some, nothing = kept(0), kept(count // 2), kept(count)
    assert nothing < 0.02 * everything
    assert 0.3 * everything < some < 0.7 * everything


@pytest.mark.parametrize("only_embeddings", [False, True])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("room", "tokens"), [(64e6, 2048), (0.6e6, 128)])
def test_a_budget_is_what_the_process_may_hold(tiny_encoder, monkeypatch, room, tokens, at_once, only_embeddings):
    """Of a process that holds 1 GB, and beside it gradients, moments, and gradients before they are added (side by side
    not those of embeddings), what is left is for activations."""
    monkeypatch.setattr(memory, "memory_held", lambda device: 10**9)
    monkeypatch.setattr(memory, "at_once", lambda encoder: at_once)
    room *= at_once
    if only_embeddings:
        tiny_encoder.requires_grad_(False)
        tiny_encoder[0].model.embeddings.word_embeddings.requires_grad_(True)
    trained = [parameter.numel() * 4 for parameter in tiny_encoder.parameters() if parameter.requires_grad]
    looked_up = sum(module.weight.numel() * 4 for module in trained_embeddings(tiny_encoder))
    unadded = max(max(trained), at_once * (sum(trained) - looked_up) if at_once > 1 else 0)
    held = 1e9 + 3 * sum(trained) + unadded
    planned = plan_memory(tiny_encoder, (held + room) / 1e9, bf16=False)
    one = planned.footprint.of(tokens // 64, 64)
    assert planned.micro_batch_tokens == tokens
    assert 1.15 * planned.activations + at_once * 0.8 * one == pytest.approx(room, abs=10)


def test_a_budget_too_small_for_one_text_is_refused(tiny_encoder, monkeypatch):
    monkeypatch.setattr(memory, "memory_held", lambda device: 10**9)
    with pytest.raises(ConfigError, match=r"train.memory_budget: got 0.5 GB, expected at least 1 GB"):
        plan_memory(tiny_encoder, 0.5, bf16=False)


def test_what_measuring_leaves_behind_is_not_taken_for_held(tiny_encoder, monkeypatch):
    """malloc keeps what is freed, and the activations take it again."""

    def room(left_behind):
        measured = []
        monkeypatch.setattr(memory, "memory_held", lambda device: 10**9 + left_behind * len(measured))
        monkeypatch.setattr(memory, "measure", lambda *given, **named: measured.append(given) or Footprint(100, 0))
        return plan_memory(tiny_encoder, 2, bf16=False).activations

    assert room(10**8) == room(0)
