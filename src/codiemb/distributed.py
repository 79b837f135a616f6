"""The only place that talks to torch.distributed.

Each rank encodes its rows. Retrieval: it receives the documents of the others and computes the loss of its own queries;
what the queries of other ranks ask of its documents comes back through the gather (`gathered`). Graded pairs: it
receives the cosines of the others without gradient and computes the loss of the whole batch (`joined`), which asks of
its own cosines all there is to ask. Either way the gradient at its own rows is that of one process with the whole
batch; DDP takes the mean over ranks, which `scale_gradient` undoes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from codiemb.errors import CodiembError, ConfigError, DistributedError

Anything = TypeVar("Anything")
_TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # to each rank, by its launcher
_PLACE_IN_GLOO = re.compile(r"^\[\S*\] ")
_GLOO_SAYS = ("gloo/", "Application timeout caused pair closure")  # its errors are plain RuntimeErrors


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
        gc.collect()  # a DDP module that outlives its group may wait for it for ever
        dist.destroy_process_group()


_exchanging = 0.0


def exchange_seconds() -> float:
    """Seconds that this process has spent on exchanges that a step waits for; DDP's of gradients are not among them."""
    return _exchanging


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    global _exchanging
    start = time.perf_counter()
    try:
        yield
    finally:
        _exchanging += time.perf_counter() - start


def joined(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks in order of rank, and the place of this rank's first row; only its own carry gradient."""
    if world_size() == 1:
        return tensor, 0
    rows, sizes = _all_rows(tensor)
    first = sum(sizes[: rank()])
    return torch.cat([rows[:first], tensor, rows[first + len(tensor) :]]), first


def gathered(tensor: Tensor) -> Tensor:
    """The rows of all ranks in order of rank; the gradients that all ranks have for a row are added on its own."""
    return tensor if world_size() == 1 else _Gathered.apply(tensor)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        rows, sizes = _all_rows(tensor)
        ctx.first, ctx.size = sum(sizes[: rank()]), len(tensor)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        with _timed():
            dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.size]


@_timed()
def _all_rows(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The rows of all ranks, and how many each has; without gradient."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    sizes = [int(length) for length in lengths]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes


@_timed()
def summed(values: Tensor) -> Tensor:
    """The sum over ranks, with the gradient of this rank's own part."""
    if world_size() == 1:
        return values
    whole = values.detach().clone()
    dist.all_reduce(whole)
    return whole + (values - values.detach())


@_timed()
def agree(facts: dict[str, str | int], where: str) -> None:
    """Raises one error on every rank if the ranks do not hold the same facts.

    Raises:
        DistributedError: naming the first rank that differs from rank 0, the fact, and both values.
    """
    if world_size() == 1:
        return
    everywhere: list[dict[str, str | int]] = [{} for _ in range(world_size())]
    dist.all_gather_object(everywhere, facts)
    for other, theirs in enumerate(everywhere):
        for name in everywhere[0] | theirs:
            got, expected = theirs.get(name, "nothing"), everywhere[0].get(name, "nothing")
            if got != expected:
                raise DistributedError(
                    f"rank {other}, {where}, {name}",
                    got=got,
                    expected=f"{expected} as on rank 0",
                    fix="start all ranks with the same files, settings and versions",
                )


@_timed()
def total(counts: list[int]) -> Tensor:
    """The counts of all ranks, added; int64 [count]. Exchanged on processors, so that no rank waits for its GPU."""
    tensor = torch.tensor(counts, dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@_timed()
def most(count: int) -> int:
    """The largest of the counts of all ranks; exchanged on processors, no rank waits for its GPU."""
    if world_size() == 1:
        return count
    tensor = torch.tensor([count])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def scale_gradient(loss: Tensor, factor: int) -> Tensor:
    """The same value with its gradient multiplied."""
    return loss if factor == 1 else loss.detach() + factor * (loss - loss.detach())


def keep_losses_in_float32(plugin: Any) -> None:
    """Under FSDP2 and bf16: weights are used in bf16, but labels, losses and the sums of gradients stay in float32."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def from_first(value: Anything) -> Anything:
    """What the first rank holds, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(act: Callable[[], Anything]) -> Anything:
    """What `act` returns on the first rank, which alone runs it; a mistake it finds is raised on every rank."""
    value, mistake = None, None
    if rank() == 0:
        try:
            value = act()
        except CodiembError as error:
            mistake = error
    value, mistake = from_first((value, mistake))
    if mistake is not None:
        raise mistake
    return cast(Anything, value)


def untold() -> list[str]:
    """What a launcher tells each of its ranks and this process was not told."""
    return [name for name in _TOLD if name not in os.environ]


def start(timeout: int) -> None:
    """Joins the ranks that torchrun started, or a launcher that tells them the same; `timeout` seconds is the longest
    wait for another rank.

    The Trainer would join them itself, but on processors it forgets `ddp_timeout`. With GPUs, tensors on processors are
    exchanged by gloo.

    Raises:
        DistributedError: there are other ranks, and what they are found by is not told.
    """
    ranks, absent = os.environ.get("WORLD_SIZE", "1"), untold()
    if world_size() == 1 and ranks != "1" and absent:
        raise DistributedError(
            f"WORLD_SIZE={ranks}", got=f"no {absent[0]}", expected="all that torchrun sets", fix="start with torchrun"
        )
    if not absent and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


@contextlib.contextmanager
def told_of_lost_ranks(
    limit: str = "train.ddp_timeout",
    fix: str = "look for the first error on the other machines, then start all of them again with --resume",
) -> Iterator[None]:
    """Ends with one line when another rank has died, or is silent for longer than the time-out.

    NCCL has a thread of its own that ends the process instead; the torchrun of that machine then says so.

    Raises:
        DistributedError: instead of the exchange's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in _GLOO_SAYS):
            raise
        raise DistributedError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on {socket.gethostname()}",
            got=_PLACE_IN_GLOO.sub("", str(error).splitlines()[0]).split(". ")[0],
            expected=f"an answer of every rank in time ({limit})",
            fix=fix,
        ) from error


@contextlib.contextmanager
def told_of_full_gpu(fix: str) -> Iterator[None]:
    """Ends with one line when this rank's GPU has no memory left.

    Raises:
        ConfigError: instead of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:3])  # what was asked for and what there is; more follows
        raise ConfigError("memory of the GPU", got=said, expected="room for what is computed", fix=fix) from error
