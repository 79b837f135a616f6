"""What a batch is trained on: tables from names to losses, by the shape of the batch, and their weighted sum.

A batch of `lists` holds queries with ragged documents, a batch of `pairs` two texts and a score each. An objective
takes the embeddings of a whole batch and gives its parts by name, unweighted, with their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from codiemb.losses.retrieval import count_candidates, info_nce, list_softmax, triplet
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Lists:
    """Queries with ragged documents; fields as in `info_nce`, scores as in `list_softmax`."""

    queries: Float[Tensor, "query dim"]
    documents: Float[Tensor, "document dim"]
    owner: Int[Tensor, " document"]
    positive: Bool[Tensor, " document"]
    slot: Int[Tensor, " document"]
    document_ids: Int[Tensor, " document"]
    scores: Float[Tensor, " document"]
    relevant: Int[Tensor, "pair 2"]

    def prefix(self, dim: int | None) -> Lists:
        """Normalised embeddings of the first `dim` dimensions."""
        return replace(self, queries=_unit(self.queries[:, :dim]), documents=_unit(self.documents[:, :dim]))


@dataclass(frozen=True)
class Pairs:
    """Graded pairs; the pooled middle layer only where it is asked for."""

    left: Float[Tensor, "pair dim"]
    right: Float[Tensor, "pair dim"]
    target: Float[Tensor, " pair"]
    left_ids: Int[Tensor, " pair"]
    right_ids: Int[Tensor, " pair"]
    left_middle: Float[Tensor, "pair hidden"] | None = None
    right_middle: Float[Tensor, "pair hidden"] | None = None

    def prefix(self, dim: int | None) -> Pairs:
        """Normalised embeddings of the first `dim` dimensions; the middle layer stays whole."""
        middle: dict[str, Any] = {}
        if self.left_middle is not None and self.right_middle is not None:
            middle = {"left_middle": _unit(self.left_middle), "right_middle": _unit(self.right_middle)}
        return replace(self, left=_unit(self.left[:, :dim]), right=_unit(self.right[:, :dim]), **middle)

    @property
    def cosine(self) -> Float[Tensor, " pair"]:
        """Of normalised embeddings."""
        return (self.left * self.right).sum(dim=-1)


@dataclass(frozen=True)
class Objective:
    """The parts of a batch's loss, and what it was computed over.

    Attributes:
        parts: unweighted, by name.
        weights: what each part counts for.
        candidates: documents in the denominator of a contrastive term, on average; None without one.
    """

    parts: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    candidates: Float[Tensor, ""] | None = None

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack([self.weights[name] * part for name, part in self.parts.items()]).sum()


# From normalised embeddings and settings to a scalar.
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
    "angle": lambda batch, settings: angle(batch.left, batch.right, batch.target, **_some(settings, "temperature")),
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
    counted = None
    if name != "list_softmax":
        counted = count_candidates(
            len(batch.queries),
            **_listing(batch),
            slot=batch.slot,
            candidates="all" if name == "triplet" else settings["candidates"],
            chunk_size=settings["chunk_size"],
        )
    loss = LIST_LOSSES[name](batch.prefix(dim), settings)
    return Objective({name: loss}, {name: settings["weight"]}, counted)


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

    What does not look at the embedding (the middle layer) is computed once, with the first of the dims.
    """
    parts: dict[str, Tensor] = {}
    part_weights: dict[str, float] = {}
    candidates = None
    for place, (dim, weight) in enumerate(zip(dims, weights, strict=True)):
        if place and "mid_nce" in settings:
            settings = {**settings, "mid_nce": 0}
        one = objective(batch, settings, dim)
        candidates = one.candidates
        parts |= {f"{name}@{dim}": part for name, part in one.parts.items()}
        part_weights |= {f"{name}@{dim}": weight * part for name, part in one.weights.items()}
    return Objective(parts, part_weights, candidates)


@dataclass
class RunningScale:
    """Divides parts by the running mean of their size, so that weights compare parts of like size.

    Sizes of 0 (nothing in the batch for this part) do not count. The divisor carries no gradient.

    Attributes:
        momentum: what of the mean is kept at each batch.
        means: by part.
    """

    momentum: float = 0.99
    means: dict[str, Float[Tensor, ""]] = field(default_factory=dict)

    def __call__(self, task: str, objective: Objective) -> Objective:
        """The objective with its parts divided."""
        parts = {}
        for name, part in objective.parts.items():
            size, key = part.detach().abs(), f"{task}/{name}"
            before = self.means.get(key, size).to(size.device)
            mean = torch.where(before > 0, self.momentum * before + (1 - self.momentum) * size, size)
            self.means[key] = torch.where(size > 0, mean, before)
            parts[name] = part / torch.where(self.means[key] > 0, self.means[key], 1)
        return replace(objective, parts=parts)


def _listing(batch: Lists) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in ("owner", "positive", "document_ids", "relevant")}


def _some(settings: Settings, *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}


def _pair_nce(batch: Pairs, left: Tensor | None, right: Tensor | None, settings: Settings) -> Tensor:
    assert left is not None
    assert right is not None
    return mid_nce(
        left,
        right,
        batch.target,
        left_ids=batch.left_ids,
        right_ids=batch.right_ids,
        threshold=settings["mid_nce_threshold"],
        temperature=settings["mid_nce_temperature"],
    )


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings, dim=-1)
