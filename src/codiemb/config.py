"""Every setting of a run, typed. Unknown keys are refused with the nearest known one; all faults are told at once.

This module imports no torch, so that mistakes in a config are told at once. The names in `train` are those
of Hugging Face's `TrainingArguments`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, create_model, field_validator, model_validator

from codiemb.consistency import faults_across
from codiemb.errors import ConfigError
from codiemb.section import ROLES, Fraction, Name, Positive, Role, Section, Temperature, Weight
from codiemb.settings_file import apply_override, kind, read_yaml, validate
from codiemb.suites import suite_file
from codiemb.tasks import TASKS

__all__ = ["ROLES", "Config", "Role", "Source", "dump_config", "load_config"]

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


class MaxLength(Section):
    """Tokens kept per text, special tokens and prompt included; null: as the base model has it."""

    query: Positive | None = None
    document: Positive | None = None
    similarity: Positive | None = None


class Prompts(Section):
    """Text put before every input of a role; null: as the base model has it."""

    query: str | None = None
    document: str | None = None
    similarity: str | None = None


class Dropout(Section):
    """Dropout while training; null: as the base model has it."""

    hidden: Fraction | None = None
    attention: Fraction | None = 0.0


class Lora(Section):
    """Train low-rank adapters instead of the weights they stand beside (Hu et al., 2022).

    `target_modules`: names of linear modules, `all-linear`, or null for what peft takes for this architecture.
    """

    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] | None = None


class Head(Section):
    """Append a linear layer of `dim` outputs that starts as the identity."""

    dim: Positive


class ModelSection(Section):
    base: str
    max_length: MaxLength = MaxLength()
    prompts: Prompts = Prompts()
    dropout: Dropout = Dropout()
    lora: Lora | None = None
    head: Head | None = None
    freeze_backbone: bool = False


class Source(Section):
    """One collection of texts: a training source, or a data set of an evaluation suite."""

    name: Name
    task: TaskName
    path: Annotated[str, Field(min_length=1)]
    split: str | None = None
    columns: (
        dict[Literal["query", "positive", "negative", "score", "label", "instruction", "id"], str | list[str]] | None
    ) = None
    score_range: tuple[float, float] = (0.0, 1.0)
    where: dict[str, Any] = Field(default_factory=dict)

    @field_validator("columns")
    @classmethod
    def _one_column(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for field, names in (value or {}).items():
            if isinstance(names, list) and field not in ("positive", "negative"):
                raise ValueError(f"expected one column for {field}; only positive and negative take a list")
        return value

    @model_validator(mode="after")
    def _labels_where_they_count(self) -> Source:
        if self.columns and "label" in self.columns and not TASKS[self.task].labelled:
            labelled = ", ".join(name for name, task in TASKS.items() if task.labelled)
            raise ValueError(
                f"columns.label: got a column, expected none, because only {labelled} take labels; "
                "a pair's label goes under `score`"
            )
        return self

    @field_validator("score_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("expected [lowest, highest] with lowest < highest")
        return value


_batches: dict[str, Any] = {name: (task.batches, task.batches()) for name, task in TASKS.items()}
_losses: dict[str, Any] = {name: (task.losses, task.losses()) for name, task in TASKS.items()}
_TaskBatches: Any = create_model("_TaskBatches", __base__=Section, **_batches)
_TaskLosses: Any = create_model("_TaskLosses", __base__=Section, **_losses)


class Batching(_TaskBatches):
    """How batches of one source each are put in order, and under the name of each task what a batch holds."""

    schedule: Literal["proportional", "balanced", "round_robin", "temperature", "weights", "staged", "paired"] = (
        "proportional"
    )
    drop_last: bool = False
    temperature: Temperature = 2.0
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    stages: list[list[str]] = Field(default=[["retrieval"], ["similarity"]])


class Matryoshka(Section):
    """Train prefixes of the embedding too, each normalised anew (Kusupati et al., 2022)."""

    dims: Annotated[list[Positive], Field(min_length=1)]
    weights: list[Weight] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Matryoshka:
        if len(set(self.dims)) != len(self.dims):
            raise ValueError("expected each dim once")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(f"expected one weight for each of the {len(self.dims)} dims")
        if self.weights is not None and not any(self.weights):
            raise ValueError("expected a weight above 0")
        return self


class Losses(_TaskLosses):
    """Under the name of each task its losses; and what holds for all.

    `emphasis` is the IR:STS knob: 0 is pairs alone, 1 lists alone, 0.5 leaves both as they are. `balance: magnitude`
    divides each part by the running mean of its size, so that weights compare parts of like size.
    """

    emphasis: Fraction = 0.5
    balance: Literal["none", "magnitude"] = "none"
    matryoshka: Matryoshka | None = None


class Train(Section):
    """Names and meaning of Hugging Face's `TrainingArguments`; ours are `memory_budget`, `rank_check_steps` and
    `conflict_every`."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-5
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_steps: Annotated[int, Field(ge=-1)] = -1
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    lr_scheduler_type: str = "linear"
    weight_decay: Weight = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    optim: str = "adamw_torch_fused"
    max_grad_norm: Weight = 1.0
    bf16: Literal["auto"] | bool = "auto"
    memory_budget: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    rank_check_steps: Positive = 50
    conflict_every: Positive | None = None
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    logging_steps: Positive = 10
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    save_steps: Positive = 200
    save_total_limit: Positive | None = None
    ddp_timeout: Positive = 1800
    fsdp: bool = False
    fsdp_config: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | str | None = None
    report_to: list[str] | str = "none"
    run_name: str | None = None

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("expected at least 1, or -1 to train num_train_epochs")
        return value

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @field_validator("fsdp_config")
    @classmethod
    def _version_2_and_whole_checkpoints(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, only in (("version", 2), ("state_dict_type", "FULL_STATE_DICT")):
            for key in (name, f"fsdp_{name}"):
                if value and value.get(key, only) != only:
                    raise ValueError(f"expected {key}: {only}, because a checkpoint is a whole model folder")
        return value

    @model_validator(mode="after")
    def _one_way_to_shard(self) -> Train:
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp: got true with deepspeed, expected one of them")
        if self.fsdp_config and not self.fsdp:
            raise ValueError("fsdp_config: got settings without fsdp, expected fsdp: true")
        return self

    @field_validator("gradient_accumulation_steps")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "expected 1: batching.<task>.batch_size already counts the rows of one optimizer step over all "
                "devices, and accumulation would only hide negatives; raise batch_size instead"
            )
        return value


class Evaluation(Section):
    suite: str | None = None
    every_steps: Positive | None = None

    @model_validator(mode="after")
    def _steps_of_a_suite(self) -> Evaluation:
        if self.every_steps and self.suite is None:
            raise ValueError(f"every_steps: got {self.every_steps}, expected none without a suite")
        return self


Method = Literal[
    "delta", "uniform", "weighted", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "sce", "model_stock"
]
RunMethod = Literal[Method, "ema"]
Granularity = Literal["model", "tensor", "row", "element"]
Norm = Literal["l1", "l2", "mean_square"]
Weighting = Literal["proportional", "inverse", "softmax"]


class Fusion(Section):
    """What the checkpoints of the run are merged into when it ends; the names are those of `codiemb.fuse`.

    With `suite`, a dev suite, only the best merge on it is kept, if it beats the trained model. `ema` is the mean of
    the weights over all steps.
    """

    checkpoints: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    method: RunMethod | Annotated[list[RunMethod], Field(min_length=1)] = "delta"
    granularity: Granularity = "tensor"
    norm: Norm = "l2"
    weighting: Weighting = "proportional"
    temperature: Temperature = 1.0
    scale: Weight = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    suite: str | None = None

    @property
    def methods(self) -> list[RunMethod]:
        return [self.method] if isinstance(self.method, str) else list(dict.fromkeys(self.method))

    @field_validator("method")
    @classmethod
    def _without_weights(cls, value: str | list[str]) -> str | list[str]:
        if "weighted" in ([value] if isinstance(value, str) else value):
            raise ValueError("expected another method, because a run has no weights to give: use codiemb fuse")
        return value

    @model_validator(mode="after")
    def _settings_of_these_methods(self) -> Fusion:
        methods = set(self.methods)
        users = {
            **{name: {"delta"} for name in ("granularity", "norm", "weighting", "temperature")},
            "scale": {"delta", "uniform"},
            "ema_decay": {"ema"},
            "checkpoints": {*get_args(Method)},
        }
        for name, used_by in users.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not methods & used_by:
                others = " or ".join(sorted(used_by)) if len(used_by) < 3 else "that merges checkpoints"
                raise ValueError(f"{name}: got {value}, expected none without a method {others}")
        if self.temperature != 1 and self.weighting != "softmax":
            raise ValueError(f"temperature: got {self.temperature:g}, expected none, because it is of softmax")
        if "slerp" in methods and self.checkpoints != 2:
            raise ValueError(f"checkpoints: got {self.checkpoints}, expected 2, because slerp merges two")
        return self


class Config(Section):
    data_root: str | None = None
    output_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    model: ModelSection
    data: Annotated[list[Source], Field(min_length=1)]
    batching: Batching = Batching()
    losses: Losses = Losses()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    fusion: Fusion | None = None

    @field_validator("data")
    @classmethod
    def _one_name_each(cls, value: list[Source]) -> list[Source]:
        return unique(value)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if faults := faults_across(self):
            raise ValueError("; ".join(faults))
        return self


AnySource = TypeVar("AnySource", bound=Source)


def unique(sources: list[AnySource]) -> list[AnySource]:
    """The sources, or a ValueError that tells a name that two of them have."""
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"got the name {twice[0]!r} twice, expected one name for each")
    return sources


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in `path` with `section.key=value` overrides applied, validated and with absolute paths.

    A value is read as YAML (`train.max_steps=20`, `model.prompts.query="query: "`, `data.0.split=train`). Source
    paths come out absolute: resolved against `data_root`, which is itself relative to the config file's folder in
    the file and to the working directory in an override.

    Raises:
        ConfigError: a missing or unreadable file, a YAML error (with its line), unknown keys, wrong types; all faults
            of the content at once.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}", got=kind(content), expected="a mapping of sections (model, data, train)")
    for override in overrides:
        apply_override(content, override)
    folder = path.resolve().parent
    if any(override.startswith("data_root=") for override in overrides):
        content["data_root"] = str(Path(str(content["data_root"])).expanduser().resolve())
    config = validate(Config, content, f"config {path}")
    root = folder / Path(config.data_root or ".").expanduser()
    config.data = [absolute(source, root) for source in config.data]
    for section in (config.evaluation, config.fusion):
        if section and section.suite:
            section.suite = str(suite_file(Path(section.suite), folder).resolve())
    config.output_dir = str(Path(config.output_dir).expanduser())
    config.data_root = str(root.resolve()) if config.data_root else None
    if _is_local(config.model.base, folder):
        config.model.base = str((folder / config.model.base).resolve())
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads again."""
    return yaml.safe_dump(used_settings(config), sort_keys=False, allow_unicode=True, width=120)


def used_settings(config: Config) -> dict[str, Any]:
    """Every setting by section; tasks without a source are left out."""
    unused = {*TASKS} - {source.task for source in config.data}
    return config.model_dump(mode="json", exclude={"batching": unused, "losses": unused})


def absolute(source: AnySource, root: Path) -> AnySource:
    """The source with a path that holds from anywhere; a hub id stays as it is."""
    local = root / Path(source.path).expanduser()
    looks_like_hub_id = source.path.count("/") == 1 and not Path(source.path).suffix and not source.path.startswith(".")
    if looks_like_hub_id and not local.exists() and not local.parent.exists():
        return source
    return source.model_copy(update={"path": str(local.resolve())})


def _is_local(base: str, folder: Path) -> bool:
    return not base.startswith("bundled:") and not Path(base).is_absolute() and (folder / base).is_dir()
