"""The mean of the weights over the steps, by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from codiemb.training.ema import Ema


def test_the_mean_worked_out_by_hand():
    """Decays 2/11 and 3/12 while they rise, then 0.3: with weights 1, 2, 3 after 0 the means are

    0 * 2/11 + 1 * 9/11 = 9/11;  9/11 * 1/4 + 2 * 3/4 = 75.75/44;  that * 0.3 + 3 * 0.7.
    """
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.zero_()
    ema = Ema(model, 0.3)
    assert list(ema.means) == ["weight"]
    means = []
    for step in (1, 2, 3):
        with torch.no_grad():
            model.weight.fill_(step)
        ema.on_step_end(None, SimpleNamespace(global_step=step), None)
        means.append(ema.means["weight"].item())
    second = 9 / 11 / 4 + 1.5
    assert means == pytest.approx([9 / 11, second, 0.3 * second + 2.1])
    other = nn.Linear(1, 1)
    ema.put_into(other)
    assert other.weight.item() == pytest.approx(means[-1])
    assert model.weight.item() == 3


def test_a_checkpoint_keeps_every_bit(tmp_path):
    model = nn.Linear(3, 2)
    ema, other = Ema(model, 0.9), Ema(nn.Linear(3, 2), 0.9)
    ema.save(tmp_path)
    other.load(tmp_path)
    for name, mean in ema.means.items():
        assert torch.equal(mean, other.means[name])
