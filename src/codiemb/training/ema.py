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
        """From a checkpoint.

        Raises:
            ConfigError: it was written without a mean, or with one of another decay.
        """
        decay = None
        if (folder / FILE).exists():
            with safe_open(folder / FILE, framework="pt") as file:
                decay = file.metadata()["decay"]
                for name, mean in self.means.items():
                    mean.copy_(file.get_tensor(name))
        if decay != str(self.decay):
            raise ConfigError(
                f"--resume, fusion.ema_decay {self.decay}",
                got=f"a run that was started with {decay}" if decay else "a run that was started without ema",
                expected="one mean over all steps",
                fix="leave ema as it was, or start a new run",
            )

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Replaces the weights of `model`, a copy of the one that is trained, by their means."""
        parameters = dict(model.named_parameters())
        for name, mean in self.means.items():
            parameters[name].copy_(mean)
