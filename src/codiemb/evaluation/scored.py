"""Evaluations that were written earlier, read back and paired: the same items of the same data sets, or a refusal."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from codiemb.errors import EvaluationError, short
from codiemb.evaluation.metrics import HEADLINE
from codiemb.evaluation.significance import spearman_contributions
from codiemb.tasks.task import same_score

# The headline of each task whose items make it up.
METRICS = {task: HEADLINE[task] for task in ("retrieval", "reranking", "classification", "similarity")}
FACTS = ("task", "split", "n", "documents", "data_hash")  # another value is another version of the data
KEYS = ("query_id", "pair")  # else items are told apart by their place
TEXTS = ("query", "text1", "text2", "text", "label")
SIMILARITY = ("cosine", "label")


@dataclass(frozen=True)
class Scored:
    """One data set of one evaluation.

    Attributes:
        file: its JSON file.
        facts: what must be the same in all evaluations that are compared, where they say it.
        key: the column that tells items apart, or "row".
        keys: its values.
        texts: columns that must be the same as well, where both have them.
        values: by column what the metric is computed from, [item].
    """

    file: Path
    name: str
    task: str
    facts: dict[str, Any]
    key: str
    keys: list[Any]
    texts: dict[str, list[Any]]
    values: dict[str, Float[np.ndarray, " item"]]


def models_of(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Folders by model, from what stands on the command line: a folder, or a pattern of folders, one a seed.

    A model is called by the part of its path that tells it from the others.

    Raises:
        EvaluationError: a pattern matches no folder, or a model is given twice.
    """
    paths = [Path(argument).resolve() for argument in arguments]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise EvaluationError("models", got=f"{twice[0]} twice", expected="different evaluations")
    parts = [path.parts for path in paths]
    front = _shared(parts)
    back = _shared([part[front:][::-1] for part in parts])
    names = [Path(*part[front : len(part) - back]).as_posix() for part in parts]
    return {name: _folders(argument) for name, argument in zip(names, arguments, strict=True)}


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts from the first on are the same in all paths, of which each keeps at least one."""
    same = 0
    while same < min(map(len, paths)) - 1 and len({path[same] for path in paths}) == 1:
        same += 1
    return same


def _folders(argument: str) -> list[Path]:
    if not glob.has_magic(argument) or Path(argument).is_dir():
        return [Path(argument)]
    found = [Path(path) for path in sorted(glob.glob(argument)) if Path(path).is_dir()]
    if not found:
        raise EvaluationError(f"pattern {argument}", got="no folder", expected="an evaluation of each seed")
    return found


def read_evaluation(folder: Path) -> dict[str, Scored | None]:
    """The data sets in a folder that `codiemb evaluate` or `codiemb train` wrote, by name.

    None where the score is not made up of items, or of one alone: clustering, average precision, a mean over subsets in
    mteb. JSON files without metrics, such as a comparison, are no data sets.

    Raises:
        EvaluationError: there is none, or a file is damaged or missing.
    """
    found: dict[str, Scored | None] = {}
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        content = _json(file)
        if "metrics" in content:
            scored, name = _if_of_items(file, content), content["dataset"]
            if name in found:
                raise EvaluationError(
                    f"file {file}", got=f"{name} again", expected="one file a data set", fix="remove one of the two"
                )
            found[name] = scored
    if not found:
        inside = " or ".join(str(path) for path in sorted(folder.glob("eval/*")) if path.is_dir())
        raise EvaluationError(
            f"evaluation {folder}",
            got="no results of a data set" if folder.is_dir() else "no such folder",
            expected="a folder of <dataset>.json files",
            fix=f"give {inside}" if inside else "write one with codiemb evaluate",
        )
    return found


def paired(runs: Sequence[Scored]) -> list[Scored]:
    """The same data set in several evaluations, its items in the order of the first.

    Raises:
        EvaluationError: they were not scored on the same items.
    """
    first = runs[0]
    return [first, *(_as_in(first, other) for other in runs[1:])]


def _as_in(first: Scored, other: Scored) -> Scored:
    for fact in FACTS:
        if None not in (first.facts[fact], other.facts[fact]) and first.facts[fact] != other.facts[fact]:
            raise _unlike(first, other, fact, other.facts[fact], first.facts[fact])
    places = {key: place for place, key in enumerate(other.keys)}
    if absent := [key for key in first.keys if key not in places]:
        raise _unlike(first, other, first.key, f"no {short(absent[0])}", f"the {len(first.keys)} ids")
    order = [places[key] for key in first.keys]
    texts = {name: [column[place] for place in order] for name, column in other.texts.items()}
    for name in first.texts.keys() & texts.keys():
        for key, here, there in zip(first.keys, texts[name], first.texts[name], strict=True):
            if here != there:
                raise _unlike(first, other, f"{name} of {first.key} {short(key)}", short(here), short(there))
    return replace(
        other, keys=first.keys, texts=texts, values={name: column[order] for name, column in other.values.items()}
    )


def _unlike(first: Scored, other: Scored, what: str, got: Any, expected: Any) -> EvaluationError:
    return EvaluationError(
        f"file {other.file}, {what}",
        got=got,
        expected=f"{expected} as in {first.file}",
        fix="evaluate both models on the same version of the data",
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error), "a JSON file") from None
    return content if isinstance(content, dict) else {}


def _if_of_items(file: Path, content: dict[str, Any]) -> Scored | None:
    if absent := [name for name in ("dataset", "task", "n", "items") if name not in content]:
        raise _damaged(file, f"no {absent[0]!r}", "a result of codiemb evaluate")
    kinds = {"dataset": str, "task": str, "n": int, "items": str | None, "metrics": dict}
    if other := [name for name, kind in kinds.items() if not isinstance(content[name], kind)]:
        raise _damaged(file, f"{other[0]} of another form", "a result of codiemb evaluate")
    if content["items"] is None or content["task"] not in METRICS or content["n"] < 2:
        return None
    try:
        return _scored(file, content)
    except EvaluationError:
        if "mteb" in content:
            return None
        raise


def _scored(file: Path, content: dict[str, Any]) -> Scored:
    task, items = content["task"], file.parent / content["items"]
    columns = SIMILARITY if task == "similarity" else (METRICS[task],)
    table = _items(items, columns)
    key = next((name for name in KEYS if name in table.column_names), "row")
    keys = (
        list(range(len(table)))
        if key == "row"
        else [value if isinstance(value, int) else str(value) for value in table[key].to_pylist()]
    )
    try:
        values = {name: table[name].to_numpy().astype(float) for name in columns}
    except (TypeError, ValueError) as error:
        raise _damaged(items, str(error), f"numbers in {' and '.join(columns)}") from None
    if len(keys) < 2 or len(keys) != content["n"] or len(set(keys)) != len(keys):
        raise _damaged(items, f"{len(keys)} items, {len(set(keys))} of them distinct", f"the {content['n']} of {file}")
    for name, column in values.items():
        if not np.isfinite(column).all():
            raise _damaged(items, f"{name} {column[~np.isfinite(column)][0]}", "finite numbers")
    scored = Scored(
        file,
        content["dataset"],
        task,
        {fact: content.get(fact) for fact in FACTS},
        key,
        keys,
        {name: table[name].to_pylist() for name in TEXTS if name in table.column_names},
        values,
    )
    recorded, found = content["metrics"].get(METRICS[task]), contributions(scored).mean()
    if not isinstance(recorded, int | float) or not same_score(recorded, found):
        raise _damaged(items, f"{METRICS[task]} {found:.4f}", f"{recorded} as in {file}")
    return scored


def contributions(scored: Scored) -> Float[np.ndarray, " item"]:
    """What each item contributes to the headline metric, which is their mean."""
    if scored.task == "similarity":
        return spearman_contributions(scored.values["cosine"], scored.values["label"])
    return scored.values[METRICS[scored.task]]


def _items(file: Path, required: Sequence[str]) -> pa.Table:
    try:
        place = file.absolute()  # pyarrow takes `a:b` for an address
        names = pq.read_schema(place).names
        table = pq.read_table(place, columns=[name for name in names if name in (*KEYS, *required, *TEXTS)])
        table.validate(full=True)
    except FileNotFoundError:
        raise _damaged(file, "nothing there", "the scores of the items") from None
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, str(error).splitlines()[0], "a Parquet file") from None
    if absent := [name for name in required if name not in table.column_names]:
        raise _damaged(file, f"no column {absent[0]!r}", "the scores of the items")
    return table


def _damaged(file: Path, got: str, expected: str) -> EvaluationError:
    return EvaluationError(f"file {file}", got=got, expected=expected, fix="evaluate the model again")
