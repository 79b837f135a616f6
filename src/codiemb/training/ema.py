"""An exponential moving average of the weights over the steps of a run: the cheapest merge, made while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from codiemb.errors import ConfigError

FILE = "ema.safetensors"


class Ema(TrainerCallback):
    """mean_t = d_t mean_(t-1) + (1 - d_t) theta_t with d_t = min(decay, (1 + t) / (10 + t)), t from 1.

    The decay rises to its value, as in TensorFlow's `ExponentialMovingAverage`, so that the weights of the beginning
    are forgotten in short runs too. On one rank; a part of its checkpoints.

    Args:
        model: what is trained; parameters that are not are left out.
        decay: of the mean, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().float().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().float() for p in self.weights.values()]
        torch._foreach_lerp_(list(self.means.values()), weights, 1 - decay)

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        save_file(self.means, folder / FILE, {"decay": str(self.decay)})

    def load(self, folder: Path) -> None:
        """From a checkpoint, of which `require_same_mean` was asked."""
        with safe_open(folder / FILE, framework="pt") as file:
            for name, mean in self.means.items():
                mean.copy_(file.get_tensor(name))

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Replaces the weights of `model`, a copy of the one that is trained, by their means."""
        parameters = dict(model.named_parameters())
        for name, mean in self.means.items():
            parameters[name].copy_(mean)


def require_same_mean(folder: Path, decay: float) -> None:
    """Refuses a checkpoint from which a mean with this decay cannot go on.

    Raises:
        ConfigError: it was written without a mean, or with one of another decay.
    """
    found = None
    if (folder / FILE).exists():
        with safe_open(folder / FILE, framework="pt") as file:
            found = file.metadata()["decay"]
    if found != str(decay):
        raise ConfigError(
            f"--resume, fusion.ema_decay {decay}",
            got=f"a run that was started with {found}" if found else "a run that was started without ema",
            expected="one mean over all steps",
            fix="leave ema as it was, or start a new run",
        )
