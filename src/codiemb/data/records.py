"""The one record type, and the rules that turn a raw row of any format into it.

A record is `(query, positives, negatives)` with their scores. For similarity the two sentences are the query and its
only positive, and the score is the label brought to [0, 1] by the source's declared `score_range`. A missing field
stays empty: no placeholder text is ever made up.
"""

from __future__ import annotations

import math
from collections import Counter
from hashlib import blake2b
from typing import Any, NamedTuple

from codiemb.config import Source
from codiemb.errors import DataError, short
from codiemb.tasks import TASKS

UNIFIED = {
    "query": ["query"],
    "positive": ["positives"],
    "negative": ["negatives"],
    "positive_score": ["positive_scores"],
    "negative_score": ["negative_scores"],
    "label": ["label"],
    "instruction": ["instruction"],
    "id": ["id"],
}


class Record(NamedTuple):
    """One training or evaluation item; `*_ids` are 64-bit text ids: equal ids mean equal texts (or labels)."""

    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float]
    negative_scores: list[float]
    instruction: str | None
    id: str | None
    query_id: int
    positive_ids: list[int]
    negative_ids: list[int]
    label_id: int | None = None

    def key(self) -> int:
        """Equal for records that say the same thing (their own `id` aside)."""
        parts = (self.query_id, self.positive_ids, self.negative_ids, self.positive_scores, self.negative_scores)
        return text_id(repr((*parts, self.instruction, self.label_id)))


def text_id(text: str) -> int:
    """A 64-bit id of a text, the same in every process and on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def columns_of(source: Source) -> dict[str, list[str]]:
    """Which columns of the raw rows hold each field of a record."""
    if source.columns is None:
        return UNIFIED
    mapping: dict[str, list[str]] = {
        field: [names] if isinstance(names, str) else list(names) for field, names in source.columns.items()
    }
    mapping["positive_score"] = mapping.pop("score", [])
    return {field: mapping.get(field, []) for field in UNIFIED}


class RowReader:
    """Turns raw rows of one source into records, and counts what it leaves out and why.

    Attributes:
        dropped: rows left out whole, by reason.
        texts_left_out: texts taken out of rows that stay, by reason.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.task = TASKS[source.task]
        self.columns = columns_of(source)
        self.dropped: Counter[str] = Counter()
        self.texts_left_out: Counter[str] = Counter()

    def record(self, row: Any, where: str) -> Record | None:
        """The record in `row`, or None if it is left out (counted in `dropped`).

        Raises:
            DataError: the row is not what the task needs; `where` names its file and line.
        """
        if not isinstance(row, dict):
            raise DataError(where, got=f"a {type(row).__name__}", expected="a JSON object")
        for column, wanted in self.source.where.items():
            if column not in row:
                raise DataError(f"{where}, where.{column}", got="no such column", expected=_listed(row))
            if str(row[column]).lower() != str(wanted).lower():  # CSV holds text only
                self.dropped["left out by `where`"] += 1
                return None
        query, instruction = self._query(row, where)
        positives = self._texts(row, "positive", where)
        negatives = self._texts(row, "negative", where)
        label = self._label(row, where) if self.task.labelled else None
        if label is not None and (positives or negatives):
            raise DataError(
                where,
                got="a label, and positives or negatives",
                expected="one or the other, because texts with the same label are the positives then",
                fix="name the columns to read under `columns`",
            )
        if self.task.shape == "pairs":
            positive_scores = [self._similarity_score(row, positives, negatives, where)]
            negative_scores: list[float] = []
        else:
            if not positives and label is None:
                raise DataError(
                    f"{where}, {_name(self.columns['positive'], 'positives')}",
                    got="none",
                    expected="at least one positive text"
                    + (", or a label" if self.task.labelled else "")
                    + f", because the task is {self.source.task}",
                    fix=f"the row has the columns {_listed(row)}",
                )
            positive_scores = self._scores(row, "positive_score", len(positives), where)
            negative_scores = self._scores(row, "negative_score", len(negatives), where)
            if self.source.task == "reranking" and min((*positive_scores, *negative_scores), default=0) < 0:
                raise DataError(
                    where, got="a score below 0", expected="graded relevance of 0 or more for each document"
                )
        return self.clean(
            query, positives, negatives, positive_scores, negative_scores, instruction, self._id(row), label
        )

    def clean(
        self,
        query: str,
        positives: list[str],
        negatives: list[str],
        positive_scores: list[float],
        negative_scores: list[float],
        instruction: str | None,
        id: str | None,
        label_id: int | None = None,
    ) -> Record | None:
        """A record without empty or repeated texts, or None if no query or neither positive nor label is left."""
        if not query.strip():
            self.dropped["empty query"] += 1
            return None
        seen: set[int] = set()
        positives, positive_scores, positive_ids = self._distinct(positives, positive_scores, seen, "positive")
        negatives, negative_scores, negative_ids = self._distinct(negatives, negative_scores, seen, "negative")
        if not positives and label_id is None:
            self.dropped["no positive with text"] += 1
            return None
        ids = (text_id(query), positive_ids, negative_ids)
        return Record(query, positives, negatives, positive_scores, negative_scores, instruction, id, *ids, label_id)

    def _distinct(
        self, texts: list[str], scores: list[float], seen: set[int], kind: str
    ) -> tuple[list[str], list[float], list[int]]:
        kept, kept_scores, ids = [], [], []
        for place, text in enumerate(texts):
            if not text.strip():
                self.texts_left_out[f"empty {kind}"] += 1
            elif (number := text_id(text)) in seen:
                self.texts_left_out[f"{kind} listed before in its row"] += 1
            else:
                seen.add(number)
                kept.append(text)
                ids.append(number)
                if scores:
                    kept_scores.append(scores[place])
        return kept, kept_scores, ids

    def _query(self, row: dict[str, Any], where: str) -> tuple[str, str | None]:
        column = (self.columns["query"] or ["query"])[0]
        value = row.get(column)
        if value is None:
            raise DataError(
                f"{where}, {column}",
                got="no query",
                expected="a text",
                fix=f"the row has the columns {_listed(row)}; name the right one under `columns`",
            )
        text, instruction = _text(value, f"{where}, {column}")
        for column in self.columns["instruction"]:
            given = row.get(column)
            if given is not None and not isinstance(given, str):
                raise DataError(f"{where}, {column}", got=short(given), expected="a text")
            instruction = given or instruction
        return text, instruction

    def _texts(self, row: dict[str, Any], field: str, where: str) -> list[str]:
        texts = []
        for column in self.columns[field]:
            value = row.get(column)
            if value is None:
                if self.source.columns is not None and column not in row:
                    raise DataError(f"{where}, {column}", got="no such column", expected=f"one of {_listed(row)}")
                continue
            values = value if isinstance(value, list) else [value]
            texts += [_text(item, f"{where}, {column}")[0] for item in values]
        return texts

    def _similarity_score(self, row: dict[str, Any], positives: list[str], negatives: list[str], where: str) -> float:
        if len(positives) != 1 or negatives:
            raise DataError(
                where,
                got=f"{len(positives)} positives and {len(negatives)} negatives",
                expected="one positive and its score, because the task is " + self.source.task,
                fix=f"the row has the columns {_listed(row)}; map them under `columns`",
            )
        scores = self._scores(row, "positive_score", 1, where)
        if not scores:
            column = _name(self.columns["positive_score"], "score")
            raise DataError(
                f"{where}, {column}", got="no score", expected=f"a number, because the task is {self.source.task}"
            )
        low, high = self.source.score_range
        if not low <= scores[0] <= high:
            raise DataError(
                f"{where}, {_name(self.columns['positive_score'], 'score')}",
                got=scores[0],
                expected=f"a score from {low:g} to {high:g}",
                fix="set this source's `score_range` to the scale of its labels",
            )
        return (scores[0] - low) / (high - low)

    def _scores(self, row: dict[str, Any], field: str, count: int, where: str) -> list[float]:
        scores: list[float] = []
        for column in self.columns[field]:
            value = row.get(column)
            if value is not None:
                values = value if isinstance(value, list) else [value]
                if self.source.task == "pair_classification":
                    values = [int(item) if isinstance(item, bool) else item for item in values]
                scores += [_number(item, f"{where}, {column}") for item in values]
        if scores and len(scores) != count:
            column = _name(self.columns[field], field)
            raise DataError(f"{where}, {column}", got=f"{len(scores)} scores", expected=f"{count}, one for each text")
        return scores

    def _label(self, row: dict[str, Any], where: str) -> int | None:
        for column in self.columns["label"]:
            value = row.get(column)
            if isinstance(value, str | int) and str(value).strip():
                return text_id(f"label {value}")
            if value is not None:
                raise DataError(f"{where}, {column}", got=short(value), expected="a label: a text or a whole number")
            if self.source.columns is not None and column not in row:
                raise DataError(f"{where}, {column}", got="no such column", expected=f"one of {_listed(row)}")
        return None

    def _id(self, row: dict[str, Any]) -> str | None:
        values = [row.get(column) for column in self.columns["id"]]
        return str(values[0]) if values and values[0] is not None else None


def _text(value: Any, where: str) -> tuple[str, str | None]:
    """A text and its instruction: plain, or the triple [task instruction, instruction of this text, text]."""
    if isinstance(value, str):
        return value, None
    if _is_triple(value):
        return value[1] + value[2], value[0] or None
    raise DataError(where, got=short(value), expected='a text, or ["instruction", "", "text"]')


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(part, str) for part in value)


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise DataError(where, got=short(value), expected="a finite number")


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(str(name)[:60] for name in list(row)[:12]) or "none"


def _name(columns: list[str], otherwise: str) -> str:
    return columns[0] if columns else otherwise
