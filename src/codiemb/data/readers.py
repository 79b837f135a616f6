"""Readers: each yields the raw rows of one format, with the place of each row for messages.

suffix or folder                          reader
.jsonl .json [.gz .zst]                   one JSON object a line
.parquet                                  Parquet
.csv .tsv [.gz .zst]                      header line, then one row a line
folder with corpus.jsonl and qrels/       BEIR (see beir.py)
folder with <split>.jsonl, .parquet, ...  that file
folder of `Dataset.save_to_disk`          datasets
other folder, or a hub id                 datasets.load_dataset
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from codiemb.config import Source
from codiemb.data.records import columns_of
from codiemb.errors import DataError, short

FILE_FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
Rows = Iterator[tuple[str, Any]]


def files_of(source: Source) -> list[Path]:
    """The files a source is read from; empty if it comes from the Hugging Face hub or cache.

    Raises:
        DataError: no such file or split.
    """
    path = Path(source.path)
    if path.is_file():
        if file_format(path) not in FILE_FORMATS:
            raise DataError(
                f"source {source.name!r}, {path}",
                got=f"a file that ends in {path.suffix!r}" if path.suffix else "a file without a suffix",
                expected=f"one of {', '.join(FILE_FORMATS)} (text also with .gz or .zst)",
            )
        return [path]
    if path.is_dir():
        if is_beir(path):
            return [*_first(path, "corpus"), *_first(path, "queries"), beir_qrels(source)]
        if source.split:
            for file in sorted(path.iterdir()):
                if file.name.split(".")[0] == source.split and file_format(file) in FILE_FORMATS:
                    return [file]
        if is_saved_dataset(path):
            return sorted(file for file in path.rglob("*") if file.is_file())
        files = sorted(file for file in path.rglob("*") if file.is_file() and file_format(file) in FILE_FORMATS)
        if not files:
            raise DataError(
                f"source {source.name!r}, {path}",
                got="a folder without data files",
                expected="a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), a saved data set, or data files",
            )
        if source.split and (len(files) == 1 or all(file_format(file) != ".parquet" for file in files)):
            splits = ", ".join(sorted({file.name.split(".")[0] for file in files}))
            raise DataError(f"source {source.name!r}, split", got=repr(source.split), expected=f"one of {splits}")
        return files
    if path.is_absolute():
        raise DataError(
            f"source {source.name!r}, {path}", got="no such file or folder", expected="data", fix="check `path`"
        )
    return []


def read_rows(source: Source) -> Rows:
    """Raw rows of any format but BEIR, as (place, row).

    Raises:
        DataError: unreadable bytes, invalid JSON, an unknown format or split; with file and line.
    """
    files = files_of(source)
    if len(files) == 1 and file_format(files[0]) in FILE_FORMATS:
        return _read_file(files[0], source)
    return _read_datasets(source)


def is_beir(path: Path) -> bool:
    return path.is_dir() and bool(_first(path, "corpus")) and (path / "qrels").is_dir()


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def beir_qrels(source: Source) -> Path:
    """The qrels file of a source's split."""
    folder = Path(source.path) / "qrels"
    splits = {file.name.split(".")[0]: file for file in sorted(folder.glob("*.tsv*"))}
    if source.split is None:
        raise DataError(
            f"source {source.name!r}, split", got="none", expected=f"one of {', '.join(splits)} (a BEIR folder)"
        )
    if source.split not in splits:
        raise DataError(
            f"source {source.name!r}, split", got=repr(source.split), expected=f"one of {', '.join(splits) or 'none'}"
        )
    return splits[source.split]


def beir_files(path: Path) -> tuple[Path, Path]:
    """The corpus and the queries file of a BEIR folder."""
    for stem in ("corpus", "queries"):
        if not _first(path, stem):
            raise DataError(f"BEIR folder {path}", got=f"no {stem}.jsonl", expected="corpus.jsonl and queries.jsonl")
    return _first(path, "corpus")[0], _first(path, "queries")[0]


def read_jsonl(path: Path) -> Rows:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"file {path}, line {number}"
        try:
            row = json.loads(line)
            if "\\ud" in line or "\\uD" in line:  # half a surrogate pair is JSON, but no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            if line.lstrip().startswith("["):
                raise DataError(where, got="a JSON array", expected="one JSON object a line") from None
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(where, got=f"invalid JSON ({reason})", expected="one JSON object a line") from None
        if not isinstance(row, dict):
            kind = "a JSON array" if isinstance(row, list) else short(row)
            raise DataError(where, got=kind, expected="one JSON object a line")
        yield where, row


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, compressed or not."""
    number = 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\x00" in line:
                    raise DataError(f"file {path}, line {number}", got="binary data", expected="UTF-8 text")
                yield number, line
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise DataError(
            f"file {path}, line {number}",
            got=f"byte 0x{bad:02x}, which is not UTF-8",
            expected="UTF-8 text",
            fix="convert the file to UTF-8",
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"file {path}, after line {number}", got=error, expected="a readable file") from None


def _read_file(path: Path, source: Source) -> Rows:
    if file_format(path) == ".parquet":
        return _read_parquet(path)
    if file_format(path) in (".csv", ".tsv"):
        return _read_csv(path, source, "\t" if file_format(path) == ".tsv" else ",")
    return read_jsonl(path)


def _read_parquet(path: Path) -> Rows:
    number = 0
    try:
        # Without a buffer whole row groups are held; and pyarrow takes `a:b` for an address.
        with pq.ParquetFile(path.absolute(), buffer_size=_AT_ONCE, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"file {path}, row {number}", row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"file {path}, after row {number}", got=error, expected="a readable Parquet file") from None


def _read_csv(path: Path, source: Source, delimiter: str) -> Rows:
    columns = columns_of(source)
    numeric = {*columns["positive_score"], *columns["negative_score"]}
    csv.field_size_limit(sys.maxsize)
    lines = (line for _, line in read_lines(path))
    reader = csv.DictReader(lines, delimiter=delimiter, restkey=_TOO_MANY, strict=True)
    try:
        header = list(reader.fieldnames or [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"file {path}, line 1", got=f"the column {twice[0]!r} twice", expected="one name a column")
        for row in reader:
            where = f"file {path}, line {reader.line_num}"
            if _TOO_MANY in row or None in row.values():
                raise DataError(where, got="another number of columns", expected=f"{len(header)} as in the header")
            yield where, {name: _as_number(value) if name in numeric else value for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"file {path}, line {reader.line_num}", got=error, expected="valid CSV") from None


_AT_ONCE = 2**20  # bytes of a Parquet column
_TOO_MANY = "\0"  # what a row's cells beyond the header are filed under; no column is named so


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read_datasets(source: Source) -> Rows:
    import datasets

    path = Path(source.path)
    try:
        if path.is_dir() and is_saved_dataset(path):
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if source.split not in loaded:
                    raise DataError(
                        f"source {source.name!r}, split", got=repr(source.split), expected=f"one of {', '.join(loaded)}"
                    )
                loaded = loaded[source.split]
        else:
            loaded = datasets.load_dataset(source.path, split=source.split or "train")
    except DataError:
        raise
    except Exception as error:  # the hub, its cache and its loaders raise many kinds
        reason = str(error.__cause__ or error) or type(error).__name__
        raise DataError(
            f"source {source.name!r}, {source.path}",
            got=reason.splitlines()[0],
            expected="a file, a folder, or a data set of the Hugging Face hub",
        ) from None
    for number, row in enumerate(loaded, start=1):
        yield f"data set {source.path}, row {number}", row


def _open(path: Path) -> IO[bytes]:
    if path.suffix in (".gz", ".zst"):
        raw = pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else "zstd")
        return io.BufferedReader(raw, 1 << 20)  # Arrow's stream has no lines, but notices a cut end
    return path.open("rb")


def file_format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _first(folder: Path, stem: str) -> list[Path]:
    return [folder / name for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz") if (folder / name).is_file()][:1]
