"""The texts that models are analysed on: lines, JSON objects with a `text`, or unified records, which bring pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from sentence_transformers import SentenceTransformer
from torch import Tensor

from codiemb.config import Role, Source
from codiemb.data.readers import read_jsonl, read_lines
from codiemb.data.records import Record, RowReader
from codiemb.encoder.model import instructed, max_length, prompt
from codiemb.encoder.tokens import Text
from codiemb.errors import DataError

FORMATS = "a line each (.txt), or JSONL of objects with `text` or of unified records (query, positives)"
_BELONGS = 0.8  # of the highest score: as Gao et al. (2021, SimCSE) take pairs above 4 of 5 for alignment


class Entry(NamedTuple):
    """A text in the role it is encoded in; an instruction replaces the prompt of the role."""

    text: str
    role: Role = "document"
    instruction: str | None = None

    def for_encoder(self, encoder: SentenceTransformer) -> Text:
        before = instructed(self.instruction) if self.instruction else prompt(encoder, self.role)
        return Text(self.text, before, max_length(encoder, self.role))


class Texts(NamedTuple):
    """Distinct texts, and which of them belong together; None where the file does not say."""

    entries: list[Entry]
    pairs: Int[Tensor, "pair 2"] | None


def read_texts(path: Path) -> Texts:
    """The texts of a file, equal ones once, empty ones left out.

    Of a record, the query and each positive are a pair that belongs together; where positives have scores, those with
    at least four fifths of the highest score in the file are.

    Raises:
        DataError: an unreadable or unknown file, a row without a text, or fewer than two texts.
    """
    if not path.is_file():
        raise DataError(f"file {path}", got="no such file", expected="a file of texts", fix="check the path")
    places: dict[Entry, int] = {}
    scored: list[tuple[int, int, float]] = []
    for found in _read(path):
        listed = [found] if isinstance(found, Entry) else _texts_of(found)
        numbers = [places.setdefault(entry, len(places)) for entry in listed]
        if isinstance(found, Record):
            scores = found.positive_scores or [1.0] * len(found.positives)
            scored += [(numbers[0], number, score) for number, score in zip(numbers[1:], scores, strict=False)]
    if len(places) < 2:
        raise DataError(f"file {path}", got=f"{len(places)} text(s)", expected="at least two that differ")
    highest = max((score for *_, score in scored), default=0.0)
    together = [pair for *pair, score in scored if score >= _BELONGS * highest and score > 0]
    return Texts(list(places), torch.tensor(together) if together else None)


def _texts_of(record: Record) -> list[Entry]:
    """The query, the positives, then the negatives."""
    documents = [Entry(text) for text in (*record.positives, *record.negatives)]
    return [Entry(record.query, "query", record.instruction), *documents]


def _read(path: Path) -> Iterator[Entry | Record]:
    kind = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")][-1:]
    if kind == [".txt"]:
        yield from (Entry(line.strip()) for _, line in read_lines(path) if line.strip())
    elif kind in ([".jsonl"], [".json"]):
        reader = RowReader(Source(name="texts", task="retrieval", path=str(path)))
        for where, row in read_jsonl(path):
            if (found := _row(row, where, reader)) is not None:
                yield found
    else:
        raise DataError(f"file {path}", got=f"a name that ends in {path.suffix!r}", expected=FORMATS)


def _row(row: dict[str, Any], where: str, reader: RowReader) -> Entry | Record | None:
    if "text" not in row:
        return reader.record(row, where)
    text, title = row["text"], row.get("title") or ""  # a corpus of a BEIR folder has titles
    if not isinstance(text, str) or not isinstance(title, str):
        raise DataError(f"{where}, text", got=str(row)[:60], expected="a text, and a title that is one if there is any")
    joined = f"{title} {text}".strip()
    return Entry(joined) if joined else None
