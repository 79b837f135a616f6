"""Micro-batches side by side give what they give one after the other: outputs and every gradient, kept or not."""

import pytest
import torch
from torch import nn

from codiemb.encoder import engine, threads
from codiemb.encoder.engine import embed
from codiemb.encoder.model import open_model
from codiemb.encoder.tokens import Text, tokenize

TEXTS = [Text("ab " * count + letter, "", 40) for count in (1, 3, 9, 17) for letter in "xyz"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder(tiny_model_folder):
    encoder = open_model(str(tiny_model_folder), device="cpu").train()
    for parameter in encoder[0].model.pooler.parameters():
        parameter.requires_grad_(False)
    return encoder


def dropout(encoder, p):
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def outputs_and_gradients(encoder, middle=False, recomputed=0):
    """With `middle`: "too" for a loss on both outputs, "alone" for one on the middle layer."""
    tokens = tokenize(encoder, TEXTS, 64)
    assert len(tokens.micro_batches) > 3
    final, hidden = embed(encoder, tokens.micro_batches, tokens.place, bool(middle), recomputed)
    outputs = {False: [final], "too": [final, hidden], "alone": [hidden]}[middle]
    encoder.zero_grad()
    sum(output.pow(3).sum() for output in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return final.detach(), gradients


def one_after_the_other(encoder, monkeypatch, middle):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "pays", lambda *arguments: False)
        return outputs_and_gradients(encoder, middle)


@pytest.mark.parametrize("middle", [False, "too", "alone"])
def test_outputs_and_gradients_are_those_of_one_after_the_other(encoder, monkeypatch, middle):
    expected, expected_gradients = one_after_the_other(encoder, monkeypatch, middle)
    found, gradients = outputs_and_gradients(encoder, middle)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys(), "a weight with gradient 0 is decayed, one without is not"
    above_the_middle = sum("layer.1." in name or "layer.2." in name for name in gradients)
    assert above_the_middle == (16 if middle == "alone" else 32)
    assert sum(bool(gradient.abs().max() > 1e-3) for gradient in gradients.values()) > 15
    for name, gradient in gradients.items():
        assert not gradient.is_sparse
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not any(module.sparse for module in encoder.modules() if isinstance(module, nn.Embedding))


def test_bf16_reaches_every_thread_forward_and_backward(encoder, monkeypatch):
    """Autocast holds for the thread that asks only; results in float32 in the others would be far from these."""
    exact, exact_gradients = one_after_the_other(encoder, monkeypatch, False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = one_after_the_other(encoder, monkeypatch, False)
        for recomputed in (0, 2):
            found, gradients = outputs_and_gradients(encoder, recomputed=recomputed)
            assert (found - expected).abs().max() < 0.1 * (exact - expected).abs().max()
            for name, gradient in gradients.items():
                # No farther from float32 than one after the other, which adds micro-batches in bf16.
                exact_gradient = exact_gradients[name]
                error = (expected_gradients[name] - exact_gradient).norm()
                assert 0 < (gradient - exact_gradient).norm() <= 1.5 * error + 1e-3 * exact_gradient.norm(), name


@pytest.mark.parametrize("recomputed", [1, 2, 100])
@pytest.mark.parametrize("middle", [False, "too", "alone"])
def test_what_is_not_kept_gives_the_same_bits_with_dropout(encoder, middle, recomputed):
    """Whichever thread comes first; three times, since an order of threads may be lucky."""
    dropout(encoder, 0.3)
    torch.manual_seed(3)
    expected, expected_gradients = outputs_and_gradients(encoder, middle)
    for _ in range(3):
        torch.manual_seed(3)
        found, gradients = outputs_and_gradients(encoder, middle, recomputed)
        assert torch.equal(found, expected)
        assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())
    torch.manual_seed(4)
    assert not torch.equal(outputs_and_gradients(encoder, middle, recomputed)[0], expected)


def test_dropout_is_that_of_one_after_the_other(encoder, monkeypatch):
    """A run may go on with another number of threads."""
    dropout(encoder, 0.3)
    torch.manual_seed(3)
    expected, _ = one_after_the_other(encoder, monkeypatch, False)
    after = torch.rand(())
    torch.manual_seed(3)
    found, _ = outputs_and_gradients(encoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(torch.rand(()), after)


def test_without_gradient_nothing_is_kept(encoder):
    tokens = tokenize(encoder, TEXTS, 64)
    expected, _ = outputs_and_gradients(encoder)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = embed(encoder, tokens.micro_batches, tokens.place).final
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_error_in_a_thread_comes_out(encoder):
    tokens = tokenize(encoder, TEXTS, 64)
    tokens.micro_batches[1]["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError):
        embed(encoder, tokens.micro_batches, tokens.place)


def test_when_it_pays(encoder):
    """Never with random numbers that no seed of a micro-batch decides, nor with weights that ranks exchange."""
    many = [{}, {}]
    assert threads.pays(encoder, many)
    assert not threads.pays(encoder, many[:1])
    encoder.sharded = True
    assert not threads.pays(encoder, many)
    encoder.sharded = False
    encoder.gradient_checkpointing_enable()
    assert not threads.pays(encoder, many)
    encoder[0].model.gradient_checkpointing_disable()
    encoder[0].model.embeddings.dropout = nn.Dropout(0.1)
    assert not threads.pays(encoder, many)
    encoder[0].model.embeddings.dropout = nn.Dropout(0)
    torch.set_num_threads(1)
    assert not threads.pays(encoder, many)
