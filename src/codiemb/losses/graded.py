"""What the losses of graded pairs share: checks of their arguments, and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def checked(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.ndim != 1 or predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target: got shapes {tuple(predicted.shape)} and {tuple(target.shape)}, "
            "expected two vectors of one length"
        )
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    return predicted.to(dtype), target.to(dtype)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    if temperature <= 0:
        raise ValueError(f"{name}: got {temperature}, expected a number above 0")


def average_rank(target: Tensor) -> Tensor:
    """Rank of each label, 0 for the largest, ties averaged."""
    target = target.contiguous()  # searchsorted warns of any other
    ordered = target.sort().values
    up_to, below = (torch.searchsorted(ordered, target, right=equal) for equal in (True, False))
    return len(target) - (up_to + below + 1) / 2  # half way between n - up_to and n - below - 1
