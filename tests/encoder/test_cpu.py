"""The processor's own attention and dropout compute what the ordinary ones do, to the last gradient."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model

from codiemb.encoder import cpu
from codiemb.encoder.model import open_model, save_encoder

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()


def grouped_queries():
    torch.manual_seed(0)
    return Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=2)).train()


def states_and_gradients(model, padding):
    """Of two texts of 11 and 7 tokens, the padding on one side."""
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 50, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    mask[1, slice(7, None) if padding == "right" else slice(0, 4)] = 0
    states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[:, :, None]
    (states.pow(3).sum() / 1000).backward()
    return states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[cpu._LONG, 1], ids=["as short texts", "as long texts"])
def either_length(request, monkeypatch):
    monkeypatch.setattr(cpu, "_LONG", request.param)


@pytest.mark.usefixtures("either_length")
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("build", [bert, grouped_queries])
def test_attention_is_that_of_eager_with_every_gradient(build, padding):
    """Causal masks, padding on either side and grouped queries included."""
    eager, ours = build(), build()
    eager.set_attn_implementation("eager")
    cpu.speed_up(ours)
    assert ours.config._attn_implementation == cpu.ATTENTION
    (expected, expected_gradients), (found, gradients) = (
        states_and_gradients(model, padding) for model in (eager, ours)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert any("q_proj.weight" in name or "query.weight" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0 or "key.bias" in name or "k_proj.bias" in name


@pytest.mark.usefixtures("either_length")
def test_attention_drops_weights_as_the_formula_says():
    """dropout(softmax(q k^T / sqrt(dim))) v with the same mask, by autograd."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    query, key, value = parts
    module = nn.Module().train()
    torch.manual_seed(5)
    found, _ = cpu.attention(module, query, key, value, None, dropout=0.5)
    gradient = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, parts, gradient)
    torch.manual_seed(5)
    kept = cpu.keep_mask(torch.Size((6, 5, 5)), 0.5).view(2, 3, 5, 5)
    assert 0 < (kept == 0).float().mean() < 1, "some weights must be dropped for this to be tested"
    expected = ((torch.softmax(query @ key.transpose(2, 3) / 2, dim=-1) * kept) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradients, torch.autograd.grad(expected, parts, gradient))


@pytest.mark.usefixtures("either_length")
def test_attention_without_training_drops_nothing():
    parts = [torch.randn(1, 1, 3, 4) for _ in range(3)]
    first, second = (cpu.attention(nn.Module().eval(), *parts, None, dropout=0.5)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.usefixtures("either_length")
def test_a_text_of_padding_alone_gives_numbers_in_bf16():
    """float32's lowest number rounds to -inf in bf16, and a row of -inf would be NaN after the softmax."""
    parts = [torch.randn(1, 2, 3, 4, dtype=torch.bfloat16) for _ in range(3)]
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    assert torch.isfinite(cpu.attention(nn.Module(), *parts, mask)[0]).all()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_have_the_mean_of_dropout(p):
    """Of 100,001 elements: two values only, kept with probability 1 - p to five standard errors, with mean 1."""
    torch.manual_seed(0)
    mask = cpu.keep_mask(torch.Size((100_001,)), p)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    assert (mask > 0).float().mean() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 100_001) ** 0.5)
    assert torch.corrcoef(torch.stack([mask[:-1], mask[1:]]))[0, 1].abs() < 0.02


def test_masks_are_replayed_with_torchs_generator_and_differ_otherwise():
    """Cached gradients replay a forward pass by torch's state alone."""
    state = torch.get_rng_state()
    first, second = (cpu.keep_mask(torch.Size((7, 9)), 0.3) for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(cpu.keep_mask(torch.Size((7, 9)), 0.3), first)
    assert not torch.equal(first, second)


def test_dropout_is_torchs_but_for_the_numbers():
    """Same scale, gradient through the same mask, nothing while evaluating, and the ends p = 0 and p = 1."""
    ones = torch.ones(40, 50, requires_grad=True)
    dropped = cpu.Dropout(0.25)(ones)
    (gradient,) = torch.autograd.grad(dropped.sum(), ones)
    torch.testing.assert_close(gradient, dropped.detach())
    assert dropped.detach().max() == pytest.approx(4 / 3, rel=1e-4)
    assert 0 < (dropped == 0).float().mean() < 0.5
    assert torch.equal(cpu.Dropout(0.25).eval()(ones), ones)
    assert torch.equal(cpu.Dropout(0.0)(ones), ones)
    assert torch.equal(cpu.Dropout(1.0)(ones), torch.zeros(40, 50))


def test_a_model_on_the_processor_gets_both_and_is_saved_without_a_trace(tiny_encoder, tmp_path):
    """A folder that named our attention could not be opened without us."""
    save_encoder(tiny_encoder, tmp_path / "first")
    encoder = open_model(str(tmp_path / "first"), device="cpu")
    assert not [module for module in encoder.modules() if type(module) is nn.Dropout]
    assert [module for module in encoder.modules() if type(module) is cpu.Dropout]
    assert encoder[0].config._attn_implementation == cpu.ATTENTION
    save_encoder(encoder, tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert "codiemb_cpu" not in file.read_text(encoding="utf-8")
