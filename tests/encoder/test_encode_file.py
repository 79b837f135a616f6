"""Files of texts to files of embeddings: order, ids, chunks, and nothing left of what failed."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codiemb.encoder import encode_file as module
from codiemb.encoder.encode_file import encode_file, require_output
from codiemb.encoder.model import set_lengths
from codiemb.errors import ConfigError, DataError

TEXTS = ["a b c d e f", "b", "c a e f", "g h", "h i j k", "l m", "n o p q r", "b", "s t", "t"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last of them short."""
    monkeypatch.setattr(module, "CHUNK", 4)


def expected(encoder, texts, **settings):
    return encoder.encode(list(texts), normalize_embeddings=True, batch_size=1, **settings)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def inputs(folder):
    rows = [{"_id": f"d{n}", "text": text} for n, text in enumerate(TEXTS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    (folder / "in.txt").write_text("\n".join(TEXTS))
    with gzip.open(folder / "in.txt.gz", "wt") as file:
        file.write("\n".join(TEXTS) + "\n")
    return {
        "jsonl": jsonl(folder / "in.jsonl", rows),
        "parquet": folder / "in.parquet",
        "lines": folder / "in.txt",
        "compressed": folder / "in.txt.gz",
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "lines", "compressed"])
def test_order_is_kept_in_both_formats(tiny_encoder, tmp_path, kind):
    path = inputs(tmp_path)[kind]
    for suffix in module.OUTPUTS:
        assert encode_file(tiny_encoder, path, tmp_path / f"out{suffix}") == len(TEXTS)
    found = np.load(tmp_path / "out.npy", mmap_mode="r")
    np.testing.assert_allclose(found, expected(tiny_encoder, TEXTS), atol=1e-5)
    table = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), found)
    ids = [f"d{n}" for n in range(len(TEXTS))]
    assert table.column_names == (["id", "embedding"] if kind in ("jsonl", "parquet") else ["embedding"])
    assert kind not in ("jsonl", "parquet") or table["id"].to_pylist() == ids


def test_ids_that_only_some_rows_have(tiny_encoder, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b", "id": 7}])
    encode_file(tiny_encoder, path, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == [None, "7"]


def test_an_id_after_a_chunk_without_is_not_dropped(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c", "id": 7}])
    with pytest.raises(DataError, match="the id '7'"):
        encode_file(tiny_encoder, path, tmp_path / "out.parquet")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl"]


def test_columns_are_joined_as_beir_joins_them(tiny_encoder, tmp_path):
    path = jsonl(
        tmp_path / "in.jsonl", [{"title": "a", "text": "b c"}, {"title": "", "text": "d"}, {"title": None, "text": "e"}]
    )
    encode_file(tiny_encoder, path, tmp_path / "out.npy", columns=("title", "text"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(tiny_encoder, ["a b c", "d", "e"]), atol=1e-5)


def test_the_role_chooses_prompt_and_length(tiny_encoder, tmp_path):
    tiny_encoder.prompts = {"query": "q: ", "document": "", "similarity": "s "}
    set_lengths(tiny_encoder, {"query": 6, "document": 20, "similarity": 20})
    path = inputs(tmp_path)["lines"]
    found = {}
    for role in ("query", "document", "similarity"):
        encode_file(tiny_encoder, path, tmp_path / f"{role}.npy", role=role)
        found[role] = np.load(tmp_path / f"{role}.npy")
    np.testing.assert_allclose(found["document"], expected(tiny_encoder, TEXTS), atol=1e-5)
    np.testing.assert_allclose(found["similarity"], expected(tiny_encoder, TEXTS, prompt_name="similarity"), atol=1e-5)
    cut = expected(tiny_encoder, ["q: a b"])[0]  # [CLS] q : a b [SEP]
    np.testing.assert_allclose(found["query"][0], cut, atol=1e-5)


BAD = {
    "invalid JSON": ('{"text": "a"}\n' * 5 + "{oops\n", {}, "in.jsonl, line 6: got invalid JSON"),
    "no such column": ('{"body": "a"}\n', {}, "line 1, text: got no such column, expected one of body after --column"),
    "a number": ('{"text": "a"}\n{"text": 3}\n', {}, "line 2, text: got 3, expected a text"),
    "null": ('{"text": null}\n', {}, "line 1, text: got no text"),
    "empty": ("", {}, "in.jsonl: got no text"),
}


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_and_nothing_is_left(tiny_encoder, tmp_path, case, suffix):
    content, settings, words = BAD[case]
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        encode_file(tiny_encoder, tmp_path / "in.jsonl", tmp_path / f"out{suffix}", **settings)
    assert words in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_failure_keeps_the_earlier_output(tiny_encoder, tmp_path):
    (tmp_path / "out.npy").write_bytes(b"earlier")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 5 + "{\n")
    with pytest.raises(DataError):
        encode_file(tiny_encoder, tmp_path / "in.jsonl", tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_bytes() == b"earlier"


def test_lines_are_read_as_they_are_encoded(tiny_encoder, tmp_path, monkeypatch):
    """Else a corpus larger than memory could not be encoded."""
    read, seen = [], []

    def rows(source):
        for n in range(20):
            read.append(n)
            yield f"line {n + 1}", {"text": "a"}

    def embed(encoder, texts, **_):
        seen.append((len(read), len(texts)))
        return np_rows(len(texts))

    monkeypatch.setattr(module, "read_rows", rows)
    monkeypatch.setattr(module, "encode_on_all_ranks", embed)
    (tmp_path / "in.jsonl").write_text("")
    encode_file(tiny_encoder, tmp_path / "in.jsonl", tmp_path / "out.npy")
    assert seen == [(4, 4), (8, 4), (12, 4), (16, 4), (20, 4)]


def np_rows(count):
    import torch

    return torch.zeros(count, 3)


@pytest.mark.parametrize("name", ["out.csv", "out", "in.parquet", "folder.npy"])
def test_outputs_that_are_refused(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ConfigError, match="--output"):
        require_output(tmp_path / name, tmp_path / "in.parquet")
