"""The FLOPs a BERT needs, and those the machine gives."""

from __future__ import annotations

import time
from typing import Any

import torch


def forward_flops(config: Any, length: int) -> float:
    """Multiplications and additions of the matrix products of one text's forward pass; a step needs thrice that."""
    width, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    return 2.0 * weights * length + 4.0 * config.num_hidden_layers * width * length * length


def matmul_flops(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """The best FLOP/s of square matrix products of several sizes, `seconds` spent on each."""
    cuda = torch.cuda.is_available()
    best = 0.0
    for size in (1024, 2048, 4096, 8192) if cuda else (512, 1024, 2048):
        left = torch.randn(size, size, device="cuda" if cuda else "cpu").to(dtype)
        right = torch.randn_like(left)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            left @ right
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
