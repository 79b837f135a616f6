"""What the report needs of each file of a run. The names are those of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Bounded = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]  # differences are finite too


class _Content(BaseModel):
    """What the report needs of a file; whatever else it holds is left alone."""

    model_config = ConfigDict(extra="ignore")


class Step(BaseModel):
    """A line of metrics.jsonl; `loss/<part>` and `seconds/<phase>` are among the extra fields."""

    model_config = ConfigDict(extra="allow")

    step: Count
    source: str
    task: str
    loss: float | None
    rows: Count = 0
    tokens: Count = 0
    padded_tokens: Count = 0
    candidates_per_query: float | None = None
    seconds: Bounded = 0.0
    peak_memory_bytes: Count = 0
    learning_rate: float | None = None

    def parts(self, kind: str) -> list[str]:
        """The names of the fields `<kind>/<name>`."""
        return [key.removeprefix(f"{kind}/") for key in self.model_extra or {} if key.startswith(f"{kind}/")]

    def part(self, kind: str, name: str) -> float | None:
        """The field `<kind>/<name>`, None if it is no number."""
        value = (self.model_extra or {}).get(f"{kind}/{name}")
        return value if isinstance(value, int | float) else None


class Histogram(_Content):
    width: Annotated[Count, Field(ge=1)]
    counts: list[Count] = Field(min_length=1)


class Tokens(_Content):
    p50: int
    p90: int
    p99: int
    max: int
    max_length: int | None = None
    truncated: float = 0.0
    sampled_texts: int = 0
    histogram: Histogram | None = None


class ScoreCounts(_Content):
    range: tuple[Bounded, Bounded]
    lowest: float
    highest: float
    histogram: list[Count] = Field(min_length=1)


class SourceFacts(_Content):
    task: str
    rows: int
    rows_used: int
    dropped: dict[str, int] = {}
    texts_left_out: dict[str, int] = {}
    batch_size: int | None = None
    batches: int
    passes: float
    share_of_steps: float
    tokens: dict[str, Tokens] = {}
    scores: ScoreCounts | None = None


class Overlap(_Content):
    data_set: str
    source: str
    texts: int
    shared: int


class PlanFacts(_Content):
    schedule: str
    steps_per_epoch: int
    steps: int
    longest_run: int
    sources: dict[str, SourceFacts]
    overlap: list[Overlap] = []
    warnings: list[str] = []


class Evaluation(_Content):
    """`<dataset>.json`. The first of `metrics` is the headline of its task."""

    dataset: str
    task: str
    metrics: dict[str, Bounded]
    n: int
    items: str | None = None
    prompt: dict[str, str | None] = {}
    max_length: dict[str, int | None] = {}
    seconds: float | None = None


class Difference(_Content):
    """A line of comparison.json: a data set, or a mean."""

    name: str = ""
    task: str
    metric: str = ""
    n: int | None = None
    reference: Bounded
    model: Bounded
    difference: Bounded
    interval: tuple[Bounded, Bounded] | None = None
    p_holm: float | None = None
    verdict: str


class ModelComparison(_Content):
    model: str
    data_sets: list[Difference]
    means: list[Difference] = []


class Comparison(_Content):
    reference: str
    comparisons: list[ModelComparison]
    settings: dict[str, Any] = {}

    def of(self, model: str) -> ModelComparison | None:
        """The comparison of a model with `base`, both by the last part of their names."""
        if Path(self.reference).name != "base":
            return None
        return next((found for found in self.comparisons if Path(found.model).name == model), None)


class GeometryOfModel(_Content):
    model: str
    layers: list[dict[str, Any]] = []
    pooled: dict[str, Any] = {}


class Likeness(_Content):
    """Linear CKA of a model's layers, and of its pooled sentences, with those of the reference."""

    model: str
    layers: list[dict[str, Any]] = []
    pooled: float | None = None


class Cka(_Content):
    reference: str = ""
    models: list[Likeness] = []


class Geometry(_Content):
    texts: int | None = None
    models: list[GeometryOfModel]
    cka: Cka = Cka()


class Conflict(_Content):
    step: Count
    cosine: dict[str, float | None] = {}
    gradient_norm: dict[str, float | None] = {}


class Trial(_Content):
    checkpoints: list[str]
    settings: dict[str, Any] = {}
    scores: dict[str, Bounded]


class Fusion(_Content):
    method: str
    parents: list[dict[str, Any]] = []
    weights: Any = None
    scale: float | None = None
    delta_length: float | None = None
    trials: list[Trial] = []


class Pareto(_Content):
    tasks: list[str]
    points: list[Trial]
    front: list[int]
    knee: int
