"""Micro-batches side by side: on a processor a thread for each does more than all threads for one after the other.

Many operations of a micro-batch are too small for several threads, or run on one only. So each thread runs a
micro-batch of its own, forward and backward, and the gradients are added in the order of the micro-batches, which
makes a run repeatable to the last bit. Cached gradients (`codiemb.encoder.engine`) are the same here: a micro-batch
that was not kept runs again, with the same dropout, when its gradient has come.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from codiemb.encoder import cpu
from codiemb.encoder.activations import outputs_made_again

Outputs = tuple[Tensor, ...]
Run = Callable[[dict[str, Any]], Outputs]
Inside = Callable[[], AbstractContextManager[None]]


def side_by_side(
    encoder: SentenceTransformer,
    run: Run,
    micro_batches: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    recomputed: int,
    inside: Inside,
) -> Outputs:
    """The outputs of all micro-batches, each as one tensor; with gradient where it is enabled.

    Args:
        encoder: the model that is run.
        run: a micro-batch -> its outputs, [text, ...] each.
        micro_batches: at least one.
        seeds: of each micro-batch, what its dropout depends on.
        recomputed: so many, from the first, keep no activations.
        inside: a context of the whole process, in which they are made.
    """
    jobs = [_Job(run, features, seed) for features, seed in zip(micro_batches, seeds, strict=True)]
    weights = [weight for weight in encoder.parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and weights:
        return _SideBySide.apply(jobs, recomputed, partial(_inside, encoder, inside), *weights)
    inference = torch.is_inference_mode_enabled()
    with inside(), _workers(len(jobs)) as workers:
        outputs = list(workers.map(lambda job: job.forward(keep=False, inference=inference), jobs))
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))


def pays(encoder: SentenceTransformer, micro_batches: Sequence[Any]) -> bool:
    """Whether there is more than one micro-batch, and more than one may run at once."""
    return len(micro_batches) > 1 and at_once(encoder) > 1


def at_once(encoder: SentenceTransformer) -> int:
    """How many micro-batches of this encoder may run at once: on a processor as many as it has threads, with no random
    numbers but those that a job has a seed for, and no weights that ranks exchange in one order (`sharded`)."""
    config = getattr(encoder[0], "config", None)
    ours = encoder.device.type == "cpu" and getattr(config, "_attn_implementation", None) == cpu.ATTENTION
    alone = getattr(encoder, "sharded", False) or any(
        getattr(module, "gradient_checkpointing", False) or (type(module) is nn.Dropout and module.p)
        for module in encoder.modules()
    )
    return torch.get_num_threads() if ours and not alone else 1


@dataclass
class _Job:
    """One micro-batch, forward and backward, on whichever thread."""

    run: Run
    features: dict[str, Any]
    seed: int
    outputs: Outputs | None = None

    def __post_init__(self) -> None:
        self.bf16 = torch.is_autocast_enabled("cpu")  # for the thread that asks only, so it is carried over

    def forward(self, keep: bool, inference: bool = False) -> Outputs:
        with (
            cpu.drawn_from(self.seed),
            torch.inference_mode(inference),
            torch.set_grad_enabled(keep),
            # Its cache is one for all threads, and goes when any of them leaves.
            torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False),
            outputs_made_again() if keep else contextlib.nullcontext(),
        ):
            outputs = self.run(self.features)
        if keep:
            self.outputs = outputs
        return tuple(output.detach() for output in outputs)

    def backward(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the weights; what was kept for them is freed. None stands for an output without use."""
        if self.outputs is None:
            self.forward(keep=True)
        outputs, self.outputs = self.outputs, None
        assert outputs is not None
        used = [output for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        return torch.autograd.grad(used, weights, given, allow_unused=True)


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, jobs: list[_Job], recomputed: int, inside: Inside, *weights: Tensor) -> Outputs:
        with inside(), _workers(len(jobs)) as workers:
            keep = [number >= recomputed for number in range(len(jobs))]
            outputs = list(workers.map(_Job.forward, jobs, keep))
        ctx.set_materialize_grads(False)  # weights that only an output without use depends on have no gradient, not 0
        ctx.jobs, ctx.inside, ctx.weights = jobs, inside, weights
        ctx.rows = [len(of_job[0]) for of_job in outputs]
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = ([None] * len(ctx.jobs) if gradient is None else gradient.split(ctx.rows) for gradient in gradients)
        by_job = list(zip(*parts, strict=True))
        totals: list[Tensor | None] = [None] * len(ctx.weights)
        waiting: deque[Future[tuple[Tensor | None, ...]]] = deque()

        def take() -> None:
            for place, found in enumerate(waiting.popleft().result()):
                if found is None:
                    continue
                if (total := totals[place]) is None:
                    # A copy, because two weights may have been given one tensor.
                    totals[place] = found.to_dense() if found.is_sparse else found.clone()
                else:
                    total.add_(found)

        # From the last on: those that kept their activations come first and make room for the others.
        with ctx.inside(), _workers(len(ctx.jobs)) as workers:
            for job, of_job in zip(reversed(ctx.jobs), reversed(by_job), strict=True):
                waiting.append(workers.submit(job.backward, ctx.weights, of_job))
                if len(waiting) == torch.get_num_threads():
                    take()
            while waiting:
                take()
        return None, None, None, *totals


def trained_embeddings(encoder: SentenceTransformer) -> list[nn.Embedding]:
    """The embedding tables whose gradient is dense unless asked to be sparse."""
    return [
        module
        for module in encoder.modules()
        if isinstance(module, nn.Embedding) and not module.sparse and module.weight.requires_grad
    ]


@contextlib.contextmanager
def _inside(encoder: SentenceTransformer, inside: Inside) -> Iterator[None]:
    """Also, the gradient of an embedding holds the rows that were looked up, not the whole vocabulary each time."""
    embeddings = trained_embeddings(encoder)
    for module in embeddings:
        module.sparse = True
    try:
        with inside():
            yield
    finally:
        for module in embeddings:
            module.sparse = False


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, or as there are jobs; they share its threads."""
    workers = min(torch.get_num_threads(), jobs)
    share = torch.get_num_threads() // workers
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        yield pool
