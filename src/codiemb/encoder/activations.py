"""Outputs of activation functions, made again in the backward pass in place of being kept.

Autograd keeps the input of an activation function, for its own gradient, and the output, for that of the layer that
follows. The output is wide (MiniLM: 1,536 beside 384) and soon made: without it a process takes an eighth less memory
on long texts and is no slower beyond the noise (`benchmarks/results/train.jsonl`).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2FN

_KINDS = {type(ACT2FN[name]) for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu")}


class _Made(NamedTuple):
    output: weakref.ref[Tensor]
    module: nn.Module
    input: Tensor
    version: int


class _OfThread(threading.local):
    watched = False
    latest: _Made | None = None


_of_thread = _OfThread()


def watch(model: nn.Module) -> None:
    """Makes the activation functions in `model` known to `outputs_made_again`."""
    for module in model.modules():
        if type(module) in _KINDS:
            module.register_forward_hook(_remember)


@contextlib.contextmanager
def outputs_made_again(kept: Callable[[Tensor], object] = lambda tensor: None) -> Iterator[None]:
    """Inside, on this thread, autograd keeps no output of an activation function that is watched.

    The gradients are the same to the last bit.

    Args:
        kept: is shown every tensor that autograd keeps.
    """

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if (latest := _of_thread.latest) and _same(tensor, latest.output()):
            kept(latest.input)
            return partial(_again, latest.module, latest.input, latest.version, tensor.shape)
        kept(tensor)
        # The tensor itself would hold its graph, which holds it.
        return partial(_unchanged, tensor.detach(), tensor._version)

    _of_thread.watched = True
    try:
        with saved_tensors_hooks(pack, lambda unpack: unpack()):
            yield
    finally:
        _of_thread.watched, _of_thread.latest = False, None


def _remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # An input without gradient is not kept by autograd, and may be written over.
    if _of_thread.watched and inputs and inputs[0].requires_grad and inputs[0].dtype == output.dtype:
        _of_thread.latest = _Made(weakref.ref(output), module, inputs[0].detach(), inputs[0]._version)


def _same(tensor: Tensor, output: Tensor | None) -> bool:
    """Whether `tensor` is the whole of `output`, in whatever shape, as it was made."""
    return (
        output is not None
        and tensor.data_ptr() == output.data_ptr()
        and tensor.dtype == output.dtype
        and tensor.numel() == output.numel()
        and tensor.is_contiguous()
        and output.is_contiguous()
        and output._version == 0
    )


@torch.no_grad()
def _again(module: nn.Module, input: Tensor, version: int, shape: torch.Size) -> Tensor:
    return module.forward(_unchanged(input, version)).view(shape)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """As autograd sees to it without hooks."""
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward pass needs was modified by an inplace operation")
    return tensor
