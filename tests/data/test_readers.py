"""Every format gives the same records; what is left out is counted; the cache is used until data changes."""

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from codiemb.config import Source
from codiemb.data import store
from codiemb.data.store import load_records
from codiemb.errors import CheckpointError, DataError

ROWS = [
    {"query": "who sat", "positives": ["the cat", "a cat"], "negatives": ["a dog"]},
    {"query": "was heißt 雨", "positives": ["rain"], "negatives": []},
]
PAIRS = [("the cat sat", "a cat sat", 4.5), ("a, b", 'say "c"', 0.0), ("雨", "rain", 5.0)]
EXPECTED_PAIRS = [(left, [right], [score / 5]) for left, right, score in PAIRS]
COLUMNS = {"query": "sentence1", "positive": "sentence2", "score": "label"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def retrieval(path, **settings) -> Source:
    return Source(name="source", task="retrieval", path=str(path), **settings)


def similarity(path, **settings) -> Source:
    return Source(name="source", task="similarity", path=str(path), **settings)


def rows_of(source: Source) -> list[dict]:
    records = load_records(source)
    return records.rows(list(range(len(records))))


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def dictionaries() -> list[dict]:
    return [dict(zip(("sentence1", "sentence2", "label"), pair, strict=True)) for pair in PAIRS]


def write_jsonl(path):
    path.write_bytes(lines(ROWS))


def write_gzip(path):
    path.write_bytes(gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])))  # as `cat a.gz b.gz` makes it


def write_zstd(path):
    path.write_bytes(zstandard.compress(lines(ROWS[:1])) + zstandard.compress(lines(ROWS[1:])))


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_windows(path):
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n") + b"\r\n\r\n")


def write_without_last_newline(path):
    path.write_bytes(lines(ROWS).rstrip(b"\n"))


def write_saved(path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def write_folder(path):
    path.mkdir()
    (path / "only.jsonl").write_bytes(lines(ROWS))


RECORD_WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.json.zst": write_zstd,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "windows.jsonl": write_windows,
    "open-ended.jsonl": write_without_last_newline,
    "saved": write_saved,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", RECORD_WRITERS)
def test_records_of_every_format(tmp_path, name):
    RECORD_WRITERS[name](tmp_path / name)
    rows = rows_of(retrieval(tmp_path / name))
    assert [{field: row[field] for field in ROWS[0]} for row in rows] == ROWS
    assert [row["positive_scores"] for row in rows] == [[], []]


def csv_text(delimiter: str) -> str:
    quoted = [["sentence1", "sentence2", "label"], *([str(value) for value in pair] for pair in PAIRS)]
    return "".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row) + "\n" for row in quoted)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.zst", "a.jsonl", "a.parquet", "saved"])
def test_pairs_of_every_format_with_mapped_columns(tmp_path, name):
    path = tmp_path / name
    text = csv_text("\t" if ".tsv" in name else ",").encode()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(text))
    elif name == "a.jsonl":
        path.write_bytes(lines(dictionaries()))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(dictionaries()), path)
    elif name == "saved":
        import datasets

        datasets.disable_progress_bars()
        datasets.DatasetDict({"dev": datasets.Dataset.from_list(dictionaries())}).save_to_disk(str(path))
    else:
        path.write_bytes(text)
    source = similarity(path, columns=COLUMNS, score_range=(0, 5), split="dev" if name == "saved" else None)
    assert [(row["query"], row["positives"], row["positive_scores"]) for row in rows_of(source)] == EXPECTED_PAIRS


def test_a_csv_field_may_hold_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('q,p\n"two\nlines",x\n')
    rows = rows_of(retrieval(tmp_path / "a.csv", columns={"query": "q", "positive": "p"}))
    assert rows[0]["query"] == "two\nlines"


def test_several_columns_make_several_texts(tmp_path):
    (tmp_path / "a.tsv").write_text("q\tp1\tp2\tn\nwho\tone\ttwo\tthree\n")
    columns = {"query": "q", "positive": ["p1", "p2"], "negative": "n"}
    row = rows_of(retrieval(tmp_path / "a.tsv", columns=columns))[0]
    assert (row["positives"], row["negatives"]) == (["one", "two"], ["three"])


def test_splits_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("train", "test"):
        (tmp_path / "folder" / f"{name}.jsonl").write_bytes(lines([{"query": name, "positives": ["a"]}]))
    for name in ("train", "test"):
        assert rows_of(retrieval(tmp_path / "folder", split=name))[0]["query"] == name


def write_beir(folder, qrels: str, suffix: str = ""):
    def put(name, content: bytes):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)

    put("corpus.jsonl", lines({"_id": f"d{n}", "title": "T" if n == 1 else "", "text": f"text {n}"} for n in range(5)))
    put("queries.jsonl", lines({"_id": f"q{n}", "text": f"query {n}"} for n in range(3)))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text(qrels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_gains_make_scores_and_a_zero_makes_a_negative(tmp_path, suffix):
    header = "query-id\tcorpus-id\tscore\n"
    write_beir(tmp_path / "beir", header + "q0\td0\t2\nq0\td1\t1\nq0\td2\t0\nq2\td3\t1\n", suffix)
    first, second = rows_of(retrieval(tmp_path / "beir", split="train"))
    assert (first["id"], first["query"]) == ("q0", "query 0")
    assert first["positives"] == ["text 0", "T text 1"]  # the title stands before the text
    assert first["positive_scores"] == [2, 1]
    assert first["negatives"] == ["text 2"]
    assert (second["id"], second["positives"], second["negatives"]) == ("q2", ["text 3"], [])


def test_trec_qrels_of_four_columns_without_header(tmp_path):
    write_beir(tmp_path / "beir", "q1 0 d4 1\n")
    row = rows_of(retrieval(tmp_path / "beir", split="train"))[0]
    assert (row["query"], row["positives"]) == ("query 1", ["text 4"])


def test_what_a_beir_folder_lacks_is_counted(tmp_path):
    write_beir(tmp_path / "beir", "q0\td0\t1\nq0\tx\t1\nq1\ty\t1\nz\td0\t1\nq2\td0\t0\n")
    records = load_records(retrieval(tmp_path / "beir", split="train"))
    assert len(records) == 1
    assert records.texts_left_out == {"judgement of an absent document": 2, "judgement of an absent query": 1}
    assert records.dropped == {"no positive with text": 2}
    assert records.rows_read == 3


def test_triples_of_the_reference(tmp_path):
    """["task instruction", "instruction of this text", "text"]: the query's first part is the record's instruction."""
    row = {
        "query": ["Find a duplicate", "", "who sat"],
        "positives": [["", "", "the cat"], ["", "", "a cat"]],
        "negatives": [["Find a duplicate", "", "a dog"]],
    }
    (tmp_path / "a.jsonl").write_bytes(lines([row, {"query": ["", "", "x"], "positives": ["a", "b", "c"]}]))
    first, second = rows_of(retrieval(tmp_path / "a.jsonl"))
    assert (first["query"], first["instruction"]) == ("who sat", "Find a duplicate")
    assert (first["positives"], first["negatives"]) == (["the cat", "a cat"], ["a dog"])
    assert second["instruction"] is None
    assert second["positives"] == ["a", "b", "c"]  # three plain texts are no triple


@pytest.mark.parametrize(
    ("score_range", "scores", "expected"),
    [
        ((0, 5), [0, 2.5, 5], [0, 0.5, 1]),
        ((-1, 1), [-1, 0, 1], [0, 0.5, 1]),
        ((1, 4), [1, 2, 4], [0, 1 / 3, 1]),
        ((0, 1), [0, 0.25, 1], [0, 0.25, 1]),
    ],
)
def test_scores_are_brought_to_0_to_1(tmp_path, score_range, scores, expected):
    rows = [{"query": f"q{n}", "positives": ["p"], "positive_scores": [score]} for n, score in enumerate(scores)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    read = rows_of(similarity(tmp_path / "a.jsonl", score_range=score_range))
    assert [row["positive_scores"] for row in read] == [[pytest.approx(score)] for score in expected]


def test_what_is_left_out_is_counted(tmp_path):
    rows = [
        {"query": "a", "positives": ["b", " ", "b"], "negatives": ["b", "", "c"]},
        {"query": " ", "positives": ["b"]},
        {"query": "d", "positives": ["", "\t"]},
        {"query": "a", "positives": ["b"], "negatives": ["c"], "id": "the first again"},
        {"query": "a", "positives": ["c"]},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    records = load_records(retrieval(tmp_path / "a.jsonl"))
    assert records.rows_read == 5
    assert records.dropped == {"empty query": 1, "no positive with text": 1, "duplicate of an earlier row": 1}
    assert records.rows_read == len(records) + sum(records.dropped.values())
    assert records.texts_left_out == {
        "empty positive": 3,
        "positive listed before in its row": 1,
        "negative listed before in its row": 1,
        "empty negative": 1,
    }
    first, second = records.rows([0, 1])
    assert (first["positives"], first["negatives"]) == (["b"], ["c"])
    assert second["positives"] == ["c"]


def test_scores_stay_with_their_texts_when_some_are_left_out(tmp_path):
    row = {"query": "a", "positives": ["b", "", "c", "b"], "positive_scores": [1, 2, 3, 4]}
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    read = rows_of(retrieval(tmp_path / "a.jsonl"))[0]
    assert list(zip(read["positives"], read["positive_scores"], strict=True)) == [("b", 1), ("c", 3)]


def test_evaluation_keeps_duplicates(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([ROWS[0], ROWS[0]]))
    assert len(load_records(retrieval(tmp_path / "a.jsonl"))) == 1
    assert len(load_records(retrieval(tmp_path / "a.jsonl"), keep_duplicates=True)) == 2


def test_where_keeps_the_rows_that_match(tmp_path):
    rows = [{"query": str(n), "positives": ["a"], "clean": n != 1} for n in range(3)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    records = load_records(retrieval(tmp_path / "a.jsonl", where={"clean": True}))
    assert [row["query"] for row in records.rows([0, 1])] == ["0", "2"]
    assert records.dropped == {"left out by `where`": 1}


def test_equal_texts_have_equal_ids_everywhere(tmp_path):
    rows = [{"query": "a", "positives": ["b"], "negatives": ["c"]}, {"query": "c", "positives": ["a", "b"]}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    first, second = rows_of(retrieval(tmp_path / "a.jsonl"))
    assert first["query_id"] == second["positive_ids"][0]
    assert first["positive_ids"][0] == second["positive_ids"][1]
    assert first["negative_ids"][0] == second["query_id"]
    ids = load_records(retrieval(tmp_path / "a.jsonl")).text_ids()
    assert len(ids) == 6
    assert len(np.unique(ids)) == 3


# ---- the cache ----


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS))
    reads = []
    original = store.read_rows
    monkeypatch.setattr(store, "read_rows", lambda source: reads.append(source.path) or original(source))
    assert len(load_records(retrieval(path))) == 2
    assert len(load_records(retrieval(path))) == 2
    assert len(reads) == 1
    load_records(retrieval(path, where={"query": "who sat"}))  # other settings, other records
    assert len(reads) == 2
    path.write_bytes(lines(ROWS[:1]))
    assert len(load_records(retrieval(path))) == 1
    assert len(reads) == 3
    stamp = path.stat().st_mtime_ns
    path.write_bytes(lines(ROWS[:1]).replace(b"who", b"cat"))  # the same size; the time tells
    os.utime(path, ns=(stamp + 1_000_000, stamp + 1_000_000))
    assert rows_of(retrieval(path))[0]["query"] == "cat sat"


def test_a_changed_qrels_file_is_noticed(tmp_path):
    write_beir(tmp_path / "beir", "q0\td0\t1\n")
    assert len(load_records(retrieval(tmp_path / "beir", split="train"))) == 1
    (tmp_path / "beir" / "qrels" / "train.tsv").write_text("q0\td0\t1\nq1\td1\t1\n")
    assert len(load_records(retrieval(tmp_path / "beir", split="train"))) == 2


def test_rows_are_memory_mapped_arrow(tmp_path, cache):
    (tmp_path / "a.jsonl").write_bytes(lines({"query": f"{n} " * 50, "positives": [f"p{n}"]} for n in range(5000)))
    before = pa.total_allocated_bytes()
    records = load_records(retrieval(tmp_path / "a.jsonl"))
    assert len(records) == 5000
    assert [file["filename"] for file in records.table.cache_files] == [str(next(cache.rglob("*.arrow")))]
    assert pa.total_allocated_bytes() - before < 100_000  # the texts take over 1 MB
    assert records.rows([4999, 0])[0]["positives"] == ["p4999"]


def test_a_fault_leaves_nothing_in_the_cache(tmp_path, cache):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS) * 2000 + b"{broken\n")
    with pytest.raises(DataError, match="line 4001"):
        load_records(retrieval(tmp_path / "a.jsonl"))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    """The second half, as a file system leaves what it had no time to write."""
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("damage", [Path.unlink, emptied, zeroed])
def test_what_a_power_cut_or_a_cleaner_has_left_is_read_again(tmp_path, cache, monkeypatch, suffix, damage):
    monkeypatch.setattr(store, "_ROWS_AT_ONCE", 1)
    (tmp_path / "a.jsonl").write_bytes(lines({"query": f"q{n}", "positives": [f"p{n}"]} for n in range(20)))
    expected = rows_of(retrieval(tmp_path / "a.jsonl"))
    damage(next(path for path in cache.rglob(f"*{suffix}")))
    assert rows_of(retrieval(tmp_path / "a.jsonl")) == expected


def test_a_full_disk_of_the_cache_names_the_cache(tmp_path, cache, monkeypatch):
    """It is often another disk than the one of the run."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "sync", full)
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(CheckpointError, match=rf"writing {cache}.*No space left.*set CODIEMB_CACHE"):
        load_records(retrieval(tmp_path / "a.jsonl"))


def load_at_once(start, path, locks, told):
    """One of several processes; it tells when it reads and what it got."""
    original = store.read_rows

    def slowly(source):
        told.put("reads")
        time.sleep(1)
        return original(source)

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    store.read_rows = slowly
    if not locks:
        fcntl.lockf = refused
    start.wait()
    try:
        told.put(len(load_records(retrieval(path))))
    except DataError:
        told.put("fault")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "locks", "expected"),
    [
        (ROWS, True, [2, 2, "reads"]),
        (ROWS, False, [2, 2, "reads", "reads"]),
        ([0], True, ["fault", "fault", "reads", "reads"]),
    ],
)
def test_of_processes_that_start_at_once_one_reads(tmp_path, rows, locks, expected):
    """After a fault the next one reads, and finds the same; a file system without locks is used without."""
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    spawn = multiprocessing.get_context("spawn")
    start, told = spawn.Barrier(2), spawn.SimpleQueue()
    arguments = (start, tmp_path / "a.jsonl", locks, told)
    processes = [spawn.Process(target=load_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = []
    while not told.empty():
        found.append(told.get())
    assert sorted(found, key=str) == expected
