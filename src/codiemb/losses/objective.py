"""What a batch is trained on: tables from names to losses, by the shape of the batch, and their weighted sum.

A batch of `lists` holds queries with ragged documents, a batch of `pairs` two texts and a score each. An objective
gives its parts by name, unweighted, with their weights: of the whole batch, or (`Objective.rows`) of a rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codiemb.losses.listwise import (
    angle,
    cosent,
    cosine_mse,
    lambda_rank,
    list_mle,
    list_net,
    rank_net,
    soft_spearman,
)
from codiemb.losses.retrieval import Groups, count_candidates, count_queries, info_nce, list_softmax, triplet
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Lists:
    """Queries with ragged documents; fields as in `info_nce`.

    Attributes:
        scores: as in `list_softmax`, which alone needs them; under several processes of this rank's lists only.
    """

    queries: Float[Tensor, "query dim"]
    documents: Float[Tensor, "document dim"]
    owner: Int[Tensor, " document"]
    positive: Bool[Tensor, " document"]
    slot: Int[Tensor, " document"]
    document_ids: Int[Tensor, " document"]
    scores: Float[Tensor, " listed"]
    relevant: Int[Tensor, "pair 2"]
    groups: Groups | None = None

    def prefix(self, dim: int | None) -> Lists:
        """Normalised embeddings of the first `dim` dimensions."""
        return replace(self, queries=_unit(self.queries[:, :dim]), documents=_unit(self.documents[:, :dim]))


@dataclass(frozen=True)
class Pairs:
    """Graded pairs; the pooled middle layer only where it is asked for.

    Attributes:
        target: labels from 0 to 1; labels and ids are those of the whole batch, whichever rank holds the embeddings.
        gather: from the rows of this rank to those of all; most losses need the cosines of the others only.
    """

    left: Float[Tensor, "row dim"]
    right: Float[Tensor, "row dim"]
    target: Float[Tensor, " pair"]
    left_ids: Int[Tensor, " pair"]
    right_ids: Int[Tensor, " pair"]
    left_middle: Float[Tensor, "row hidden"] | None = None
    right_middle: Float[Tensor, "row hidden"] | None = None
    gather: Callable[[Tensor], Tensor] = field(default=lambda rows: rows, kw_only=True)

    def prefix(self, dim: int | None) -> Pairs:
        """The same with the first `dim` dimensions of the embeddings."""
        return replace(self, left=self.left[:, :dim], right=self.right[:, :dim])

    @cached_property
    def cosine(self) -> Float[Tensor, " pair"]:
        return self.gather((_unit(self.left) * _unit(self.right)).sum(dim=-1))


@dataclass(frozen=True)
class Objective:
    """The parts of a batch's loss, and what it was computed over.

    Attributes:
        parts: unweighted, by name.
        weights: what each part counts for.
        candidates: documents in the denominator of a contrastive term, on average; None without one.
        rows: over how many rows a mean was taken, where the parts are those of this rank's rows; None where they are
            those of the whole batch.
    """

    parts: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    candidates: Float[Tensor, ""] | None = None
    rows: Int[Tensor, ""] | None = None

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack([self.weights[name] * part for name, part in self.parts.items()]).sum()


# From a batch and settings to a scalar; embeddings of lists come normalised, those of pairs as they are.
LIST_LOSSES: dict[str, Callable[[Lists, Settings], Tensor]] = {
    "info_nce": lambda batch, settings: info_nce(
        batch.queries,
        batch.documents,
        **_listing(batch),
        slot=batch.slot,
        **_some(settings, "temperature", "candidates", "hardness", "false_negative_margin", "symmetric", "chunk_size"),
    ),
    "triplet": lambda batch, settings: triplet(
        batch.queries, batch.documents, **_listing(batch), margin=settings["margin"]
    ),
    "list_softmax": lambda batch, settings: list_softmax(
        batch.queries, batch.documents, owner=batch.owner, scores=batch.scores, temperature=settings["temperature"]
    ),
}
PAIR_LOSSES: dict[str, Callable[[Pairs, Settings], Tensor]] = {
    "pearson": lambda batch, _: pearson(batch.cosine, batch.target),
    "rank_kl": lambda batch, settings: rank_kl(
        batch.cosine, batch.target, **_some(settings, "temperature", "reduction")
    ),
    "pro": lambda batch, settings: pro(batch.cosine, batch.target, **_some(settings, "temperature")),
    "mid_nce": lambda batch, settings: _pair_nce(batch, batch.left_middle, batch.right_middle, settings),
    "cosent": lambda batch, settings: cosent(batch.cosine, batch.target, **_some(settings, "temperature")),
    "angle": lambda batch, settings: angle(
        *_gathered(batch, batch.left, batch.right), batch.target, **_some(settings, "temperature")
    ),
    "list_net": lambda batch, settings: list_net(batch.cosine, batch.target, **_some(settings, "temperature")),
    "list_mle": lambda batch, settings: list_mle(batch.cosine, batch.target, **_some(settings, "temperature")),
    "rank_net": lambda batch, settings: rank_net(batch.cosine, batch.target, **_some(settings, "temperature")),
    "lambda_rank": lambda batch, settings: lambda_rank(batch.cosine, batch.target, **_some(settings, "temperature")),
    "soft_spearman": lambda batch, settings: soft_spearman(
        batch.cosine, batch.target, **_some(settings, "temperature")
    ),
    "cosine_mse": lambda batch, _: cosine_mse(batch.cosine, batch.target),
    "info_nce": lambda batch, settings: _pair_nce(batch, batch.left, batch.right, settings),
}


def lists(batch: Lists, settings: Settings, dim: int | None = None) -> Objective:
    """The loss `settings["type"]` names, on the first `dim` dimensions."""
    name = settings["type"]
    parts, weights = {name: LIST_LOSSES[name](batch.prefix(dim), settings)}, {name: settings["weight"]}
    if name == "list_softmax":
        rows = count_queries(len(batch.queries), owner=batch.owner, positive=batch.scores > 0)
        return Objective(parts, weights, rows=rows)
    counted = count_candidates(
        len(batch.queries),
        **_listing(batch),
        slot=batch.slot,
        candidates=settings["candidates"],
        chunk_size=settings["chunk_size"],
    )
    rows = count_queries(len(batch.queries), owner=batch.owner, positive=batch.positive)
    return Objective(parts, weights, counted, rows)


def pairs(batch: Pairs, settings: Settings, dim: int | None = None) -> Objective:
    """Every loss with a weight above 0, on the first `dim` dimensions; the others are not computed."""
    weights = {name: settings["weight"] * settings[name] for name in PAIR_LOSSES if settings[name]}
    batch = batch.prefix(dim)
    return Objective({name: PAIR_LOSSES[name](batch, settings) for name in weights}, weights)


SHAPES: dict[str, Callable[..., Objective]] = {"lists": lists, "pairs": pairs}


def matryoshka(
    objective: Callable[..., Objective], batch: Any, settings: Settings, dims: Sequence[int], weights: Sequence[float]
) -> Objective:
    """The objective on prefixes of the embedding (Kusupati et al., 2022), parts named `<part>@<dim>`.

    MidNCE, which looks at the middle layer and not at the embedding, is computed once and keeps its own weight.
    """
    parts: dict[str, Tensor] = {}
    part_weights: dict[str, float] = {}
    for place, (dim, weight) in enumerate(zip(dims, weights, strict=True)):
        if place and settings.get("mid_nce"):
            settings = {**settings, "mid_nce": 0}
        one = objective(batch, settings, dim)
        for name, part in one.parts.items():
            whole = name == "mid_nce"
            parts[name if whole else f"{name}@{dim}"] = part
            part_weights[name if whole else f"{name}@{dim}"] = one.weights[name] * (1 if whole else weight)
    return replace(one, parts=parts, weights=part_weights)


@dataclass
class RunningScale:
    """Divides parts by the running mean of their size, so that weights compare parts of like size.

    The mean is the plain one of the first 1 / (1 - momentum) batches, and exponential after. Sizes of 0 (nothing in the
    batch for this part) do not count. The divisor carries no gradient.

    Attributes:
        momentum: what of the mean is kept at each batch.
        means: by part, how many batches counted and their mean size.
    """

    momentum: float = 0.99
    means: dict[str, Float[Tensor, "2"]] = field(default_factory=dict)

    def __call__(self, task: str, objective: Objective) -> Objective:
        """The objective with its parts divided."""
        parts = {}
        for name, part in objective.parts.items():
            size, key = part.detach().abs(), f"{task}/{name}"
            count, mean = self.means.get(key, size.new_zeros(2)).to(size.device).unbind()
            count = count + (size > 0)
            kept = torch.clamp(1 - 1 / count.clamp(min=1), max=self.momentum)
            mean = torch.where(size > 0, kept * mean + (1 - kept) * size, mean)
            self.means[key] = torch.stack([count, mean])
            parts[name] = part / torch.where(mean > 0, mean, 1)
        return replace(objective, parts=parts)


def _listing(batch: Lists) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in ("owner", "positive", "document_ids", "relevant", "groups")}


def _some(settings: Settings, *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}


def _pair_nce(batch: Pairs, left: Tensor | None, right: Tensor | None, settings: Settings) -> Tensor:
    assert left is not None
    assert right is not None
    return mid_nce(
        *_gathered(batch, _unit(left), _unit(right)),
        batch.target,
        left_ids=batch.left_ids,
        right_ids=batch.right_ids,
        threshold=settings["mid_nce_threshold"],
        temperature=settings["mid_nce_temperature"],
    )


def _gathered(batch: Pairs, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of all pairs, in one exchange."""
    left, right = batch.gather(torch.cat([left, right], dim=1)).chunk(2, dim=1)
    return left, right


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings, dim=-1)
