"""What a run will do, told before it does it: the text that `codiemb check` prints, and plan.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from codiemb.batching.plan import Plan
from codiemb.config import Batching, Config, Role, Source
from codiemb.data.beir import read_qrels, read_queries
from codiemb.data.readers import beir_files, beir_qrels, is_beir
from codiemb.data.records import text_id
from codiemb.data.store import Records, load_records
from codiemb.errors import DataError, short
from codiemb.suites.suite import DataSet
from codiemb.tasks import TASKS
from codiemb.tasks.task import PairLosses

SAMPLE = 2000  # rows of a source whose texts are tokenised
BINS = 10
LENGTH_BINS = 24


class Tokenizer(Protocol):
    """Tokens of each text, special tokens and the role's prompt included, untruncated."""

    def __call__(self, texts: Sequence[str], role: Role) -> np.ndarray: ...


@dataclass(frozen=True)
class PlanReport:
    """The plan of a run as data (`plan.json`), as text, and what looks wrong."""

    content: dict[str, Any]
    warnings: list[str]

    def text(self) -> str:
        """Tables for the terminal."""
        sources = self.content["sources"]
        lines = [
            f"schedule {self.content['schedule']}: {self.content['steps_per_epoch']} steps an epoch, "
            f"{self.content['steps']} in all; longest run of one source: {self.content['longest_run']}",
            "",
            *_table(
                ["source", "task", "rows", "used", "dropped", "batches", "passes", "steps %"],
                [
                    [
                        name,
                        facts["task"],
                        facts["rows"],
                        facts["rows_used"],
                        sum(facts["dropped"].values()),
                        facts["batches"],
                        f"{facts['passes']:.2f}",
                        f"{100 * facts['share_of_steps']:.1f}",
                    ]
                    for name, facts in sources.items()
                ],
            ),
            "",
            *_table(
                ["source", "texts", "tokens p50", "p90", "p99", "max", "kept", "truncated %"],
                [
                    [
                        name,
                        role,
                        *(numbers[key] for key in ("p50", "p90", "p99", "max", "max_length")),
                        f"{100 * numbers['truncated']:.1f}",
                    ]
                    for name, facts in sources.items()
                    for role, numbers in facts["tokens"].items()
                ],
            ),
        ]
        for name, facts in sources.items():
            if scores := facts.get("scores"):
                histogram = " ".join(f"{count}" for count in scores["histogram"])
                lines += [
                    "",
                    f"{name}: scores {scores['lowest']:g} to {scores['highest']:g}, tenths of the range: {histogram}",
                ]
        notes = [
            f"{name}: {count} {reason}"
            for name, facts in sources.items()
            for reason, count in {**facts["dropped"], **facts["texts_left_out"]}.items()
        ]
        notes += [
            f"{entry['data_set']}: {entry['shared']} of {entry['texts']} evaluation texts are trained on, "
            f"in {entry['source']}"
            for entry in self.content["overlap"]
            if entry["shared"]
        ]
        if notes:
            lines += ["", *notes]
        if self.warnings:
            lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(lines)


def plan_report(
    config: Config,
    records: dict[str, Records],
    plan: Plan,
    tokenizer: Tokenizer,
    lengths: dict[Role, int | None],
    suite: Sequence[Source],
) -> PlanReport:
    """The report on a run.

    Args:
        config: the resolved configuration.
        records: the data by source name.
        plan: the global batches.
        tokenizer: counts tokens.
        lengths: tokens kept by role.
        suite: the data sets of the evaluation, for texts that are trained on too.

    Raises:
        DataError: scores that the loss of their source cannot take.
    """
    steps = len(plan)
    counts = plan.batches_per_epoch
    batches = sum(counts.values())
    sources: dict[str, Any] = {}
    warnings = _unused(config.batching)
    for name, source in records.items():
        tokens = _token_lengths(source, tokenizer, lengths)
        facts: dict[str, Any] = {
            "task": source.source.task,
            "rows": source.rows_read,
            "rows_used": plan.rows_per_pass(name),
            "dropped": dict(source.dropped),
            "texts_left_out": source.texts_left_out,
            "batch_size": plan.batch_sizes[name],
            "batches": counts[name],
            "passes": counts[name] / plan.batches_per_pass[name],
            "share_of_steps": counts[name] / batches,
            "tokens": tokens,
        }
        if remainder := len(source) - plan.rows_per_pass(name):
            facts["dropped"]["in the last batch of a pass, with drop_last"] = remainder
        if TASKS[source.source.task].shape == "pairs":
            facts["scores"], score_warnings = _scores(source)
            warnings += [*score_warnings, *_without_positive(source, getattr(config.losses, source.source.task))]
        elif (labels := source.column("label_id").drop_null()).length():
            counts_of_labels = np.unique(labels.to_numpy(), return_counts=True)[1]
            facts["labels"] = len(counts_of_labels)
            if alone := int((counts_of_labels == 1).sum()):
                warnings.append(f"{name}: {alone} rows have a label that no other row has, and so no positive")
            if len(counts_of_labels) == 1:
                warnings.append(f"{name}: all rows have the same label; a loss learns nothing from it")
        else:
            facts["positives_per_query"] = len(source.column("positive_ids").combine_chunks().flatten()) / len(source)
            facts["negatives_per_query"] = len(source.column("negative_ids").combine_chunks().flatten()) / len(source)
            if getattr(config.losses, source.source.task).type == "list_softmax":
                _require_gains(source)
                warnings += _without_order(source)
            if "query" in tokens and tokens["query"]["p50"] > 2 * tokens["document"]["p50"]:
                warnings.append(
                    f"{name}: queries are longer than documents ({tokens['query']['p50']} against "
                    f"{tokens['document']['p50']} tokens in the middle); are the columns swapped?"
                )
        if facts["passes"] > 10:
            warnings.append(f"{name}: read {facts['passes']:.0f} times an epoch; it may be learnt by heart")
        sources[name] = facts
    by_task = {
        task: sum(facts["share_of_steps"] for facts in sources.values() if facts["task"] == task)
        for task in sorted({facts["task"] for facts in sources.values()})
    }
    total = (
        config.train.max_steps if config.train.max_steps > 0 else int(np.ceil(steps * config.train.num_train_epochs))
    )
    content = {
        "schedule": config.batching.schedule,
        "seed": config.seed,
        "steps_per_epoch": steps,
        "steps": total,
        "longest_run": plan.longest_run(),
        "share_of_steps_by_task": by_task,
        "sources": sources,
        "overlap": _overlaps(records, suite),
        "warnings": warnings,
    }
    return PlanReport(content, warnings)


def _unused(batching: Batching) -> list[str]:
    """A warning for each setting of another schedule than the one that is chosen."""
    of_schedule = {"temperature": "temperature", "weights": "weights", "stages": "staged"}
    return [
        f"batching.{name} is of the schedule {schedule}; the schedule is {batching.schedule}, so it counts for nothing"
        for name, schedule in of_schedule.items()
        if batching.schedule != schedule
        and getattr(batching, name) != Batching.model_fields[name].get_default(call_default_factory=True)
    ]


def _token_lengths(source: Records, tokenizer: Tokenizer, lengths: dict[Role, int | None]) -> dict[str, dict[str, Any]]:
    """Quantiles of untruncated lengths by role, over an even sample of rows."""
    places = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int))
    rows = source.rows(places)
    of_query, of_others = TASKS[source.source.task].roles
    texts: dict[Role, list[str]] = {}
    for row in rows:
        texts.setdefault(of_query, []).append(row["query"])
        texts.setdefault(of_others, []).extend([*row["positives"][:1], *row["negatives"][:1]])
    result = {}
    for role, listed in texts.items():
        counts = tokenizer(listed, role)
        kept = lengths[role]
        p50, p90, p99 = (int(value) for value in np.quantile(counts, [0.5, 0.9, 0.99], method="higher"))
        truncated = float(np.mean(counts > kept)) if kept is not None else 0.0
        result[str(role)] = {
            "p50": p50, "p90": p90, "p99": p99, "max": int(counts.max()),
            "max_length": kept, "truncated": truncated, "sampled_texts": len(listed),
            "histogram": _histogram(counts, p99),
        }  # fmt: skip
    return result


def _histogram(lengths: np.ndarray, far: int) -> dict[str, Any]:
    """Counts of lengths in stretches of `width` from 0 on; the last one, past `far`, holds what is longer too."""
    width = far // LENGTH_BINS + 1
    places = np.minimum(lengths // width, far // width + 1)
    return {"width": width, "counts": np.bincount(places).tolist()}


def _scores(source: Records) -> tuple[dict[str, Any], list[str]]:
    values = np.asarray(source.column("positive_scores").combine_chunks().flatten())
    low, high = source.source.score_range
    histogram = np.histogram(values, bins=BINS, range=(0, 1))[0].tolist()
    lowest, highest = (float(low + (high - low) * value) for value in (values.min(), values.max()))
    warnings = []
    if lowest == highest:
        warnings.append(f"{source.source.name}: every score is {lowest:g}; rank losses learn nothing from it")
    elif (values.max() - values.min()) < 0.5:
        warnings.append(
            f"{source.source.name}: scores cover {lowest:g} to {highest:g} of score_range {low:g} to {high:g}; "
            "is the range right?"
        )
    return {"range": [low, high], "lowest": lowest, "highest": highest, "histogram": histogram}, warnings


def _without_positive(source: Records, losses: PairLosses) -> list[str]:
    """A warning where a loss that needs positives has none: it is 0 in every batch."""
    highest = float(np.max(source.column("positive_scores").combine_chunks().flatten()))
    return [
        f"{source.source.name}: no score reaches mid_nce_threshold {losses.mid_nce_threshold:g} of the range; {name} "
        "learns nothing from it"
        for name in ("mid_nce", "info_nce")
        if getattr(losses, name) and highest < losses.mid_nce_threshold
    ]


def _require_gains(source: Records) -> None:
    """Refuses scores below 0 where `list_softmax` takes their shares of the sum for probabilities.

    Raises:
        DataError: it names the first query that has one.
    """
    for column in ("positive_scores", "negative_scores"):
        lists = source.column(column).combine_chunks()
        scores = np.asarray(lists.flatten())
        if len(below := np.flatnonzero(scores < 0)):
            row = pc.list_parent_indices(lists)[below[0]].as_py()
            raise DataError(
                f"source {source.source.name!r}, query {short(source.column('query')[row].as_py())}",
                got=f"a score of {scores[below[0]]:g}",
                expected="graded relevance of 0 or more for each document, because the loss is list_softmax",
                fix="shift the scores, or take another loss",
            )


def _without_order(source: Records) -> list[str]:
    """A warning where `list_softmax` has nothing to tell apart in a list: it is 0 there."""
    texts = _lengths(source.column("positive_ids")) + _lengths(source.column("negative_ids"))
    if not (alone := int(np.count_nonzero(texts < 2))):
        return []
    return [
        f"{source.source.name}: {alone} of {len(source)} lists hold one document; list_softmax learns nothing there"
    ]


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.list_value_length(lists).combine_chunks())


def _overlaps(records: dict[str, Records], suite: Sequence[Source]) -> list[dict[str, Any]]:
    """How many texts that are asked in the evaluation (queries, both sides of pairs) are training texts."""
    if not suite:
        return []
    trained = {name: np.unique(source.text_ids()) for name, source in records.items()}
    found = []
    for data_set in suite:
        if isinstance(data_set, DataSet) and data_set.mteb:
            continue  # its texts are not in our hands
        asked = np.unique(_asked(data_set))
        for name, ids in trained.items():
            shared = int(np.isin(asked, ids, assume_unique=True).sum())
            found.append({"data_set": data_set.name, "source": name, "texts": len(asked), "shared": shared})
    return found


def _asked(data_set: Source) -> np.ndarray:
    path = Path(data_set.path)
    if is_beir(path):
        judged = read_qrels(beir_qrels(data_set))
        queries = read_queries(beir_files(path)[1])
        return np.array([text_id(text) for key, text, _ in queries if key in judged], dtype=np.int64)
    records = load_records(data_set, keep_duplicates=True)
    return records.text_ids() if data_set.task == "similarity" else records.column("query_id").to_numpy()


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, *([f"{cell}" if cell is not None else "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    left = [not all(_is_numeric(row[column]) for row in cells[1:]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]


def _is_numeric(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).isdigit()
