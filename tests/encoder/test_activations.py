"""What is made again in the backward pass is what was not kept, to the last bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model
from transformers.activations import GELUActivation

from codiemb.encoder import activations, cpu
from codiemb.encoder.activations import outputs_made_again, watch

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


watched = torch.nn.Sequential(GELUActivation())
watch(watched)


def plain(kept):
    return saved_tensors_hooks(lambda tensor: kept(tensor) or tensor.detach(), lambda tensor: tensor)


def gradients(model, hooks, bf16):
    """Of all weights, and the bytes that autograd keeps inside `hooks`, each storage once."""
    storages = {}
    forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with (
        forward,
        hooks(lambda tensor: storages.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage()})),
    ):
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
    (expected, before), (found, after) = (gradients(model, hooks, bf16) for hooks in (plain, outputs_made_again))
    assert before - after == 2 * 40 * 48 * (2 if bf16 else 4)
    for gradient, of_plain in zip(found, expected, strict=True):
        assert (gradient is None) == (of_plain is None)
        assert gradient is None or torch.equal(gradient, of_plain)


def at_the_same_address(output):
    """Another tensor, where `output` was before it went."""
    other = torch.from_numpy(output.detach().numpy())
    del output
    return other.fill_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: watched(inputs).add_(1),
        lambda inputs: watched(inputs)[:3],
        lambda inputs: watched(inputs).t(),
        lambda inputs: watched(inputs.t()).t(),
        lambda inputs: watched(inputs).clone(),
        lambda inputs: at_the_same_address(watched(inputs)),
    ],
    ids=["written over", "a part", "transposed", "transposed before", "a copy", "another at its address"],
)
def test_what_is_not_the_output_is_kept(change):
    weight = torch.randn(5, 5, requires_grad=True)

    def gradient(hooks):
        torch.manual_seed(0)
        with hooks(lambda tensor: None):
            out = change(torch.randn(5, 5, requires_grad=True)) @ weight
        return torch.autograd.grad(out.pow(2).sum(), weight)[0]

    assert torch.equal(gradient(outputs_made_again), gradient(plain))


def test_an_input_without_gradient_is_not_held_in_place_of_the_output():
    """It may be written over afterwards."""
    inputs, weight, kept = torch.randn(5, 5), torch.randn(5, 5, requires_grad=True), []
    with outputs_made_again(kept.append):
        out = watched(inputs) @ weight
    expected = torch.nn.functional.gelu(inputs).t() @ torch.ones(5, 5)
    inputs.zero_()
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], expected)
    assert len(kept) == 1


@pytest.mark.parametrize("written_over", ["inputs", "weight", "states"])
def test_what_was_written_over_is_an_error_as_without_hooks(written_over):
    inputs, weight = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    with outputs_made_again():
        states = inputs * 1
        out = (watched(states) @ weight).exp()
    with torch.no_grad():
        {"inputs": states, "weight": weight, "states": out}[written_over].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), (inputs, weight))


def test_each_thread_makes_its_own_outputs_again():
    """Both inside, one after the other between the output and the layer that follows."""
    barrier = threading.Barrier(2, timeout=20)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        inputs, weight = (torch.randn(5, 5, generator=generator).requires_grad_() for _ in range(2))
        kept = []
        with outputs_made_again(lambda tensor: kept.append(tensor.data_ptr())):
            output = watched(inputs)
            barrier.wait()
            out = output @ weight
            barrier.wait()
        expected = output.detach().t() @ torch.ones(5, 5)
        return output.data_ptr() in kept, torch.equal(torch.autograd.grad(out.sum(), weight)[0], expected)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (1, 2))) == [(False, True)] * 2


def test_nothing_is_remembered_outside():
    with outputs_made_again():
        watched(torch.randn(5, 5, requires_grad=True))
        assert activations._of_thread.latest
    watched(torch.randn(5, 5, requires_grad=True))
    assert activations._of_thread.latest is None


def test_nothing_holds_the_graph():
    """A pass whose result is dropped frees all that it kept."""
    storages = []
    with outputs_made_again(
        lambda tensor: storages.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
    ):
        watched(torch.randn(5, 5, requires_grad=True) * 2).exp().sum()
    assert storages
    assert all(storage.expired() for storage in storages)
