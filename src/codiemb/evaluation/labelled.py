"""Texts with a label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codiemb.config import Source
from codiemb.data.readers import is_beir, read_rows
from codiemb.data.records import RowReader
from codiemb.errors import DataError
from codiemb.evaluation.scores import digest
from codiemb.suites.suite import DataSet


@dataclass(frozen=True)
class Labelled:
    """Every text of a file and its label, in the file's order, duplicates included."""

    texts: list[str]
    labels: list[str]
    instructions: list[str | None]
    left_out: dict[str, int]

    def digest(self) -> str:
        return digest([self.texts, self.labels, self.instructions, self.left_out])


def load(source: Source) -> Labelled:
    """
    Raises:
        DataError: as the readers; or rows without a label, or one label only.
    """
    if is_beir(Path(source.path)):
        raise DataError(
            f"source {source.name!r}, {source.path}", got="a BEIR folder", expected="a file of texts with labels"
        )
    reader = RowReader(source)
    column = (reader.columns["label"] or ["label"])[0]
    data = Labelled([], [], [], reader.dropped)
    for where, row in read_rows(source):
        record = reader.record(row, where)
        if record is None:
            continue
        if record.label_id is None:
            raise DataError(
                f"{where}, {column}", got="no label", expected=f"a label, because the task is {source.task}"
            )
        data.texts.append(record.query)
        data.labels.append(str(row[column]))
        data.instructions.append(record.instruction)
    if len(set(data.labels)) < 2:
        raise DataError(
            f"source {source.name!r}, {source.path}",
            got=f"{len(data.texts)} texts of {len(set(data.labels))} label(s)",
            expected="at least two labels",
        )
    return data


def training_source(source: DataSet) -> Source:
    """Where the texts lie that a classifier is fitted on."""
    split = source.train_split or (None if source.train_path else "train")
    return source.model_copy(update={"path": source.train_path or source.path, "split": split})
