"""Single queries and pairs: where the training helped most, where it hurt most, and what is still worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from codiemb.errors import EvaluationError
from codiemb.figures.markup import Markup, element, name, number, points, section, signed, table
from codiemb.report.facts import Evaluation
from codiemb.report.run_folder import Run
from codiemb.report.scores import headline, metric_name

SHOWN = 3  # of each kind and data set
MOST = 24  # of each kind in all
LENGTH = 200  # characters of a text
QUERY = ("query_id", "query", "retrieved")
PAIR = ("text1", "text2", "cosine", "label")
TEXTS = ("query_id", "query", "text1", "text2")
KINDS = ("Most improved", "Most worsened", "Worst after training")


@dataclass(frozen=True)
class Item:
    """A query or pair in both evaluations, with what is compared: higher is better."""

    before: float
    after: float
    rows: tuple[dict[str, Any], dict[str, Any]]


def examples_section(run: Run) -> Markup | None:
    """By data set the extremes; None where no evaluation has kept its texts."""
    base, trained = run.evaluations.get("base", {}), run.evaluations.get("model", {})
    found = []
    for data_set in base:
        if data_set in trained:
            both = [
                _table(run.folder / "eval" / model, side[data_set])
                for model, side in (("base", base), ("model", trained))
            ]
            if None not in both:
                found.append((trained[data_set], both))
    if not found:
        return None
    shown = max(1, min(SHOWN, MOST // len(found)))
    blocks = [block for evaluation, both in found if (block := _data_set(evaluation, both, shown)) is not None]
    if not blocks:
        return None
    return section(
        "examples", "Examples",
        "The queries and pairs that changed most, and the worst that are left. A tick marks a relevant result.",
        *blocks,
    )  # fmt: skip


def _table(folder: Path, evaluation: Evaluation) -> pa.Table | None:
    """Per-item scores, None if there are none or their texts were not kept.

    Raises:
        EvaluationError: the file cannot be read.
    """
    if not evaluation.items:
        return None
    path = folder / Path(evaluation.items).name
    if not path.exists():
        return None
    try:
        file = pq.ParquetFile(path.absolute())  # pyarrow takes `a:b` for an address
        columns = {*file.schema_arrow.names}
        wanted = next((kind for kind in (QUERY, PAIR) if columns >= {*kind}), None)
        if wanted is None:
            return None
        keep = [column for column in (*wanted, headline(evaluation)) if column in columns]
        found = file.read(columns=keep)
        found.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(
            f"file {path}", got=error, expected="Parquet", fix="evaluate again, or remove the file"
        ) from None
    for column in keep:
        if fault := _fault(found[column], column):
            raise EvaluationError(
                f"file {path}, column {column}", got=fault[0], expected=fault[1],
                fix="evaluate again, or remove the file",
            )  # fmt: skip
    return found


def _fault(values: pa.ChunkedArray, column: str) -> tuple[str, str] | None:
    """What a column holds, and what it should, if that is something else."""
    if column == "retrieved":
        return None if _is_listing(values.type) else (str(values.type), "lists of results with score, gain and text")
    if column in TEXTS:
        return (str(values.type), "texts") if pa.types.is_nested(values.type) else None
    if not _is_number(values.type):
        return str(values.type), "numbers"
    whole = values.null_count == 0 and bool(np.isfinite(values.to_numpy()).all())
    return None if whole else ("null or nan", "finite numbers")


def _is_listing(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return all(
        pa.types.is_null(fields[name]) or _is_number(fields[name]) for name in ("score", "gain") if name in fields
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _data_set(evaluation: Evaluation, both: Sequence[pa.Table], shown: int) -> Markup | None:
    queries = {*QUERY} <= {*both[1].column_names}
    if {*both[0].column_names} != {*both[1].column_names}:
        return None
    items = _queries(both, headline(evaluation)) if queries else _pairs(both)
    if not items:
        return None
    show = _query if queries else _pair
    worst = np.array([item.after for item in items])
    gains = np.round(worst - [item.before for item in items], 9)  # equal gains stay in their order
    chosen = [
        [place for place in np.argsort(-gains, kind="stable")[:shown] if gains[place] > 0],
        [place for place in np.argsort(gains, kind="stable")[:shown] if gains[place] < 0],
        [*np.argsort(worst, kind="stable")[:shown]],
    ]
    groups = []
    for kind, places in zip(KINDS, chosen, strict=True):
        if places:
            articles = [show(items[place], headline(evaluation)) for place in places]
            is_open = "" if kind == KINDS[0] else None
            groups.append(element("details", element("summary", kind), *articles, class_="group", open=is_open))
    moved = (
        f"{int((gains > 0).sum()):,} better, {int((gains < 0).sum()):,} worse, {int((gains == 0).sum()):,} as before"
    )
    return element("div", element("h3", name(evaluation.dataset), element("small", moved)), *groups, class_="examples")


def _queries(both: Sequence[pa.Table], metric: str) -> list[Item]:
    if metric not in both[1].column_names:
        return []
    scores = [dict(zip(one["query_id"].to_pylist(), one[metric].to_pylist(), strict=True)) for one in both]
    places = [{key: place for place, key in enumerate(one["query_id"].to_pylist())} for one in both]
    return [
        Item(scores[0][key], after, (_Row(both[0], places[0][key]), _Row(both[1], places[1][key])))
        for key, after in scores[1].items()
        if key in scores[0]
    ]


class _Row(dict[str, Any]):
    """A row of a table, read when it is shown."""

    def __init__(self, of: pa.Table, place: int) -> None:
        super().__init__()
        self.of, self.place = of, place

    def __missing__(self, column: str) -> Any:
        return self.of[column][self.place].as_py()


def _pairs(both: Sequence[pa.Table]) -> list[Item]:
    """By how near the rank of a pair's cosine is to that of its label: 1 in its place, 0 at the other end."""
    if len(both[0]) != len(both[1]) or len(both[0]) < 2:
        return []
    near = [1 - np.abs(_rank(one["cosine"]) - _rank(one["label"])) / (len(one) - 1) for one in both]
    return [
        Item(float(before), float(after), (_Row(both[0], place), _Row(both[1], place)))
        for place, (before, after) in enumerate(zip(*near, strict=True))
    ]


def _rank(column: pa.ChunkedArray) -> np.ndarray:
    """From 0, ties averaged."""
    _, places, counts = np.unique(column.to_numpy(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LENGTH else text[: LENGTH - 1] + "…"


def _query(item: Item, metric: str) -> Markup:
    before, after = item.rows
    gain = element("span", metric_name(metric), " ", points(item.before), " → ", points(item.after), class_="gain")
    return element(
        "article",
        element("p", element("b", name(_cut(after["query"]))), " ", gain, class_="query"),
        element("div", _results("before", before["retrieved"]), _results("after", after["retrieved"]), class_="sides"),
    )


def _results(when: str, retrieved: list[dict[str, Any]] | None) -> Markup:
    lines = []
    for found in filter(None, retrieved or []):
        relevant = (found.get("gain") or 0) > 0
        sign = element("span", "✓ relevant " if relevant else "", class_="tick") if relevant else None
        lines.append(
            element("li", sign, name(_cut(found.get("text"))), " ", element("small", number(found.get("score"), 3)),
                    class_="relevant" if relevant else None)
        )  # fmt: skip
    return element("div", element("h4", when), element("ol", *lines))


def _pair(item: Item, metric: str) -> Markup:
    before, after = item.rows
    return element(
        "article",
        element("p", name(_cut(after["text1"])), element("br"), name(_cut(after["text2"])), class_="query"),
        table(
            ["label", "cosine before", "after", "place before", "after", "change"],
            [
                [
                    number(after["label"], 3), number(before["cosine"], 3), number(after["cosine"], 3),
                    points(item.before), points(item.after), signed(item.after - item.before),
                ]
            ],
            "Pair", first_is_head=False,
        ),
    )  # fmt: skip
