"""The only place that talks to torch.distributed.

Each rank encodes its rows, receives the embeddings of the others without gradient, and computes the loss of the whole
global batch. The gradient that reaches its own rows is then exactly its share of the joined batch's gradient; the
shares are added by DDP, whose mean is undone by `scale_gradient`. No gradient travels through a collective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def finish() -> None:
    """Leaves the process group together, so that no rank sees another one vanish."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def joined(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks in order of rank, and the place of this rank's first row; only its own carry gradient."""
    if world_size() == 1:
        return tensor, 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    sizes = [int(length) for length in lengths]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    sent = padded.to(torch.uint8) if tensor.dtype == torch.bool else padded.contiguous()
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent)
    rows = [part[:size].to(tensor.dtype) for part, size in zip(parts, sizes, strict=True)]
    rows[rank()] = tensor
    return torch.cat(rows), sum(sizes[: rank()])


def total(counts: list[int], device: torch.device) -> Tensor:
    """The counts of all ranks, added; int64 [count]."""
    tensor = torch.tensor(counts, dtype=torch.int64, device=device)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def scale_gradient(loss: Tensor, factor: int) -> Tensor:
    """The same value with its gradient multiplied."""
    return loss if factor == 1 else loss.detach() + factor * (loss - loss.detach())
