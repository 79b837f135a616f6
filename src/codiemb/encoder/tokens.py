"""Texts -> micro-batches with little padding.

The texts of a step, all batches and roles together: each distinct (prompt, length, text) once, sorted by length, cut
where that costs least. A micro-batch costs its tokens with padding, and something of its own (calls, and gradients that
are added to those of the others), so a cut pays where it saves more padding than that. Packed micro-batches
(`codiemb.encoder.gpu`) have no padding and are filled up one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from codiemb.encoder.gpu import pack

PIECE = 2048  # texts tokenised at once
Features = dict[str, Any]


class Text(NamedTuple):
    """A text with what its role puts before it and keeps of it."""

    text: str
    prompt: str
    max_length: int | None


@dataclass(frozen=True)
class Tokens:
    """Tokenised distinct texts.

    Attributes:
        micro_batches: features for the encoder, texts of like length together, padded or packed.
        place: int64 [text], where each text asked for stands among the concatenated outputs.
        real: tokens without padding.
        padded: tokens with what padding there is.
    """

    micro_batches: list[Features]
    place: Int[Tensor, " text"]
    real: int
    padded: int


def micro_batch_tokens(encoder: SentenceTransformer) -> int:
    """Tokens of a micro-batch at most, padding included; more would only cost memory traffic."""
    return 16384 if encoder.device.type == "cuda" else 2048


def _multiple(encoder: SentenceTransformer) -> int:
    """Widths that a GPU's matrix units like; a processor gains nothing from more padding (short pairs: a quarter slower
    with 8, measured on two cores)."""
    return 8 if encoder.device.type == "cuda" else 1


def _own_cost(encoder: SentenceTransformer) -> int:
    """What a micro-batch costs beside its tokens, in tokens: 45 ms where 1,000 tokens take 600 ms (measured on two
    cores, MiniLM); on a GPU the time to launch its kernels (not measured)."""
    return 4096 if encoder.device.type == "cuda" else 64


def shape(features: Features) -> tuple[int, float]:
    """Rows of a micro-batch, and tokens of a row with padding; of a packed one texts, and tokens on average."""
    if (mask := features.get("attention_mask")) is not None:
        return mask.shape
    rows = len(features["cu_seq_lens_q"]) - 1
    return rows, features["input_ids"].numel() / rows


def tokenize(
    encoder: SentenceTransformer, texts: Sequence[Text], budget: int | None = None, packed: bool = False
) -> Tokens:
    """Tokens of `texts`, de-duplicated, sorted by length, in micro-batches of at most `budget` tokens with padding."""
    budget, own = budget or micro_batch_tokens(encoder), _own_cost(encoder)
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    groups: dict[tuple[str, int | None], list[Text]] = {}
    for text in distinct:
        groups.setdefault((text.prompt, text.max_length), []).append(text)
    kinds: dict[Any, list[tuple[list[int], Features]]] = {}
    for (prompt, max_length), group in groups.items():
        # Tokenised in pieces sorted by characters, so that one long text does not pad ten thousand short ones.
        group.sort(key=lambda text: len(text.text), reverse=True)
        for start in range(0, len(group), PIECE):
            piece = group[start : start + PIECE]
            features = dict(
                encoder.preprocess([text.text for text in piece], prompt=prompt or None, max_length=max_length)
            )
            kinds.setdefault(_kind(encoder, features), []).append(([distinct[text] for text in piece], features))
    micro_batches: list[Features] = []
    order: list[int] = []
    real = 0
    for pieces in kinds.values():
        numbers = list(chain(*(listed for listed, _ in pieces)))
        rows = _stacked(encoder, [features for _, features in pieces])
        for places, micro_batch in _cut(rows, budget, own, _multiple(encoder), packed):
            lengths = micro_batch["attention_mask"].sum(dim=1)
            real += int(lengths.sum())
            # A text without tokens has no place of its own in a packed row.
            micro_batches.append(pack(encoder, micro_batch) if packed and lengths.all() else micro_batch)
            order += [numbers[place] for place in places]
    position = torch.empty(len(distinct), dtype=torch.int64)
    position[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    place = position[torch.tensor([distinct[text] for text in texts], dtype=torch.int64)]
    return Tokens(micro_batches, place, real, sum(features["input_ids"].numel() for features in micro_batches))


def _kind(encoder: SentenceTransformer, features: Features) -> Any:
    """Equal for features whose rows may stand in one micro-batch: those of other prompts too, where pooling takes a
    prompt like the rest."""
    if not any(isinstance(module, Pooling) and not module.include_prompt for module in encoder):
        features.pop("prompt_length", None)
    shape = features["attention_mask"].shape
    return tuple(
        (key, None if isinstance(value, Tensor) and value.shape == shape else repr(value))
        for key, value in sorted(features.items())
    )


def _stacked(encoder: SentenceTransformer, pieces: list[Features]) -> Features:
    """The rows of all pieces, padded to one width."""
    if len(pieces) == 1:
        return pieces[0]
    width = max(piece["attention_mask"].shape[1] for piece in pieces)

    def padded(key: str, rows: Tensor) -> Tensor:
        missing = width - rows.shape[1]
        sides = (missing, 0) if encoder.tokenizer.padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(rows, sides, value=encoder.tokenizer.pad_token_id if key == "input_ids" else 0)

    shape = pieces[0]["attention_mask"].shape
    return {
        key: torch.cat([padded(key, piece[key]) for piece in pieces])
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for key, value in pieces[0].items()
    }


def _cut(features: Features, budget: int, own: int, multiple: int, packed: bool) -> list[tuple[list[int], Features]]:
    """Rows of padded features, longest first, in micro-batches of at most `budget` tokens, trimmed."""
    mask = features["attention_mask"]
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    widths = (-(-lengths[order].numpy() // multiple) * multiple).clip(1, mask.shape[1])
    pieces = []
    for start, stop in full_cuts(lengths[order].numpy(), budget) if packed else cheapest_cuts(widths, budget, own):
        rows, width = order[start:stop], int(widths[start])
        left = mask.shape[1] - width if mask[rows, -1].any() else 0  # padding stands on one side
        cut = {
            key: value[rows, left : left + width] if isinstance(value, Tensor) and value.shape == mask.shape else value
            for key, value in features.items()
        }
        pieces.append((rows.tolist(), cut))
    return pieces


def cheapest_cuts(widths: np.ndarray, budget: int, own: int) -> list[tuple[int, int]]:
    """Ranges of rows whose sum of (rows * widest + own) is least, each of at most `budget` tokens or of one row.

    Args:
        widths: int64 [row], descending.
        budget: tokens of a range, padding included.
        own: what a range costs beside its tokens, in tokens.
    """
    cost, begin = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    for stop in range(1, len(widths) + 1):
        first = stop - min(stop, max(1, budget // widths[stop - 1]))
        starts = np.arange(first, stop)
        tokens = (stop - starts) * widths[starts]
        costs = np.where((tokens <= budget) | (starts == stop - 1), cost[starts] + tokens + own, np.inf)
        begin[stop] = first + costs.argmin()
        cost[stop] = costs.min()
    ranges = []
    stop = len(widths)
    while stop:
        ranges.append((int(begin[stop]), stop))
        stop = ranges[-1][0]
    return ranges[::-1]


def full_cuts(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Ranges of rows, one after the other, each of at most `budget` tokens without padding, or of one row."""
    ranges, start, tokens = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and tokens + length > budget:
            ranges.append((start, place))
            start, tokens = place, 0
        tokens += length
    return [*ranges, (start, len(lengths))]
