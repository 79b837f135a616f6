"""What is made again in the backward pass is what was not kept, to the last bit."""

import threading

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model
from transformers.activations import GELUActivation

from codiemb.encoder import cpu
from codiemb.encoder.activations import outputs_made_again, watch

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def plain(kept):
    return saved_tensors_hooks(lambda tensor: kept(tensor) or tensor.detach(), lambda tensor: tensor)


def gradients(model, hooks):
    """Of all weights, and the bytes that autograd keeps inside `hooks`, each storage once."""
    storages = {}
    with hooks(lambda tensor: storages.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage()})):
        torch.manual_seed(3)
        states = model(torch.arange(1, 41).view(4, 10), use_cache=False).last_hidden_state
        size = sum(storage.nbytes() for storage in storages.values())
    return torch.autograd.grad(states.pow(3).sum(), list(model.parameters()), allow_unused=True), size


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda: BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.1)),
        lambda: Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=2)),
    ],
    ids=["gelu", "silu, gated"],
)
def test_gradients_are_the_same_and_the_outputs_are_not_kept(build, bf16):
    """Two layers, each with an output of 40 tokens of width 48, of 4 bytes or 2."""
    torch.manual_seed(0)
    model = build().train()
    cpu.speed_up(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        (expected, before), (found, after) = (gradients(model, hooks) for hooks in (plain, outputs_made_again))
    assert before - after == 2 * 40 * 48 * (2 if bf16 else 4)
    for gradient, of_plain in zip(found, expected, strict=True):
        assert (gradient is None) == (of_plain is None)
        assert gradient is None or torch.equal(gradient, of_plain)


@pytest.mark.parametrize(
    "change", [lambda output: output.add_(1), lambda output: output[:3], lambda output: output.t(), torch.clone]
)
def test_what_is_not_the_output_is_kept(change):
    """An output that was written over, a part of it, its transpose, and a copy after it has gone."""
    activation = torch.nn.Sequential(GELUActivation())
    watch(activation)
    weight = torch.randn(5, 5, requires_grad=True)

    def gradient(hooks):
        torch.manual_seed(0)
        with hooks(lambda tensor: None):
            out = change(activation(torch.randn(5, 5))) @ weight
        return torch.autograd.grad(out.pow(2).sum(), weight)[0]

    assert torch.equal(gradient(outputs_made_again), gradient(plain))


def test_another_thread_and_what_comes_after_keep_their_outputs():
    activation = torch.nn.Sequential(GELUActivation())
    watch(activation)
    inputs, weight = torch.randn(5, 5), torch.randn(5, 5, requires_grad=True)
    kept = []

    def run():
        output = activation(inputs)
        with plain(lambda tensor: kept.append(tensor.data_ptr() == output.data_ptr())):
            output @ weight

    with outputs_made_again():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert kept == [True, True]


def test_nothing_holds_the_graph():
    """A pass whose result is dropped frees all that it kept."""
    activation = torch.nn.Sequential(GELUActivation())
    watch(activation)
    storages = []
    with outputs_made_again(
        lambda tensor: storages.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
    ):
        activation(torch.randn(5, 5, requires_grad=True) * 2).exp().sum()
    assert storages
    assert all(storage.expired() for storage in storages)
