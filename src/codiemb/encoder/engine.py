"""Many texts through the encoder with little padding.

`tokenize` takes the texts of one batch, all roles together: it keeps each distinct (prompt, length, text) once, sorts
by length, and cuts into micro-batches of a token budget. `embed` runs them and puts the embeddings back in order. Both
training and evaluation go this way.

Cached gradients (GradCache, Gao et al., 2021): a loss needs all embeddings of a step at once, but the activations of a
micro-batch only while the gradient passes through it. So `embed` can run micro-batches that keep nothing but their
input, and run them again, with the same dropout, when the backward pass comes to them. It comes to the last one first
and leaves it before it enters the one before. To autograd, and so to DDP, it is one forward and one backward pass.

`encode` is for one process. Under torchrun, `encode_share` and `encode_on_all_ranks` are called by every rank with the
same texts, and each encodes its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from codiemb.distributed import joined, rank, world_size
from codiemb.encoder.model import hidden_states
from codiemb.errors import EvaluationError

_PIECE = 2048  # texts tokenised at once
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
        micro_batches: features for the encoder, texts of like length together.
        place: int64 [text], where each text asked for stands among the concatenated outputs.
        real: tokens without padding.
        padded: tokens with padding.
    """

    micro_batches: list[Features]
    place: Int[Tensor, " text"]
    real: int
    padded: int


class Embeddings(NamedTuple):
    """Embeddings of the texts asked for; `middle` is the pooled hidden state of the middle layer, or None."""

    final: Float[Tensor, "text dim"]
    middle: Float[Tensor, "text hidden"] | None


def micro_batch_tokens(encoder: SentenceTransformer) -> int:
    """Tokens of a micro-batch, padding included; more would only cost memory traffic."""
    return 16384 if encoder.device.type == "cuda" else 2048


def tokenize(encoder: SentenceTransformer, texts: Sequence[Text], budget: int | None = None) -> Tokens:
    """Tokens of `texts`, de-duplicated, sorted by length, in micro-batches of at most `budget` tokens with padding."""
    budget = budget or micro_batch_tokens(encoder)
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    groups: dict[tuple[str, int | None], list[Text]] = {}
    for text in distinct:
        groups.setdefault((text.prompt, text.max_length), []).append(text)
    micro_batches: list[Features] = []
    order: list[int] = []
    for (prompt, max_length), group in groups.items():
        # Tokenised in pieces sorted by characters, so that one long text does not pad ten thousand short ones.
        group.sort(key=lambda text: len(text.text), reverse=True)
        for start in range(0, len(group), _PIECE):
            piece = group[start : start + _PIECE]
            features = encoder.preprocess([text.text for text in piece], prompt=prompt or None, max_length=max_length)
            for places, micro_batch in _cut(features, budget):
                micro_batches.append(micro_batch)
                order += [distinct[piece[place]] for place in places]
    position = torch.empty(len(distinct), dtype=torch.int64)
    position[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    place = position[torch.tensor([distinct[text] for text in texts], dtype=torch.int64)]
    masks = [features["attention_mask"] for features in micro_batches]
    return Tokens(micro_batches, place, int(sum(mask.sum() for mask in masks)), sum(mask.numel() for mask in masks))


def embed(
    encoder: SentenceTransformer,
    micro_batches: list[Features],
    place: Tensor,
    middle: bool = False,
    cached: int = 0,
) -> Embeddings:
    """Embeddings of tokenised texts, in the order asked for, float32; with gradient where it is enabled.

    Args:
        middle: also pool hidden_states[len // 2] of the same forward pass.
        cached: so many micro-batches, from the first, keep no activations and run again in the backward pass. The
            gradients are the same to the last bit.
    """

    def run(features: Features) -> tuple[Tensor, ...]:
        with hidden_states(encoder, middle):
            output = encoder(dict(features))
        final = output["sentence_embedding"].float()
        return (final, pool_middle(encoder, output).float()) if middle else (final,)

    rows = []
    # Without early stop: no exception passes through the model's hooks, and there is nothing after pooling to save.
    with set_checkpoint_early_stop(False):
        for number, features in enumerate(micro_batches):
            rows.append(checkpoint(run, features, use_reentrant=False) if number < cached else run(features))
    final, *others = (torch.cat(column)[place] for column in zip(*rows, strict=True))
    return Embeddings(final, others[0] if middle else None)


@torch.inference_mode()
def encode(
    encoder: SentenceTransformer, texts: Sequence[Text], *, bf16: bool = False, progress: Any = None
) -> Float[Tensor, "text dim"]:
    """L2-normalised embeddings of `texts` on the encoder's device, without gradient or dropout."""
    was_training = encoder.training
    encoder.eval()
    device = encoder.device
    distinct = list(dict.fromkeys(texts))
    distinct.sort(key=lambda text: len(text.text), reverse=True)
    rows: dict[Text, int] = {}
    parts = []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(distinct), _PIECE):
            piece = distinct[start : start + _PIECE]
            tokens = tokenize(encoder, piece)
            moved = [{key: _to(value, device) for key, value in batch.items()} for batch in tokens.micro_batches]
            parts.append(torch.nn.functional.normalize(embed(encoder, moved, tokens.place.to(device)).final, dim=-1))
            rows.update({text: start + number for number, text in enumerate(piece)})
            if progress is not None:
                progress.update(len(piece))
    encoder.train(was_training)
    embeddings = torch.cat(parts)[[rows[text] for text in texts]]
    if not bool(torch.isfinite(embeddings).all()):
        raise EvaluationError("embeddings", got="nan or inf", expected="finite numbers", fix="the weights are damaged")
    return embeddings


def shares(texts: Sequence[Text], ranks: int) -> list[list[int]]:
    """By rank, the places of the texts it encodes, ascending; equal texts are with one rank.

    Dealt in turn from the longest down, so that all ranks finish at about the same time. With more ranks than distinct
    texts, some get none.
    """
    distinct = sorted(dict.fromkeys(texts), key=lambda text: len(text.text), reverse=True)
    owner = {text: number % ranks for number, text in enumerate(distinct)}
    places: list[list[int]] = [[] for _ in range(ranks)]
    for place, text in enumerate(texts):
        places[owner[text]].append(place)
    return places


def encode_share(
    encoder: SentenceTransformer, texts: Sequence[Text], *, bf16: bool = False, progress: Any = None
) -> tuple[Float[Tensor, "own dim"], list[list[int]]]:
    """The embeddings of this rank's share of `texts`, and `shares`."""
    places = shares(texts, world_size())
    own = [texts[place] for place in places[rank()]]
    # A rank without texts encodes one, so that its share of no rows has the width of the others.
    return encode(encoder, own or texts[:1], bf16=bf16, progress=progress)[: len(own)], places


def encode_on_all_ranks(
    encoder: SentenceTransformer, texts: Sequence[Text], *, bf16: bool = False, progress: Any = None
) -> Float[Tensor, "text dim"]:
    """What `encode` gives, on every rank; each has encoded its share."""
    own, places = encode_share(encoder, texts, bf16=bf16, progress=progress)
    rows = joined(own)[0]
    embeddings = torch.empty_like(rows)
    embeddings[torch.tensor(list(chain(*places)), device=rows.device)] = rows
    return embeddings


def pool_middle(encoder: SentenceTransformer, output: Features) -> Float[Tensor, "text hidden"]:
    """The pooled middle layer, from the output of a forward pass inside `hidden_states`."""
    layers = output["all_layer_embeddings"]
    for module in encoder:
        if isinstance(module, Pooling):
            return module({**output, "token_embeddings": layers[len(layers) // 2]})["sentence_embedding"]
    raise TypeError("the encoder has no Pooling module, so a middle layer cannot be pooled (mid_nce)")


def _cut(features: Features, budget: int) -> list[tuple[list[int], Features]]:
    """Rows of padded features, longest first, in micro-batches of at most `budget` padded tokens, trimmed."""
    mask = features["attention_mask"]
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    pieces = []
    start = 0
    while start < len(order):
        width = _multiple_of_8(int(lengths[order[start]]), mask.shape[1])
        rows = order[start : start + max(1, budget // max(1, width))]
        start += len(rows)
        kept = mask[rows].any(dim=0).nonzero().flatten()
        first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (0, 0)
        # Padding stands on one side; keep a multiple of 8 columns towards it.
        if first == 0:
            columns = slice(0, min(_multiple_of_8(last + 1, mask.shape[1]), mask.shape[1]))
        else:
            columns = slice(max(0, mask.shape[1] - _multiple_of_8(mask.shape[1] - first, mask.shape[1])), mask.shape[1])
        cut = {
            key: value[rows][:, columns] if isinstance(value, Tensor) and value.shape == mask.shape else value
            for key, value in features.items()
        }
        pieces.append((rows.tolist(), cut))
    return pieces


def _multiple_of_8(length: int, most: int) -> int:
    return min(-(-length // 8) * 8, most)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
