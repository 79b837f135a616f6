"""A suite file: the data sets that a model is scored on. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from codiemb.config import Source, absolute, unique
from codiemb.errors import ConfigError
from codiemb.section import Name, Positive, Section
from codiemb.settings_file import kind, read_yaml, validate
from codiemb.suites import READY, suite_file


class DataSet(Source):
    """A data set of an evaluation suite.

    `train_path` (default: `path`) and `train_split` (default: train): the texts that the classifiers of a
    classification are fitted on, `samples_per_label` of each label at most. `mteb`: a task of mteb by its name, and
    which of its `subsets`.
    """

    train_path: Annotated[str, Field(min_length=1)] | None = None
    train_split: str | None = None
    samples_per_label: Positive = 8
    mteb: str | None = None
    subsets: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _training_texts_where_they_count(self) -> DataSet:
        for name in ("train_path", "train_split", "samples_per_label"):
            if self.task != "classification" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected none, because the task is {self.task}")
        if self.subsets and not self.mteb:
            raise ValueError("subsets: got a list, expected none, because this is no task of mteb")
        return self


class _MtebEntry(Section):
    """`- {mteb: STS17, subsets: [en-en]}` in a suite."""

    mteb: str
    name: Name | None = None
    subsets: list[str] | None = None


class _Suite(Section):
    entries: Annotated[list[DataSet], Field(min_length=1)]

    @field_validator("entries")
    @classmethod
    def _one_name_each(cls, value: list[DataSet]) -> list[DataSet]:
        return unique(value)


def load_suite(path: str | Path, data_root: str | Path | None = None) -> list[DataSet]:
    """The data sets of an evaluation suite: a YAML list, or one that comes with the library, by its name.

    Relative paths start from `data_root`, else from the file's folder. Each data set is a `DataSet`.

    Raises:
        ConfigError: as `load_config`; or an entry names a task that mteb does not have, or mteb is not installed.
    """
    path = suite_file(Path(path))
    if not path.exists() and not path.suffix:
        ready = ", ".join(sorted(file.stem for file in READY.glob("*.yaml")))
        raise ConfigError(f"suite {path}", got="nothing there", expected=f"a YAML file, or one of {ready}")
    content = read_yaml(path)
    if not isinstance(content, list):
        raise ConfigError(f"suite {path}", got=kind(content), expected="a list of data sets {name, task, path}")
    entries = [_mteb_entry(entry, f"suite {path}, entry {number}") for number, entry in enumerate(content)]
    suite = validate(_Suite, {"entries": entries}, f"suite {path}")
    root = Path(data_root).expanduser() if data_root else path.resolve().parent
    return [_absolute(entry, root) for entry in suite.entries]


def _mteb_entry(entry: Any, where: str) -> Any:
    """An entry that names a task of mteb, as a data set; any other as it is."""
    if not isinstance(entry, dict) or "mteb" not in entry:
        return entry
    from codiemb.evaluation.mteb_tasks import task_of

    given = validate(_MtebEntry, entry, where)
    name = given.name or given.mteb
    return {**entry, "name": name, "path": given.mteb, "task": task_of(given.mteb, given.subsets, where)}


def _absolute(data_set: DataSet, root: Path) -> DataSet:
    if data_set.mteb:
        return data_set
    if data_set.train_path:
        data_set.train_path = str((root / Path(data_set.train_path).expanduser()).resolve())
    return absolute(data_set, root)
