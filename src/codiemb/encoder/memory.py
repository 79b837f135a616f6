"""How much memory the activations of a step take, and what of it fits.

What autograd keeps of a micro-batch is measured, not guessed: the encoder runs three small micro-batches in training
mode while every tensor saved for the backward pass is counted. Of [rows, length] that is, to good accuracy,

    bytes = fixed + rows * (linear * length + square * length^2)

with `square` above 0 where attention keeps its scores. `fixed` (weights cast to bf16) is kept once whatever the number
of micro-batches, and so left out; but side by side on a processor each micro-batch casts its own.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from codiemb.config import ROLES
from codiemb.distributed import most, world_size
from codiemb.encoder.activations import outputs_made_again
from codiemb.encoder.model import max_length
from codiemb.encoder.threads import at_once, trained_embeddings
from codiemb.encoder.tokens import micro_batch_tokens, shape
from codiemb.errors import ConfigError

GB = 1e9
_LONGEST_MEASURED = 512


@dataclass(frozen=True)
class Footprint:
    """Bytes that autograd keeps of a micro-batch."""

    linear: float
    square: float
    fixed: float = 0.0

    def of(self, rows: int, length: float) -> float:
        return self.fixed + rows * (self.linear * length + self.square * length**2)


@dataclass(frozen=True)
class Memory:
    """What the activations of a step may take.

    Attributes:
        activations: bytes.
        footprint: bytes of a micro-batch.
        micro_batch_tokens: tokens of a micro-batch, padding included; more than its default would not be faster.
    """

    activations: float
    footprint: Footprint
    micro_batch_tokens: int

    def recomputed(self, micro_batches: list[dict[str, Any]]) -> int:
        """How many micro-batches, from the first, must not keep their activations.

        The last ones keep theirs: the backward pass frees those before it runs the first of the others again.
        """
        kept = 0.0
        for place in range(len(micro_batches), 0, -1):
            kept += self.footprint.of(*shape(micro_batches[place - 1]))
            if kept > self.activations:
                return place
        return 0


def plan_memory(
    encoder: SentenceTransformer,
    budget: Literal["auto"] | float,
    bf16: bool,
    shards: int = 1,
    at_most: int | None = None,
) -> Memory:
    """What a budget leaves for activations; the size of micro-batches, on which roundings depend, is that of all ranks.

    Args:
        budget: GB for all that a process holds while it trains, or `auto`: a share of what is free.
        bf16: whether training computes in bf16.
        shards: over how many processes weights, gradients and moments are shared out.
        at_most: tokens of a micro-batch that a run which goes on had until now.

    Raises:
        ConfigError: not even one text fits.
    """
    tokens = min(micro_batch_tokens(encoder), at_most or sys.maxsize)
    length = max(max_length(encoder, role) or _LONGEST_MEASURED for role in ROLES)
    # Before `measure`: on a processor what that frees stays with the process, for the activations to come.
    now = memory_held(encoder.device)
    limit = now + free_memory(encoder.device) if budget == "auto" else budget * GB
    footprint = measure(encoder, length, bf16)
    trained = [p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad]
    side_by_side = at_once(encoder)
    if bf16 and side_by_side > 1:
        footprint = replace(footprint, fixed=sum(trained) / 2)
    # Gradients, two moments of the optimizer, and gradients before they are added: of the largest weight, and side by
    # side in each thread of all but embeddings, whose gradients there are as small as the texts.
    unadded = max(trained)
    if side_by_side > 1:
        looked_up = {module.weight.data_ptr(): module.weight.nbytes for module in trained_embeddings(encoder)}
        unadded = max(unadded, side_by_side * (sum(trained) - sum(looked_up.values())))
    held = now + (3 * sum(trained) + unadded) / shards
    left, running = limit - held, _RUNNING * side_by_side
    while tokens > length and running * _one(footprint, tokens, length) > left:
        tokens //= 2
    needed = held + running * _one(footprint, tokens, length)
    if needed > limit:
        raise ConfigError(
            "train.memory_budget",
            got=f"{limit / GB:.2g} GB",
            expected=f"at least {needed / GB:.2g} GB: libraries, weights, their gradients and moments, and one text",
            fix="raise it or lower model.max_length",
        )
    tokens = -most(-tokens)
    kept = _KEPT_ON_GPU if encoder.device.type == "cuda" else _KEPT
    # The backward pass takes those that kept their activations first, so what runs beside them is only their gradients.
    gradients = (_RUNNING - 1) * side_by_side * _one(footprint, tokens, length)
    return Memory((left - gradients) / kept, footprint, tokens)


def measure(encoder: SentenceTransformer, length: int, bf16: bool) -> Footprint:
    """The footprint of an encoder in training mode, from micro-batches of up to `length` tokens a text."""
    long = min(length, _LONGEST_MEASURED)
    short = max(1, long // 2)
    was_training, device = encoder.training, encoder.device
    encoder.train()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        one, two, longer = (_saved(encoder, rows, width) for rows, width in ((1, short), (2, short), (1, long)))
    encoder.train(was_training)
    of_short = two - one
    of_long = longer - one + of_short
    square = max(0.0, (of_long / long - of_short / short) / (long - short)) if long > short else 0.0
    return Footprint(max(0.0, of_short / short - square * short), square)


def memory_held(device: torch.device) -> int:
    """Bytes this process holds: of the GPU, or in all."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> float:
    """Bytes that `auto` takes of what is free: four fifths of a GPU, two of a machine, shared by its processes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.8 * (torch.cuda.mem_get_info(device)[0] + cached)
    return (
        0.4
        * min(psutil.virtual_memory().available, _container_memory())
        / int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    )


def _one(footprint: Footprint, tokens: int, length: int) -> float:
    """Bytes of a micro-batch."""
    return footprint.of(max(1, tokens // length), length)


# Bytes a process holds for one that autograd keeps: gradients of activations, what is made on the way, and what the
# allocator loses between blocks of other sizes. Measured with glibc, over steps of MiniLM; on GPUs not measured.
_RUNNING = 1.8  # of a micro-batch that runs
_KEPT, _KEPT_ON_GPU = 1.15, 1.1  # of those that wait for the backward pass


def _saved(encoder: SentenceTransformer, rows: int, length: int) -> int:
    """Bytes of the distinct tensors that a forward pass saves, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address

    def pack(tensor: Tensor) -> Tensor:
        keep(tensor)
        return tensor.detach()  # the tensor itself would hold its graph, which holds it

    features = encoder.preprocess(["a"])
    mask = features["attention_mask"]
    for key, value in features.items():
        if isinstance(value, Tensor) and value.shape == mask.shape:
            features[key] = value.repeat(rows, -(-length // mask.shape[1]))[:, :length].to(encoder.device)
    with outputs_made_again(keep) if at_once(encoder) > 1 else saved_tensors_hooks(pack, lambda tensor: tensor):
        output = encoder(features)["sentence_embedding"]
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def _container_memory() -> float:
    """What the container of this process has left, files it may forget included; inf where nothing limits it."""
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return float("inf")
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0.0, float(limit) - float(used) + float(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return float("inf")
