"""A suite of every task: files, cache, and models of other kinds."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

import codiemb
from codiemb.encoder import engine
from codiemb.errors import EvaluationError
from codiemb.evaluation import cache, classification, clustering, retrieval
from codiemb.evaluation.cache import model_hash
from codiemb.evaluation.evaluate import evaluate
from codiemb.evaluation.suite import HEADLINE, evaluate_suite
from codiemb.suites.suite import DataSet, load_suite

TEXTS = ["a b c", "b d", "c a e f", "g", "h i j k", "l m", "n o p q r", "s t"]
LISTS = [
    {"query": text, "positives": [TEXTS[n - 1]], "negatives": [TEXTS[n - 3], TEXTS[n - 5]]}
    for n, text in enumerate(TEXTS)
]
PAIRS = [{"query": text, "positives": [TEXTS[n - 1]], "positive_scores": [n % 3 / 2]} for n, text in enumerate(TEXTS)]
CLASSES = [{**pair, "positive_scores": [n % 2]} for n, pair in enumerate(PAIRS)]
LABELLED = [{"query": text, "label": "xyx"[n % 3]} for n, text in enumerate(TEXTS)]
ROWS = {
    "retrieval": LISTS,
    "similarity": PAIRS,
    "pair_classification": CLASSES,
    "classification": LABELLED,
    "clustering": LABELLED,
    "reranking": LISTS,
}


@pytest.fixture
def suite_file(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "DRAWN", 20)
    monkeypatch.setattr(clustering, "EXPERIMENTS", 2)
    monkeypatch.setattr(classification, "EXPERIMENTS", 2)
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))
    for task, rows in ROWS.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [{"name": task, "task": task, "path": f"{task}.jsonl"} for task in ROWS]
    entries[3]["train_path"] = "clustering.jsonl"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path / "suite.yaml"


COLUMNS = {
    "retrieval": ["query_id", "query", "ndcg_at_10", "mrr_at_10", "map", "recall_at_100", "retrieved"],
    "similarity": ["pair", "text1", "text2", "cosine", "label"],
    "pair_classification": ["pair", "text1", "text2", "cosine", "label"],
    "classification": ["text", "label", "accuracy", "guess"],
    "clustering": ["experiment", "v_measure", "ami"],
    "reranking": ["query_id", "query", "map", "mrr_at_10", "ndcg_at_10", "retrieved"],
}


def test_every_task_has_its_files(tiny_encoder, suite_file, tmp_path):
    results = evaluate(tiny_encoder, suite_file, tmp_path / "out")
    for task in ROWS:
        written = json.loads((tmp_path / "out" / f"{task}.json").read_text())
        assert (written["dataset"], written["task"], written["n"]) == (task, task, len(TEXTS))
        assert written["metrics"] == results[task]
        assert 0 < results[task][HEADLINE[task]] <= 1
        items = pq.read_table(tmp_path / "out" / written["items"])
        assert items.column_names == COLUMNS[task]
        if HEADLINE[task] in items.column_names:
            assert np.mean(items[HEADLINE[task]].to_pylist()) == pytest.approx(results[task][HEADLINE[task]])


def test_the_first_documents_are_kept_with_their_texts(tiny_encoder, suite_file, tmp_path):
    """Without them nobody sees what a model found instead."""
    evaluate(tiny_encoder, suite_file, tmp_path / "out")
    items = pq.read_table(tmp_path / "out" / "retrieval.items.parquet").to_pylist()
    for row, asked in zip(items, LISTS, strict=True):
        assert row["query"] == asked["query"]
        scores = [hit["score"] for hit in row["retrieved"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        assert {hit["text"] for hit in row["retrieved"] if hit["gain"]} <= set(asked["positives"])
        place = (
            [hit["gain"] for hit in row["retrieved"]].index(1) + 1 if any(h["gain"] for h in row["retrieved"]) else 0
        )
        assert place == 0 or row["mrr_at_10"] == pytest.approx(1 / place)


@pytest.mark.parametrize("at_once", [1, 3])
def test_rankings_are_held_for_some_queries_at_a_time(tiny_encoder, tmp_path, suite_file, monkeypatch, at_once):
    source = DataSet(name="x", task="retrieval", path=str(tmp_path / "retrieval.jsonl"))
    whole = retrieval.evaluate(tiny_encoder, source, retrieval.load_collection(source))
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", at_once)
    monkeypatch.setattr(retrieval, "MOST_SCORES", 2 * whole.facts["documents"])
    parts = retrieval.evaluate(tiny_encoder, source, retrieval.load_collection(source))
    assert (parts.metrics, parts.n, list(parts.items)) == (whole.metrics, whole.n, list(whole.items))
    for column, values in parts.items.items():
        expected = whole.items[column]
        if column == "retrieved":  # scores of products of other shapes may differ in the last bit
            values, expected = ([[hit["id"] for hit in hits] for hits in found] for found in (values, expected))
        assert values == expected, column


def refuse(*_, **__):
    raise AssertionError("a text was encoded again")


@pytest.fixture
def said(caplog):
    """What the library tells, by data set."""
    logging.getLogger("codiemb").propagate = True
    caplog.set_level(logging.INFO, logger="codiemb")
    return lambda: [line for line in caplog.messages if "as scored before" in line]


def test_what_is_equal_is_scored_once(tiny_encoder, tiny_model_folder, suite_file, tmp_path, monkeypatch, said):
    """Also under another name and in another folder, and from a fresh copy of the model."""
    first = evaluate(tiny_encoder, suite_file, tmp_path / "out")
    assert said() == []
    entries = yaml.safe_load(suite_file.read_text())
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump([{**entry, "name": f"my-{entry['name']}"} for entry in entries])
    )
    monkeypatch.setattr(engine, "encode", refuse)
    again = evaluate(
        SentenceTransformer(str(tiny_model_folder), device="cpu"), tmp_path / "other.yaml", tmp_path / "o2"
    )
    assert {f"my-{name}": metrics for name, metrics in first.items()} == again
    assert len(said()) == len(ROWS)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("out/retrieval.json", "o2/my-retrieval.json"))
    assert two == {**one, "dataset": "my-retrieval", "items": "my-retrieval.items.parquet"}
    tables = [
        pq.read_table(tmp_path / name) for name in ("out/retrieval.items.parquet", "o2/my-retrieval.items.parquet")
    ]
    assert tables[0].equals(tables[1])


def change_a_weight(encoder):
    with torch.no_grad():
        encoder[0].model.embeddings.word_embeddings.weight[7] += 1e-3


CHANGES = {
    "weight": change_a_weight,
    "prompt": lambda encoder: encoder.prompts.update(query="q: ", document="q: ", similarity="q: "),
    "length": lambda encoder: setattr(encoder, "max_seq_length", 3),
    "pooling": lambda encoder: setattr(encoder[1], "pooling_mode", "cls"),
    "dimensions": lambda encoder: setattr(encoder, "truncate_dim", 8),
    "truncation side": lambda encoder: setattr(encoder.tokenizer, "truncation_side", "left"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_scored_anew(tiny_encoder, suite_file, said, change):
    """A stale result would be the worst harm a cache can do."""
    suite = load_suite(suite_file)[:2]
    before = evaluate(tiny_encoder, suite)
    CHANGES[change](tiny_encoder)
    after = evaluate(tiny_encoder, suite)
    assert said() == []
    if change not in ("weight", "truncation side"):
        assert after != before


def test_another_file_is_scored_anew(tiny_encoder, suite_file, tmp_path, said):
    evaluate(tiny_encoder, suite_file)
    rows = [{**LISTS[0], "negatives": ["z z"]}, *LISTS[1:]]
    (tmp_path / "retrieval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(tiny_encoder, suite_file)
    assert len(said()) == len(ROWS) - 1


def test_a_damaged_result_is_scored_anew(tiny_encoder, suite_file, tmp_path, said):
    first = evaluate(tiny_encoder, suite_file)
    for number, file in enumerate(sorted((tmp_path / "cache" / "evaluations").iterdir())):
        file.write_bytes(file.read_bytes()[: 20 * (number % 3)])
    assert evaluate(tiny_encoder, suite_file) == first
    assert said() == []
    for file in (tmp_path / "cache" / "evaluations").glob("*.json"):
        file.write_text("null")
    assert evaluate(tiny_encoder, suite_file) == first


def test_a_cache_that_cannot_be_written_loses_no_result(tiny_encoder, suite_file, tmp_path, monkeypatch, caplog):
    """After a training, too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "file"))
    cache.keep("key", {"metrics": {}}, pa.table({"x": [1]}))
    assert "not kept" in caplog.text


def test_two_processes_may_keep_the_same_result(tmp_path, monkeypatch):
    """Seeds that start together all score the same base; one must not take the other's unfinished file away."""
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path))
    written = cache.write

    def meanwhile(*arguments):
        monkeypatch.setattr(cache, "write", written)
        written(*arguments)
        cache.keep("key", {"metrics": {}, "n": 1, "seconds": 2}, pa.table({"x": [2]}))

    monkeypatch.setattr(cache, "write", meanwhile)
    cache.keep("key", {"metrics": {}, "n": 1, "seconds": 1}, pa.table({"x": [1]}))
    content, items = cache.find("key")
    assert (content["seconds"], items["x"].to_pylist()) == (1, [1])
    assert {path.name for path in (tmp_path / "evaluations").iterdir()} == {"key.json", "key.parquet"}


def test_the_hash_is_that_of_the_saved_model_and_outlives_a_call(tiny_encoder, tiny_model_folder, tmp_path):
    """The tokenizer keeps the lengths of its last call, which are no part of the model."""
    before = model_hash(tiny_encoder)
    tiny_encoder.encode(["a b", "c"])
    assert model_hash(tiny_encoder) == before
    tiny_encoder.save(str(tmp_path / "saved"), create_model_card=False)
    assert model_hash(SentenceTransformer(str(tmp_path / "saved"), device="cpu")) == before
    assert model_hash(object()) is None


def test_a_model_that_hides_its_weights_is_not_cached(tiny_encoder):
    """A module of one's own may hold them anywhere."""

    class Own(torch.nn.Module):
        def forward(self, features):
            return features

    tiny_encoder.append(Own())
    assert model_hash(tiny_encoder) is None


class Plain:
    """An object with `encode` and nothing else."""

    def __init__(self, model, form=np.asarray):
        self.model, self.form = model, form

    def encode(self, texts):
        assert isinstance(texts, list)
        return self.form(self.model.encode(texts))


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, np.ndarray.tolist], ids=["array", "tensor", "list"])
def test_any_object_with_encode_scores_as_the_model_in_it(tiny_encoder, suite_file, tmp_path, form):
    expected = evaluate(tiny_encoder, suite_file)
    found = evaluate(Plain(tiny_encoder, form), suite_file, tmp_path / "out")
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6), name
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text())["model_hash"] is None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda rows: rows[:1], "expected .*, dim"),
        (lambda rows: rows[0], "expected .*, dim"),
        (lambda rows: "no", "got 'no'"),
        (lambda rows: rows * np.nan, "nan"),
    ],
    ids=["too few rows", "one row", "a word", "nan"],
)
def test_what_is_no_embedding_is_refused(tiny_encoder, suite_file, form, words):
    with pytest.raises(EvaluationError, match=words):
        evaluate(Plain(tiny_encoder, form), suite_file)


def test_a_model_without_encode_is_refused(suite_file):
    with pytest.raises(EvaluationError, match="got a dict, expected an object with `encode`"):
        evaluate({}, suite_file)


def test_the_package_offers_it(tiny_model_folder, suite_file):
    """By the folder's name, and with the data sets already loaded."""
    found = codiemb.evaluate(str(tiny_model_folder), load_suite(suite_file))
    encoder = SentenceTransformer(str(tiny_model_folder), device="cpu")
    for name, metrics in evaluate_suite(encoder, load_suite(suite_file), None).items():
        assert found[name] == pytest.approx(metrics, abs=1e-5)


def test_public_names():
    assert sorted(codiemb.__all__) == ["__version__", "analyze", "evaluate", "fuse", "load_config", "train"]
