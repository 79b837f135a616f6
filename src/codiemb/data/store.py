"""Records on disk: read once, written as Arrow under a cache folder, memory-mapped ever after.

The cache (`$CODIEMB_CACHE`, else `~/.cache/codiemb`) is keyed by the files' paths, sizes and times and by the source's
settings, written under a temporary name and renamed. Rows never live in Python lists. Of processes that want the same
source at once, as the ranks of a first start do, one reads it and the others wait for what it writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from codiemb.config import Source
from codiemb.data.beir import beir_records
from codiemb.data.readers import files_of, is_beir, read_rows
from codiemb.data.records import Record, RowReader
from codiemb.errors import DataError
from codiemb.files import LOCK, sync, told_of_full_disk
from codiemb.tasks import TASKS

if TYPE_CHECKING:
    import datasets

_FORMAT = 2  # raise it when what is written changes
_ROWS_AT_ONCE = 2048
_SCHEMA = pa.schema(
    {
        "query": pa.string(),
        "positives": pa.list_(pa.string()),
        "negatives": pa.list_(pa.string()),
        "positive_scores": pa.list_(pa.float64()),
        "negative_scores": pa.list_(pa.float64()),
        "instruction": pa.string(),
        "id": pa.string(),
        "query_id": pa.int64(),
        "positive_ids": pa.list_(pa.int64()),
        "negative_ids": pa.list_(pa.int64()),
        "label_id": pa.int64(),
    }
)


@dataclass(frozen=True)
class Records:
    """The records of one source, memory-mapped.

    Attributes:
        rows_read: rows in the files.
        dropped: rows left out, by reason; `rows_read == len(self) + sum(dropped.values())`.
        texts_left_out: texts taken out of rows that stay, by reason.
    """

    source: Source
    table: datasets.Dataset
    rows_read: int
    dropped: dict[str, int]
    texts_left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, places: np.ndarray | list[int]) -> list[dict[str, Any]]:
        """The records at `places`, as dictionaries by field."""
        columns = self.table[list(map(int, places))]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def column(self, name: str) -> pa.ChunkedArray:
        return self.table.data.column(name)

    def text_ids(self) -> np.ndarray:
        """Ids of every text, repeated as often as it is listed."""
        lists = [self.column(name).combine_chunks().flatten() for name in ("positive_ids", "negative_ids")]
        return np.concatenate([self.column("query_id").to_numpy(), *(np.asarray(ids) for ids in lists)])

    def digest(self) -> str:
        """Equal for sources that hold the same texts in the same order, wherever their files lie."""
        found = blake2b(digest_size=16)

        def take(numbers: pa.Array) -> None:
            found.update(np.ascontiguousarray(numbers.fill_null(-1).to_numpy(zero_copy_only=False)).tobytes())

        for name in ("query_id", "positive_ids", "negative_ids", "positive_scores", "negative_scores", "label_id"):
            column = self.column(name).combine_chunks()
            if pa.types.is_list(column.type):
                take(column.value_lengths())
                column = column.flatten()
            take(column)
        instructions = self.column("instruction").combine_chunks().dictionary_encode()
        found.update(json.dumps(instructions.dictionary.to_pylist()).encode())
        take(instructions.indices)
        return found.hexdigest()

    def by_label(self, place: int, same: int, other: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Rows drawn with the label of row `place` (itself aside) and with another; fewer where there are fewer."""
        labels, order = self._labels
        start, stop = (int(np.searchsorted(labels, labels[place], side, sorter=order)) for side in ("left", "right"))
        alike, others = stop - start, len(order) - (stop - start)
        drawn_same = random.choice(alike, size=min(same + 1, alike), replace=False)
        drawn_other = random.choice(others, size=min(other, others), replace=False)
        rows_same = [row for row in order[start + drawn_same].tolist() if row != place][:same]
        return rows_same, order[np.where(drawn_other < start, drawn_other, drawn_other + alike)].tolist()

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Label id of each row, and the rows in order of it."""
        labels = self.column("label_id").to_numpy()
        return labels, np.argsort(labels, kind="stable")


def load_records(source: Source, *, keep_duplicates: bool = False) -> Records:
    """The records of `source`, from the cache if its files have not changed.

    Args:
        keep_duplicates: keep rows that say the same as an earlier one (evaluation sets are read as they are).

    Raises:
        DataError: a missing, damaged, empty or unsuitable file; nothing of it is left in the cache.
    """
    import datasets

    stem = cache_folder("records") / _fingerprint(source, keep_duplicates)
    arrow, facts = stem.with_suffix(".arrow"), stem.with_suffix(".json")

    def cached() -> Records:
        counted = json.loads(facts.read_text())
        table = datasets.Dataset.from_file(str(arrow))
        if len(table) + sum(counted["dropped"].values()) != counted["rows_read"]:
            raise ValueError(f"{arrow} is cut")
        return Records(source, table, counted["rows_read"], counted["dropped"], counted["texts_left_out"])

    damaged = (OSError, ValueError, KeyError)  # or not there yet
    with contextlib.suppress(*damaged):
        return cached()
    with _turn(stem), _frozen_objects(), told_of_full_disk(stem.parent, "free some disk or set CODIEMB_CACHE"):
        with contextlib.suppress(*damaged):
            return cached()
        _write(source, keep_duplicates, arrow, facts)
        return cached()


@contextlib.contextmanager
def _turn(stem: Path) -> Iterator[None]:
    """Inside, no other process reads the source of `stem`.

    A byte of the folder's lock file stands for a source, so there is one file, which stays. The kernel lets go of it
    when this process ends, however it ends. A file system without locks is used without.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with (stem.parent / LOCK).open("a") as lock:
        with contextlib.suppress(OSError):
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(stem.name[:7], 16))
        yield


@contextlib.contextmanager
def _frozen_objects() -> Iterator[None]:
    """Inside, Python's collector passes over what exists already: for every few thousand rows it would walk through all
    of torch and its friends, which is half of the time of reading."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _write(source: Source, keep_duplicates: bool, arrow: Path, facts: Path) -> None:
    reader = RowReader(source)
    rows_read = rows_kept = labelled = 0
    with tempfile.TemporaryDirectory(dir=arrow.parent, prefix="writing-") as folder:
        partial = Path(folder) / "records.arrow"
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            seen: set[int] = set()
            records = _records(source, reader)
            while chunk := list(islice(records, _ROWS_AT_ONCE)):
                rows_read += len(chunk)
                kept = []
                for record in chunk:
                    if record is None:
                        continue
                    if not keep_duplicates:
                        if (key := record.key()) in seen:
                            reader.dropped["duplicate of an earlier row"] += 1
                            continue
                        seen.add(key)
                    kept.append(record)
                rows_kept += len(kept)
                labelled += sum(record.label_id is not None for record in kept)
                if kept:
                    writer.write_batch(pa.record_batch(list(zip(*kept, strict=True)), schema=_SCHEMA))
        if not rows_kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in reader.dropped.items())
            raise DataError(
                f"source {source.name!r}, {source.path}",
                got=f"no usable row of {rows_read} ({reasons})" if rows_read else "an empty file",
                expected="at least one record",
            )
        if 0 < labelled < rows_kept:
            raise DataError(
                f"source {source.name!r}, {source.path}",
                got=f"a label in {labelled} of {rows_kept} rows",
                expected="labels in all rows or in none",
            )
        counts = {"rows_read": rows_read, "dropped": reader.dropped, "texts_left_out": reader.texts_left_out}
        (Path(folder) / "facts.json").write_text(json.dumps(counts))
        for written, final in ((partial, arrow), (Path(folder) / "facts.json", facts)):
            sync(written)
            written.replace(final)


def _records(source: Source, reader: RowReader) -> Iterator[Record | None]:
    if is_beir(Path(source.path)):
        task = TASKS[source.task]
        if task.shape != "lists" or task.labelled:
            expected = "a file of texts with labels" if task.labelled else "a file of pairs with scores"
            raise DataError(f"source {source.name!r}, {source.path}", got="a BEIR folder", expected=expected)
        return beir_records(source, reader)
    return (reader.record(row, where) for where, row in read_rows(source))


def _fingerprint(source: Source, keep_duplicates: bool) -> str:
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
    settings = source.model_dump(mode="json", exclude={"name"})
    return blake2b(json.dumps([_FORMAT, keep_duplicates, settings, files]).encode(), digest_size=16).hexdigest()


def cache_folder(kind: str) -> Path:
    return Path(os.environ.get("CODIEMB_CACHE", "~/.cache/codiemb")).expanduser() / kind
