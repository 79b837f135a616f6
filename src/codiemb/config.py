"""Every setting of a run, typed. Unknown keys are refused with the nearest known one; all faults are told at once.

This module imports no torch, so that `codiemb check` and `codiemb --help` start fast. The names in `train` are those
of Hugging Face's `TrainingArguments`.
"""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from codiemb.errors import ConfigError, short

Task = Literal["retrieval", "similarity"]
Role = Literal["query", "document", "similarity"]
ROLES: tuple[Role, ...] = get_args(Role)

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True)


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


class ModelSection(Section):
    base: str
    max_length: MaxLength = MaxLength()
    prompts: Prompts = Prompts()
    dropout: Dropout = Dropout()


class Source(Section):
    """One collection of texts: a training source, or a data set of an evaluation suite."""

    name: Name
    task: Task
    path: Annotated[str, Field(min_length=1)]
    split: str | None = None
    columns: dict[Literal["query", "positive", "negative", "score", "instruction", "id"], str | list[str]] | None = None
    score_range: tuple[float, float] = (0.0, 1.0)
    where: dict[str, Any] = {}

    @field_validator("columns")
    @classmethod
    def _one_column(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for field, names in (value or {}).items():
            if isinstance(names, list) and field not in ("positive", "negative"):
                raise ValueError(f"expected one column for {field}; only positive and negative take a list")
        return value

    @field_validator("score_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("expected [lowest, highest] with lowest < highest")
        return value


class RetrievalBatches(Section):
    batch_size: Positive = 32
    positives: Positive = 2
    negatives: Annotated[int, Field(ge=0)] = 4


class SimilarityBatches(Section):
    batch_size: Positive = 32

    @field_validator("batch_size")
    @classmethod
    def _a_pair_of_pairs(cls, value: int) -> int:
        if value < 2:
            raise ValueError("expected at least 2, because a rank loss compares pairs with each other; raise it")
        return value


class Batching(Section):
    """How batches of one source each are put in order. `batch_size` counts rows over all ranks."""

    schedule: Literal["proportional", "balanced", "round_robin", "temperature", "weights", "staged", "paired"] = (
        "proportional"
    )
    drop_last: bool = False
    temperature: Temperature = 2.0
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    stages: list[list[str]] = [["retrieval"], ["similarity"]]
    retrieval: RetrievalBatches = RetrievalBatches()
    similarity: SimilarityBatches = SimilarityBatches()


class RetrievalLoss(Section):
    type: Literal["info_nce"] = "info_nce"
    weight: Weight = 1.0
    temperature: Temperature = 0.02
    candidates: Literal["all", "same_slot"] = "all"
    cross_device: Literal[True] = True


class SimilarityLoss(Section):
    """Weights of the four parts, and their constants."""

    weight: Weight = 1.0
    pearson: Weight = 2.0
    rank_kl: Weight = 5.0
    pro: Weight = 0.5
    mid_nce: Weight = 1.0
    temperature: Temperature = 0.05
    reduction: Literal["batchmean", "sum"] = "batchmean"
    mid_nce_temperature: Temperature = 0.02
    mid_nce_threshold: Fraction = 1.0

    @model_validator(mode="after")
    def _some_part(self) -> SimilarityLoss:
        if not any((self.pearson, self.rank_kl, self.pro, self.mid_nce)):
            raise ValueError("all four weights are 0, so nothing would be trained; set at least one above 0")
        return self


class Losses(Section):
    retrieval: RetrievalLoss = RetrievalLoss()
    similarity: SimilarityLoss = SimilarityLoss()


class Train(Section):
    """Names and meaning of Hugging Face's `TrainingArguments`."""

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
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    logging_steps: Positive = 10
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    save_steps: Positive = 200
    save_total_limit: Positive | None = None
    report_to: list[str] | str = "none"
    run_name: str | None = None

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false

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

    @field_validator("data")
    @classmethod
    def _one_name_each(cls, value: list[Source]) -> list[Source]:
        return _unique(value)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        faults = []
        names = [source.name for source in self.data]
        known = {*names, *get_args(Task)}
        if self.batching.schedule == "weights":
            if missing := [name for name in names if name not in self.batching.weights]:
                faults.append(f"batching.weights: got none for {missing[0]!r}, expected a weight for every source")
            faults += [
                f"batching.weights.{name}: got an unknown source, expected one of {', '.join(names)}"
                f"{_nearest(name, names)}"
                for name in self.batching.weights
                if name not in names
            ]
        if self.batching.schedule == "staged":
            staged = [entry for stage in self.batching.stages for entry in stage]
            faults += [
                f"batching.stages: got {entry!r}, expected names of sources or tasks{_nearest(entry, known)}"
                for entry in staged
                if entry not in known
            ]
            faults += [
                f"batching.stages: got no stage with source {source.name!r}, expected every source in one"
                for source in self.data
                if source.name not in staged and source.task not in staged
            ]
        if faults:
            raise ValueError("; ".join(faults))
        return self


class _Suite(Section):
    entries: Annotated[list[Source], Field(min_length=1)]

    @field_validator("entries")
    @classmethod
    def _one_name_each(cls, value: list[Source]) -> list[Source]:
        return _unique(value)


def _unique(sources: list[Source]) -> list[Source]:
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
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}", got=_kind(content), expected="a mapping of sections (model, data, train)")
    for override in overrides:
        _apply_override(content, override)
    folder = path.resolve().parent
    if any(override.startswith("data_root=") for override in overrides):
        content["data_root"] = str(Path(str(content["data_root"])).expanduser().resolve())
    config = _validate(Config, content, f"config {path}")
    root = folder / Path(config.data_root or ".").expanduser()
    config.data = [_absolute(source, root) for source in config.data]
    if config.evaluation.suite:
        config.evaluation.suite = str((folder / Path(config.evaluation.suite).expanduser()).resolve())
    config.output_dir = str(Path(config.output_dir).expanduser())
    config.data_root = str(root.resolve()) if config.data_root else None
    if _is_local(config.model.base, folder):
        config.model.base = str((folder / config.model.base).resolve())
    return config


def load_suite(path: str | Path, data_root: str | Path | None = None) -> list[Source]:
    """The data sets of an evaluation suite (a YAML list); paths start from `data_root`, else from the file's folder.

    Raises:
        ConfigError: as `load_config`.
    """
    path = Path(path)
    content = _read_yaml(path)
    if not isinstance(content, list):
        raise ConfigError(f"suite {path}", got=_kind(content), expected="a list of data sets {name, task, path}")
    suite = _validate(_Suite, {"entries": content}, f"suite {path}")
    root = Path(data_root).expanduser() if data_root else path.resolve().parent
    return [_absolute(entry, root) for entry in suite.entries]


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _absolute(source: Source, root: Path) -> Source:
    local = root / Path(source.path).expanduser()
    looks_like_hub_id = source.path.count("/") == 1 and not Path(source.path).suffix and not source.path.startswith(".")
    if looks_like_hub_id and not local.exists() and not local.parent.exists():
        return source
    return source.model_copy(update={"path": str(local.resolve())})


def _is_local(base: str, folder: Path) -> bool:
    return not base.startswith("bundled:") and not Path(base).is_absolute() and (folder / base).is_dir()


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"file {path}", got="nothing there", expected="a YAML file", fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path}", got=error, expected="a readable UTF-8 YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown line"
        raise ConfigError(f"file {path} at {where}", got=error.problem, expected="valid YAML") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"file {path}", got=error, expected="valid YAML") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would keep the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}", got="no '='", expected="section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}", got="a value that is not YAML", fix="quote it") from None
    if isinstance(value, str) and _is_float(value):
        value = float(value)  # YAML 1.1 reads 1e-5 as text
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        if isinstance(here, dict) and here.get(parent) is None:
            here[parent] = {}
        here = _step(here, parent, override)
    if isinstance(here, list):
        _step(here, last, override)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise ConfigError(f"override {override!r}", got=f"{_kind(here)} above {last!r}", expected="a section")


def _step(here: Any, key: str, override: str) -> Any:
    if isinstance(here, list):
        if not (key.isdigit() and int(key) < len(here)):
            raise ConfigError(f"override {override!r}", got=key, expected=f"a place from 0 to {len(here) - 1}")
        return here[int(key)]
    if isinstance(here, dict):
        return here[key]
    raise ConfigError(f"override {override!r}", got=f"{_kind(here)} above {key!r}", expected="a section")


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _validate(model: type[Any], content: Any, where: str) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # The branches of a union each report their own fault of the same value: they make one clause.
        faults: dict[str, list[str]] = {}
        for fault in error.errors():
            got, expected = _describe(model, fault)
            faults.setdefault(got, []).append(expected)
        clauses = (
            f"{got}, expected {' or '.join(dict.fromkeys(expected))}" if any(expected) else got
            for got, expected in faults.items()
        )
        raise ConfigError(f"{where}: {'; '.join(clauses)}") from None


def _describe(model: type[BaseModel], fault: Any) -> tuple[str, str]:
    """One pydantic fault as (`section.key: got ...`, what was expected)."""
    place = [part for part in fault["loc"] if not (isinstance(part, str) and part in _TYPE_NAMES)]
    if place and place[0] == "entries":
        place = place[1:]
    where = ".".join(str(part) for part in place)
    expected = fault["msg"].replace("Input should be ", "").split(", unable")[0]
    got = short(fault["input"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        got, expected = "an unknown key", f"one of {', '.join(known)}{_nearest(str(fault['loc'][-1]), known)}"
    elif place[-1:] == ["[key]"]:
        where, got = ".".join(str(part) for part in place[:-1]), "an unknown key"
    elif fault["type"] == "missing":
        got, expected = "nothing", "a value"
    elif fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        if not message.startswith("expected "):  # a whole sentence of ours
            return f"{where}: {message}" if where else message, ""
        expected = message.removeprefix("expected ")
    return f"{where}: got {got}" if where else f"got {got}", expected


_TYPE_NAMES = {"int", "float", "str", "bool", "literal['auto']", "list[str]", "constrained-str", "constrained-int"}


def _fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    here: Any = model
    for part in place:
        if isinstance(part, int) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        here = _section_in(here.model_fields[part].annotation)
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _section_in(annotation: Any) -> Any:
    if get_origin(annotation) in (list, Annotated, Union, types.UnionType):
        for argument in get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
