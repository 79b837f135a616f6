"""The texts of a step are one set, whatever batches and tasks they are of."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from codiemb.batching.loader import StepReader, signals_wait
from codiemb.batching.plan import Batch, Plan, Step
from codiemb.config import Batching, Source
from codiemb.data.store import load_records

SEARCH = [{"query": "ab", "positives": ["cd", "efg"]}, {"query": "cd", "positives": ["hij"]}]
PAIRS = [
    {"query": "ab", "positives": ["xyz"], "positive_scores": [1]},
    {"query": "cd", "positives": ["ab"], "positive_scores": [0]},
]
STEP = Step((Batch("search", np.array([0, 1]), 0), Batch("pairs", np.array([1, 0]), 0)))


def reader(encoder, folder, rank=0, world=1):
    records = {}
    for name, task, rows in (("search", "retrieval", SEARCH), ("pairs", "similarity", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records[name] = load_records(Source(name=name, task=task, path=str(folder / f"{name}.jsonl")))
    plan = Plan({"search": 2, "pairs": 2}, {"search": "retrieval", "pairs": "similarity"}, Batching(), seed=0)
    return StepReader(plan, records, encoder, rank, world)


def text_of(encoder, inputs, place):
    """The letters at a place among the outputs of all micro-batches."""
    rows = [
        row[mask > 0]
        for one in inputs["micro_batches"]
        for row, mask in zip(one["input_ids"], one["attention_mask"], strict=True)
    ]
    return encoder.tokenizer.decode(rows[place], skip_special_tokens=True).replace(" ##", "")


def test_a_text_of_both_tasks_is_encoded_once(tiny_encoder, tmp_path):
    """ab, cd, efg, hij, xyz: five texts are listed nine times."""
    inputs = reader(tiny_encoder, tmp_path)[STEP]
    assert sum(len(one["input_ids"]) for one in inputs["micro_batches"]) == 5
    search, pairs = inputs["batches"]
    assert [text_of(tiny_encoder, inputs, place) for place in search["place"]] == ["ab", "cd", "cd", "efg", "hij"]
    assert [text_of(tiny_encoder, inputs, place) for place in pairs["place"]] == ["cd", "ab", "ab", "xyz"]
    assert inputs["tokens"] == 4 + 4 + 3 * 5  # a letter is a token, and [CLS] and [SEP]


def test_a_rank_without_rows_runs_one_text(tiny_encoder, tmp_path):
    inputs = reader(tiny_encoder, tmp_path, rank=2, world=3)[STEP]
    assert [len(batch["place"]) for batch in inputs["batches"]] == [0, 0]
    assert sum(len(one["input_ids"]) for one in inputs["micro_batches"]) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_disjoint_rows_in_order(tiny_encoder, tmp_path, rank):
    search, pairs = reader(tiny_encoder, tmp_path, rank, 2)[STEP]["batches"]
    assert (search["first_row"], search["rows"], pairs["first_row"], pairs["rows"]) == (rank, 1, rank, 1)
    assert torch.equal(search["owner"], torch.zeros(2 - rank, dtype=torch.int64))


def take_a_signal():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_worker_does_not_end_of_a_signal_while_it_starts():
    with signals_wait():
        worker = multiprocessing.get_context("fork").Process(target=take_a_signal)
        worker.start()
    worker.join()
    assert worker.exitcode == 0
