"""BEIR folders: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`), qrels/<split>.tsv.

A document's text is its title and its text joined by a space, as mteb does. Gains are kept: a judgement above 0 makes
a positive with its gain as score, a judgement of 0 makes a hard negative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from codiemb.config import Source
from codiemb.data.readers import beir_files, beir_qrels, read_jsonl, read_lines
from codiemb.data.records import Record, RowReader
from codiemb.errors import DataError, short

Qrels = dict[str, dict[str, float]]
MOST_GAIN = 1000  # trec_eval's memory grows with the largest; a larger one is an id or a time in the wrong column


def read_qrels(path: Path) -> Qrels:
    """Judgements as {query id: {document id: gain}}; three columns with a header, or TREC's four.

    Raises:
        DataError: a line of another form, or no judgement at all.
    """
    qrels: Qrels = {}
    for number, line in read_lines(path):
        parts = line.rstrip("\r\n").split("\t")
        if len(parts) == 1:
            parts = line.split()
        if not parts or parts == [""] or (number == 1 and not _is_number(parts[-1])):
            continue
        if len(parts) not in (3, 4) or not _is_number(parts[-1]):
            raise DataError(
                f"file {path}, line {number}",
                got=short(line.strip()),
                expected="query-id, corpus-id and score, separated by tabs",
            )
        query, document, gain = parts[0], parts[-2], float(parts[-1])
        if gain != int(gain):
            raise DataError(f"file {path}, line {number}", got=f"the gain {gain:g}", expected="a whole number")
        if abs(gain) > MOST_GAIN:
            raise DataError(f"file {path}, line {number}", got=f"the gain {gain:g}", expected=f"at most {MOST_GAIN}")
        qrels.setdefault(query, {})[document] = gain
    if not qrels:
        raise DataError(f"file {path}", got="no judgement", expected="lines of query-id, corpus-id, score")
    return qrels


def read_corpus(path: Path, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """(document id, text) of the corpus, or of the `wanted` documents only."""
    for where, row in read_jsonl(path):
        key, text = _identified(row, where)
        if wanted is None or key in wanted:
            title = row.get("title") or ""
            yield key, f"{title} {text}".strip() if title else text


def read_queries(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """(query id, text, instruction or None) of the queries file."""
    for where, row in read_jsonl(path):
        key, text = _identified(row, where)
        instruction = row.get("instruction")
        if instruction is not None and not isinstance(instruction, str):
            raise DataError(f"{where}, instruction", got=short(instruction), expected="a text")
        yield key, text, instruction


def present(qrels: Qrels, queries: set[str], documents: set[str], where: str) -> tuple[Qrels, Counter[str]]:
    """The judgements whose query and document exist, and how many do not.

    Raises:
        DataError: nothing with a gain above 0 is left.
    """
    absent: Counter[str] = Counter()
    left: Qrels = {}
    for query, gains in qrels.items():
        if query not in queries:
            absent["judgement of an absent query"] += len(gains)
            continue
        kept = {document: gain for document, gain in gains.items() if document in documents}
        if len(kept) < len(gains):
            absent["judgement of an absent document"] += len(gains) - len(kept)
        left[query] = kept
    if not any(gain > 0 for gains in left.values() for gain in gains.values()):
        total = sum(len(gains) for gains in qrels.values())
        counted = ", ".join(f"{count} {reason}" for reason, count in absent.items()) or "no gain above 0"
        raise DataError(
            where,
            got=f"no relevant pair left of {total} ({counted})",
            expected="qrels whose ids occur in queries.jsonl and corpus.jsonl",
        )
    return left, absent


def beir_records(source: Source, reader: RowReader) -> Iterator[Record | None]:
    """Training records of a BEIR folder: one for each judged query of the split (None: left out, counted)."""
    corpus_file, queries_file = beir_files(Path(source.path))
    qrels_file = beir_qrels(source)
    qrels = read_qrels(qrels_file)
    documents = dict(read_corpus(corpus_file, {document for gains in qrels.values() for document in gains}))
    queries = {key: (text, instruction) for key, text, instruction in read_queries(queries_file) if key in qrels}
    qrels, absent = present(qrels, set(queries), set(documents), f"file {qrels_file}")
    reader.texts_left_out.update(absent)
    for key, gains in qrels.items():
        relevant = {document: gain for document, gain in gains.items() if gain > 0}
        if not relevant:
            reader.dropped["no positive with text"] += 1
            yield None
            continue
        text, instruction = queries[key]
        negatives = [documents[document] for document, gain in gains.items() if gain <= 0]
        yield reader.clean(
            text,
            [documents[document] for document in relevant],
            negatives,
            list(relevant.values()),
            [],
            instruction,
            key,
        )


def _identified(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, dict) or row.get("_id") is None or not isinstance(row.get("text"), str):
        raise DataError(where, got=short(row), expected='an object with "_id" and "text"')
    return str(row["_id"]), row["text"]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
