"""What a task is: the shape of its records, the roles of their texts, and the settings of its batches and losses.

There are two shapes. In `lists` a record is a query with any number of positive and negative texts, perhaps with
scores; in `pairs` it is two texts and a score from 0 to 1. Batches, embeddings and losses know the shapes only
(`codiemb.losses.objective`), so a new task is a file with its defaults and a line in `codiemb.tasks.TASKS`; how it is
scored stands in `codiemb.evaluation`.

This package imports no torch: it is part of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from codiemb.section import Fraction, Positive, Role, Section, Temperature, Weight

Shape = Literal["lists", "pairs"]


@dataclass(frozen=True)
class Task:
    """What the library must know of a task.

    Attributes:
        shape: what a record of it is.
        roles: of a record's query, and of its other texts.
        batches: settings under `batching.<task>`.
        losses: settings under `losses.<task>`.
        labelled: a record may bring a label instead of positives; texts with its label are its positives then.
    """

    shape: Shape
    roles: tuple[Role, Role]
    batches: type[Section]
    losses: type[Section]
    labelled: bool = False


class ListBatches(Section):
    """`batch_size` counts queries over all ranks; `positives` and `negatives` are the most drawn for each."""

    batch_size: Positive = 32
    positives: Positive = 2
    negatives: Annotated[int, Field(ge=0)] = 4


class PairBatches(Section):
    """`batch_size` counts pairs over all ranks."""

    batch_size: Positive = 32

    @field_validator("batch_size")
    @classmethod
    def _a_pair_of_pairs(cls, value: int) -> int:
        if value < 2:
            raise ValueError("expected at least 2, because a rank loss compares pairs with each other; raise it")
        return value


class ListLosses(Section):
    """One loss of lists, and its constants.

    With `cross_device: false` the candidates of a query come from its group alone: `group_size` consecutive rows of the
    global batch. Groups do not depend on the number of devices, so neither does the model.
    """

    type: Literal["info_nce", "triplet", "list_softmax"] = "info_nce"
    weight: Weight = 1.0
    temperature: Temperature = 0.02
    candidates: Literal["all", "same_slot"] = "all"
    cross_device: bool = True
    group_size: Positive = 8
    hardness: Weight = 0.0
    false_negative_margin: Annotated[float, Field(ge=-2, le=2)] | None = None
    symmetric: bool = False
    chunk_size: Positive | None = None
    margin: Weight = 0.2

    @model_validator(mode="after")
    def _options_of_this_type(self) -> ListLosses:
        for name, types in _OPTIONS.items():
            if self.type not in types and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected none, because the type is {self.type}")
        return self


_OPTIONS = {  # which types of list losses have an option
    "candidates": ("info_nce",),
    "cross_device": ("info_nce", "triplet"),
    "group_size": ("info_nce", "triplet"),
    "hardness": ("info_nce",),
    "false_negative_margin": ("info_nce",),
    "symmetric": ("info_nce",),
    "chunk_size": ("info_nce",),
    "margin": ("triplet",),
}

PAIR_LOSSES = (
    "pearson",
    "rank_kl",
    "pro",
    "mid_nce",
    "cosent",
    "angle",
    "list_net",
    "list_mle",
    "rank_net",
    "lambda_rank",
    "soft_spearman",
    "cosine_mse",
    "info_nce",
)


class PairLosses(Section):
    """Weights of the losses of pairs, and their constants.

    Where a loss is named that a task does not use by default, the defaults that are not named are off: `{cosent: 1}`
    is CoSENT alone, `{cosent: 1, pearson: 2}` both.
    """

    weight: Weight = 1.0
    pearson: Weight = 0.0
    rank_kl: Weight = 0.0
    pro: Weight = 0.0
    mid_nce: Weight = 0.0
    cosent: Weight = 0.0
    angle: Weight = 0.0
    list_net: Weight = 0.0
    list_mle: Weight = 0.0
    rank_net: Weight = 0.0
    lambda_rank: Weight = 0.0
    soft_spearman: Weight = 0.0
    cosine_mse: Weight = 0.0
    info_nce: Weight = 0.0
    temperature: Temperature = 0.05
    reduction: Literal["batchmean", "sum"] = "batchmean"
    mid_nce_temperature: Temperature = 0.02
    mid_nce_threshold: Fraction = 1.0

    @model_validator(mode="before")
    @classmethod
    def _named_losses_only(cls, given: Any) -> Any:
        if isinstance(given, dict) and any(
            given.get(name) and not cls.model_fields[name].default for name in PAIR_LOSSES
        ):
            return {**dict.fromkeys(PAIR_LOSSES, 0.0), **given}
        return given

    @model_validator(mode="after")
    def _some_loss(self) -> PairLosses:
        if not any(getattr(self, name) for name in PAIR_LOSSES):
            raise ValueError("all weights are 0, so nothing would be trained; set at least one above 0")
        return self


def same_score(one: float, other: float) -> bool:
    """Whether two values of a metric are the same but for rounding: mteb keeps five places, the tables show four."""
    return abs(one - other) <= 1e-4
