"""Evaluation on several ranks gives the files and the numbers of one process."""

import json
import os
import subprocess
import sys
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from sentence_transformers import SentenceTransformer

from codiemb.encoder import engine
from codiemb.encoder.engine import shares
from codiemb.encoder.tokens import Text
from codiemb.evaluation import clustering, retrieval
from codiemb.evaluation.suite import evaluate_suite
from codiemb.suites.suite import load_suite

KEPT = 9  # documents of a ranking, so that the lists of the ranks must be cut when they are put together
LETTERS = "abcdefghijklmnopqrstuvwxyz"
random = np.random.default_rng(0)


def words(most):
    """A text of 1 to `most` words of one letter."""
    return " ".join(random.choice(list(LETTERS), random.integers(1, most + 1)))


SETS = {
    "search": [
        {
            "query": words(6),
            "positives": [words(20), words(3)][: 1 + n % 2],
            "positive_scores": [2, 1][: 1 + n % 2],
            "negatives": [words(9), "the same text"],
        }
        for n in range(23)
    ],
    "one_query": [{"query": "a b", "positives": ["b c"], "negatives": ["d"]}],
    "pairs": [
        {"query": words(8), "positives": [words(5) if n % 3 else "z"], "positive_scores": [n % 5 / 4]}
        for n in range(17)
    ],
    "classes": [{"query": words(8), "positives": [words(5)], "positive_scores": [n % 2]} for n in range(19)],
    "labels": [{"query": f"{words(4)} {'ab'[n % 2]}", "label": n % 2} for n in range(21)],
    "clusters": [{"query": f"{words(4)} {'ab'[n % 2]}", "label": n % 2} for n in range(21)],
    "lists": [{"query": words(4), "positives": [words(5)], "negatives": [words(4), words(3)]} for n in range(9)],
    "two_texts": [
        {"query": "a", "positives": ["b"], "positive_scores": [0.5]},
        {"query": "a", "positives": ["a"], "positive_scores": [1]},
    ],
}
TASKS = {
    "search": "retrieval",
    "one_query": "retrieval",
    "pairs": "similarity",
    "classes": "pair_classification",
    "labels": "classification",
    "clusters": "clustering",
    "lists": "reranking",
    "two_texts": "similarity",
}


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in SETS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = [{"name": name, "task": TASKS[name], "path": f"{name}.jsonl"} for name in SETS]
    suite[[*SETS].index("labels")]["train_path"] = "clusters.jsonl"
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def evaluated(model_folder, suite_file, out):
    """Metrics by data set, and how many texts this process encoded in each call."""
    torch.set_num_threads(1)
    encoded = []

    def counting(encoder, texts, **more):
        encoded.append(len(set(texts)))
        return one_process(encoder, texts, **more)

    with pytest.MonkeyPatch.context() as patch:
        one_process = engine.encode
        patch.setattr(engine, "encode", counting)
        patch.setattr(retrieval, "RETRIEVED", KEPT)
        patch.setattr(retrieval, "QUERIES_AT_ONCE", 2)
        patch.setattr(clustering, "DRAWN", 50)
        encoder = SentenceTransformer(str(model_folder), device="cpu").train()
        return evaluate_suite(encoder, load_suite(suite_file), out), encoded


def run_rank(rank, ranks, model_folder, suite_file, out):
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=ranks)
    torch.save(evaluated(model_folder, suite_file, out / str(rank)), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_model_folder, suite_file, tmp_path_factory):
    """By number of ranks: the folder of results, and (metrics, texts encoded) of each rank."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        for ranks in (1, 2, 3):
            # One of its own, else the results of one process would be taken for those of all.
            patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
            out = tmp_path_factory.mktemp(f"ranks{ranks}")
            if ranks == 1:
                results[1] = out, [evaluated(tiny_model_folder, suite_file, out / "0")]
            else:
                torch.multiprocessing.spawn(run_rank, (ranks, tiny_model_folder, suite_file, out), nprocs=ranks)
                results[ranks] = out, [torch.load(out / f"{rank}.pt") for rank in range(ranks)]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", SETS)
def test_metrics_and_items_equal_those_of_one_process(runs, name, ranks):
    (one_out, [(one, _)]), (out, every) = runs[1], runs[ranks]
    for metrics, _ in every:
        assert metrics[name] == pytest.approx(one[name], abs=1e-6)
    here, there = (json.loads((folder / "0" / f"{name}.json").read_text()) for folder in (one_out, out))
    assert there.pop("metrics") == pytest.approx(here.pop("metrics"), abs=1e-6)
    assert here.pop("seconds") >= 0
    assert there.pop("seconds") >= 0
    assert there == here
    items, expected = (pq.read_table(folder / "0" / f"{name}.items.parquet").to_pydict() for folder in (out, one_out))
    assert items.keys() == expected.keys()
    hits, expected_hits = (side.pop("retrieved", []) for side in (items, expected))
    for found, wanted in zip(chain(*hits), chain(*expected_hits), strict=True):
        assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-6)}
    for column, values in expected.items():
        assert items[column] == (values if isinstance(values[0], str) else pytest.approx(values, abs=1e-6)), column
    if name == "search":
        assert len({round(value, 6) for value in expected["ndcg_at_10"]}) > 5, "equal numbers would be compared"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_each_text_is_encoded_by_one_rank(runs, ranks):
    """Without this every rank could have encoded everything; a rank without texts encodes one for its width."""
    whole = runs[1][1][0][1]
    by_call = list(zip(*(encoded for _, encoded in runs[ranks][1]), strict=True))
    assert whole[:2] == [23, max(whole)], "queries and documents of `search`"
    for texts, parts in zip(whole, by_call, strict=True):
        assert sum(parts) == max(texts, ranks)
        assert max(parts) - min(parts) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_only_the_first_rank_writes(runs, ranks):
    out, _ = runs[ranks]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["0"]


def test_shares_by_hand():
    """Lengths 4, 1, 3, 2 and the 3 once more: 4 and 2 to the first of two ranks, both 3s and 1 to the second."""
    texts = [Text(text, "", None) for text in ("aaaa", "b", "ccc", "dd", "ccc")]
    assert shares(texts, 2) == [[0, 3], [1, 2, 4]]
    assert shares(texts, 6) == [[0], [2, 4], [3], [1], [], []]
    assert shares(texts, 1) == [[0, 1, 2, 3, 4]]


def run_torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "codiemb"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_the_verb_on_two_ranks_says_and_writes_once_what_one_process_does(
    tiny_model_folder, suite_file, tmp_path, monkeypatch
):
    encoder = SentenceTransformer(str(tiny_model_folder), device="cpu")
    one = evaluate_suite(encoder, load_suite(suite_file), tmp_path / "one")
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))
    done = run_torchrun("evaluate", str(tiny_model_folder), "--suite", str(suite_file), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == done.stdout.count("pairs ") == 1
    for name in SETS:
        written = json.loads((tmp_path / "two" / tiny_model_folder.name / f"{name}.json").read_text())
        assert written["metrics"] == pytest.approx(one[name], abs=1e-6)


@pytest.mark.slow
def test_a_faulty_suite_ends_both_ranks_with_one_line_each(tiny_model_folder, suite_file, tmp_path):
    (tmp_path / "suite.yaml").write_text("- {name: gone, task: similarity, path: gone.jsonl}\n")
    done = run_torchrun(
        "evaluate", str(tiny_model_folder), "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")
    )
    assert done.returncode != 0
    assert "error: source 'gone'" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "out").exists()
