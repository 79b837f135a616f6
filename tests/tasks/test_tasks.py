"""The settings of the tasks, and what a batch of each holds."""

import json

import numpy as np
import pytest
import torch

from codiemb.batching.loader import StepReader
from codiemb.batching.plan import Batch, Plan
from codiemb.config import Batching, Losses, Source
from codiemb.data.store import load_records
from codiemb.errors import ConfigError, DataError
from codiemb.settings_file import validate

LABELLED = [
    {"text": "a b", "label": "x"},
    {"text": "a c", "label": "y"},
    {"text": "a d", "label": "x"},
    {"text": "a e", "label": "z"},
    {"text": "a f", "label": "x"},
    {"text": "a g", "label": "y"},
]


def pair_weights(task, **given):
    settings = getattr(Losses(**{task: given}), task)
    return {name: value for name, value in settings.model_dump().items() if name in TASK_LOSSES and value}


TASK_LOSSES = {"pearson", "rank_kl", "pro", "mid_nce", "cosent", "angle", "list_net", "list_mle", "cosine_mse"}
CODIEMB = {"pearson": 2, "rank_kl": 5, "pro": 0.5, "mid_nce": 1}


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [
        ("similarity", {}, CODIEMB),
        ("similarity", {"pearson": 3}, {**CODIEMB, "pearson": 3}),
        ("similarity", {"mid_nce": 0}, {"pearson": 2, "rank_kl": 5, "pro": 0.5}),
        ("similarity", {"cosent": 1}, {"cosent": 1}),
        ("similarity", {"cosent": 1, "pearson": 2}, {"cosent": 1, "pearson": 2}),
        ("similarity", {"cosent": 0}, CODIEMB),
        ("similarity", {**CODIEMB, "cosent": 1}, {**CODIEMB, "cosent": 1}),
        ("pair_classification", {}, {"cosent": 1}),
        ("pair_classification", {"pearson": 2}, {"pearson": 2}),
        ("pair_classification", {"cosent": 2}, {"cosent": 2}),
    ],
)
def test_which_losses_of_pairs_are_on(task, given, expected):
    assert pair_weights(task, **given) == expected


def test_resolved_weights_are_read_back_as_they_are():
    resolved = Losses(similarity={"cosent": 1}).model_dump()
    assert Losses(**resolved).model_dump() == resolved


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ConfigError, match="all weights are 0"):
        validate(Losses, {"pair_classification": {"cosent": 0}}, "config")


def test_defaults_differ_by_task():
    losses, batching = Losses(), Batching()
    assert losses.retrieval.type == "info_nce"
    assert losses.reranking.type == "list_softmax"
    assert Losses(reranking={"temperature": 0.1}).reranking.type == "list_softmax"
    assert (batching.retrieval.positives, batching.classification.positives) == (2, 1)


def reader_of(tmp_path, encoder, task, rows, columns=None, **batching):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(name="rows", task=task, path=str(path), columns=columns)
    records = {"rows": load_records(source)}
    plan = Plan({"rows": len(records["rows"])}, {"rows": task}, Batching(**{task: batching}), seed=3)
    return StepReader(plan, records, encoder, 0, 1)


def batch_of(reader, places, pass_number=0):
    return reader.batch(Batch("rows", np.array(places), pass_number))[1]


@pytest.mark.parametrize("task", ["classification", "clustering"])
def test_texts_of_one_label_are_positives_and_others_negatives(tmp_path, tiny_encoder, task):
    columns = {"query": "text", "label": "label"}
    reader = reader_of(tmp_path, tiny_encoder, task, LABELLED, columns, positives=1, negatives=2)
    labels = [row["label"] for row in LABELLED]
    drawn = set()
    for pass_number in range(20):
        batch = batch_of(reader, [0, 1, 3, 4], pass_number)
        relevant = dict(batch["relevant"].tolist())  # owner -> id of its label
        assert relevant[0] == relevant[3] != relevant[1] != relevant[2]
        for owner, place in enumerate([0, 1, 3, 4]):
            mine = batch["owner"] == owner
            assert (batch["document_ids"][mine & batch["positive"]] == relevant[owner]).all()
            assert (batch["document_ids"][mine & ~batch["positive"]] != relevant[owner]).all()
            assert (mine & batch["positive"]).sum() == (labels[place] != "z")  # the only z has no partner
            assert (mine & ~batch["positive"]).sum() == 2
        drawn |= {tuple(batch["document_ids"].tolist())}
    assert len(drawn) > 5  # drawn anew in every pass


def test_a_text_is_never_its_own_positive(tmp_path, tiny_encoder):
    reader = reader_of(tmp_path, tiny_encoder, "classification", LABELLED, {"query": "text", "label": "label"})
    records = reader.records["rows"]
    for seed in range(30):
        same, other = records.by_label(2, 5, 5, np.random.default_rng(seed))
        assert set(same) == {0, 4}
        assert set(other) == {1, 3, 5}


def test_unified_records_serve_classification_too(tmp_path, tiny_encoder):
    rows = [{"query": "a", "positives": ["b"], "negatives": ["c"]}, {"query": "d", "positives": ["e"]}]
    batch = batch_of(reader_of(tmp_path, tiny_encoder, "classification", rows), [0, 1])
    assert batch["owner"].tolist() == [0, 0, 1]
    assert batch["positive"].tolist() == [True, False, True]


def test_graded_lists_bring_their_scores(tmp_path, tiny_encoder):
    rows = [
        {"query": "a", "positives": ["b", "c"], "positive_scores": [3, 1], "negatives": ["d"], "negative_scores": [0]},
        {"query": "e", "positives": ["f"], "negatives": ["g"]},
    ]
    batch = batch_of(reader_of(tmp_path, tiny_encoder, "reranking", rows), [0, 1])
    torch.testing.assert_close(batch["scores"], torch.tensor([3.0, 1.0, 0.0, 1.0, 0.0]))
    assert batch["slot"].tolist() == [0, 1, -1, 0, -1]


@pytest.mark.parametrize(
    ("task", "rows", "columns", "message"),
    [
        ("classification", [{"text": "a"}], {"query": "text", "label": "label"}, "no such column"),
        ("classification", [{"text": "a", "label": 0.5}], {"query": "text", "label": "label"}, "a whole number"),
        ("classification", [{"query": "a"}], None, "at least one positive text, or a label"),
        ("classification", [{"query": "a", "label": "x"}, {"query": "b", "positives": ["c"]}], None, "in all rows"),
        ("classification", [{"query": "a", "positives": ["b"], "label": "x"}], None, "a label, and positives"),
        ("clustering", [{"query": "a", "negatives": ["b"], "label": "x"}], None, "a label, and positives"),
        ("reranking", [{"query": "a", "positives": ["b"], "positive_scores": [-1]}], None, "a score below 0"),
        ("pair_classification", [{"query": "a", "positives": ["b"]}], None, "task is pair_classification"),
    ],
)
def test_rows_that_a_task_cannot_use_are_refused(tmp_path, tiny_encoder, task, rows, columns, message):
    with pytest.raises(DataError, match=message):
        reader_of(tmp_path, tiny_encoder, task, rows, columns)


@pytest.mark.parametrize("task", ["retrieval", "reranking", "similarity", "pair_classification"])
def test_a_label_column_is_refused_where_it_would_be_passed_over(task):
    columns = {"query": "a", "positive": "b", "label": "label"}
    with pytest.raises(ConfigError, match=r"columns\.label: got a column.*only classification, clustering"):
        validate(Source, {"name": "s", "task": task, "path": "s.jsonl", "columns": columns}, "config")
