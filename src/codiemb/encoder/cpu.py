"""What makes a processor train faster with the same mathematics; `benchmarks/engine.py` measures each part alone.

- `Dropout`: torch draws a number of its Mersenne twister for every element; 16 bits of a faster generator are enough.
- `attention`: eager on short texts, SDPA on long ones; for long ones with dropout a function of our own, with that
  dropout and fewer passes over the [length, length] scores than eager attention.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from codiemb.encoder.activations import watch

ATTENTION = "codiemb_cpu"
_LONG = 128  # tokens from which the scores cost more than the calls (`benchmarks/engine.py --only attention`)


def keep_mask(shape: torch.Size, p: float) -> Float[Tensor, "..."]:
    """A mask for dropout: 1 / (1 - p) with probability 1 - p, else 0; p counts in steps of 2^-16.

    The bits are NumPy's SFC64's. Its seed is drawn from torch's generator, so that whoever replays that one (GradCache,
    gradient checkpointing) replays the mask; inside `drawn_from` from the generator there.
    """
    dropped = round(p * 65536)
    seed = int(torch.randint(2**62, (), generator=getattr(_of_thread, "generator", None)))
    numbers = np.random.Generator(np.random.SFC64(seed))
    size = shape.numel()
    bits = numbers.integers(0, 2**64, size=-(-size // 4), dtype=np.uint64).view(np.int16)[:size]
    return torch.from_numpy(bits).ge(dropped - 32768).float().mul_(65536 / (65536 - dropped)).view(shape)


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, the masks of this thread are those that torch's generator would give after this seed."""
    _of_thread.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _of_thread.generator = None


_of_thread = threading.local()


class Dropout(nn.Dropout):
    """`nn.Dropout` with masks of `keep_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.p == 1 or input.device.type != "cpu":
            return super().forward(input)
        return input * keep_mask(input.shape, self.p).to(input.dtype)


def replace_dropout(model: nn.Module) -> None:
    """Every `nn.Dropout` in `model` becomes a `Dropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                replacement = Dropout(child.p)
                replacement.train(child.training)
                setattr(module, name, replacement)


class _Attention(torch.autograd.Function):
    """softmax(scale * query key^T + mask) value, for [batch * head, length, dim]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kept: Tensor | None,
        scale: float,
        batch: int,
    ) -> Tensor:
        # With beta 0 the first argument lends its shape only.
        scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)
        if mask is not None:
            scores.view(batch, -1, *scores.shape[1:]).add_(mask)
        weights = torch.softmax(scores, dim=-1, out=scores)
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.scale = scale
        return torch.bmm(weights if kept is None else weights * kept, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept = ctx.saved_tensors
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        if kept is None:
            of_value = torch.bmm(weights.transpose(1, 2), gradient)
        else:
            of_value = torch.bmm((weights * kept).transpose(1, 2), gradient)
            of_weights.mul_(kept)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        nothing = query.new_empty(())
        of_query = torch.baddbmm(nothing, of_scores, key, beta=0, alpha=ctx.scale)
        of_key = torch.baddbmm(nothing, of_scores.transpose(1, 2), query, beta=0, alpha=ctx.scale)
        return of_query, of_key, of_value, None, None, None, None


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch key_head key dim"],
    value: Float[Tensor, "batch key_head key dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Float[Tensor, "batch query head dim"], None]:
    """Attention as transformers calls it, with any mask that eager attention takes."""
    batch, heads, length, dim = query.shape
    scale = dim**-0.5 if scaling is None else scaling
    if key.shape[1] != heads:  # grouped queries
        key, value = (part.repeat_interleave(heads // key.shape[1], dim=1) for part in (key, value))
    if attention_mask is not None:
        # The mask's lowest number may be less than a narrower type holds; -inf everywhere would give NaN.
        attention_mask = attention_mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    dropped = dropout if module.training else 0.0
    if length < _LONG:
        scores = torch.matmul(query, key.transpose(2, 3)) * scale
        weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
        if dropped:
            weights = weights * keep_mask(weights.shape, dropped).to(weights.dtype)
        out = torch.matmul(weights, value)
    elif not dropped:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
    else:
        flat = [part.reshape(batch * heads, -1, dim) for part in (query, key, value)]
        kept = keep_mask(torch.Size((batch * heads, length, flat[1].shape[1])), dropped).to(query.dtype)
        out = _Attention.apply(*flat, attention_mask, kept, scale, batch).view(batch, heads, length, -1)
    return out.transpose(1, 2).contiguous(), None


def speed_up(model: PreTrainedModel) -> None:
    """Readies a model that runs on the processor; `attention` goes only where it is plain."""
    replace_dropout(model)
    watch(model)
    if model.config.model_type in _PLAIN_ATTENTION:
        model.set_attn_implementation(ATTENTION)


# softmax(scale * query key^T + mask) value and nothing else: no caps, no sinks, no biases by distance.
_PLAIN_ATTENTION = (
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "llama",
    "mistral",
    "modernbert",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)

AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
