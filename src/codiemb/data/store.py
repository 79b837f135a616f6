"""Records on disk: read once, written as Arrow under a cache folder, memory-mapped ever after.

The cache (`$CODIEMB_CACHE`, else `~/.cache/codiemb`) is keyed by the files' paths, sizes and times and by the source's
settings, written under a temporary name and renamed. Rows never live in Python lists.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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

if TYPE_CHECKING:
    import datasets

_FORMAT = 1  # raise it when what is written changes
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


def load_records(source: Source, *, keep_duplicates: bool = False) -> Records:
    """The records of `source`, from the cache if its files have not changed.

    Args:
        keep_duplicates: keep rows that say the same as an earlier one (evaluation sets are read as they are).

    Raises:
        DataError: a missing, damaged, empty or unsuitable file; nothing is left in the cache.
    """
    import datasets

    stem = _cache_folder() / _fingerprint(source, keep_duplicates)
    arrow, facts = stem.with_suffix(".arrow"), stem.with_suffix(".json")
    if not facts.is_file():
        with _frozen_objects():
            _write(source, keep_duplicates, arrow, facts)
    counted = json.loads(facts.read_text())
    table = datasets.Dataset.from_file(str(arrow))
    return Records(source, table, counted["rows_read"], counted["dropped"], counted["texts_left_out"])


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
    rows_read = rows_kept = 0
    arrow.parent.mkdir(parents=True, exist_ok=True)
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
                if kept:
                    writer.write_batch(pa.record_batch(list(zip(*kept, strict=True)), schema=_SCHEMA))
        if not rows_kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in reader.dropped.items())
            raise DataError(
                f"source {source.name!r}, {source.path}",
                got=f"no usable row of {rows_read} ({reasons})" if rows_read else "an empty file",
                expected="at least one record",
            )
        counts = {"rows_read": rows_read, "dropped": reader.dropped, "texts_left_out": reader.texts_left_out}
        (Path(folder) / "facts.json").write_text(json.dumps(counts))
        partial.replace(arrow)
        (Path(folder) / "facts.json").replace(facts)


def _records(source: Source, reader: RowReader) -> Iterator[Record | None]:
    if is_beir(Path(source.path)):
        if source.task != "retrieval":
            raise DataError(
                f"source {source.name!r}, {source.path}", got="a BEIR folder", expected="a file of pairs with scores"
            )
        return beir_records(source, reader)
    return (reader.record(row, where) for where, row in read_rows(source))


def _fingerprint(source: Source, keep_duplicates: bool) -> str:
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
    settings = source.model_dump(mode="json", exclude={"name"})
    return blake2b(json.dumps([_FORMAT, keep_duplicates, settings, files]).encode(), digest_size=16).hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("CODIEMB_CACHE", "~/.cache/codiemb")).expanduser() / "records"
