"""Evaluation and encoding on several ranks give the files and the numbers of one process."""

import errno
import json
import os
import subprocess
import sys
from itertools import chain, product

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from sentence_transformers import SentenceTransformer

from codiemb import cli
from codiemb.encoder import encode_file, engine
from codiemb.encoder.engine import shares
from codiemb.encoder.tokens import Text
from codiemb.errors import CodiembError
from codiemb.evaluation import clustering, retrieval
from codiemb.evaluation.suite import evaluate_suite
from codiemb.suites.suite import load_suite
from tests.distributed.conftest import on_ranks
from tests.small_run import small_run

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
                on_ranks(ranks, run_rank, ranks, tiny_model_folder, suite_file, out)
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


def run_torchrun(*arguments, program=("-m", "codiemb")):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
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


EVALUATES = """
import json, os, sys
from codiemb import distributed, evaluate

metrics = evaluate(*sys.argv[1:])
with open(f"{sys.argv[3]}/{os.environ['RANK']}", "w") as file:
    json.dump([distributed.world_size(), metrics], file)
"""


@pytest.mark.slow
def test_evaluate_from_python_joins_the_ranks(tiny_model_folder, suite_file, tmp_path, monkeypatch):
    encoder = SentenceTransformer(str(tiny_model_folder), device="cpu")
    one = evaluate_suite(encoder, load_suite(suite_file), None)
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "script.py").write_text(EVALUATES)
    (tmp_path / "out").mkdir()
    arguments = [str(tiny_model_folder), str(suite_file), str(tmp_path / "out")]
    done = run_torchrun(*arguments, program=(str(tmp_path / "script.py"),))
    assert done.returncode == 0, done.stderr
    for rank in "01":
        ranks, found = json.loads((tmp_path / "out" / rank).read_text())
        assert ranks == 2
        for name in SETS:
            assert found[name] == pytest.approx(one[name], abs=1e-6)


# ---- tasks of mteb ----


def evaluated_by_mteb(model_folder, suite_file, out):
    """Metrics by task, how many texts this process encoded in each call, and how often it had mteb evaluate."""
    import mteb
    from mteb.get_tasks import _TASKS_REGISTRY

    from tests.evaluation.test_mteb import TASKS, OurReranking

    calls = []

    def counting(*arguments, **more):
        calls.append(arguments)
        return theirs(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        for task in (*TASKS, OurReranking):
            patch.setitem(_TASKS_REGISTRY, task.metadata.name, task)
        theirs = mteb.evaluate
        patch.setattr(mteb, "evaluate", counting)
        return *evaluated(model_folder, suite_file, out), len(calls)


def mteb_on_rank(rank, ranks, model_folder, suite_file, out):
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=ranks)
    torch.save(evaluated_by_mteb(model_folder, suite_file, out / str(rank)), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_tasks_of_mteb_on_two_ranks(tiny_model_folder, tmp_path, monkeypatch):
    """Texts are shared out; mteb's data and metrics are the first rank's."""
    pytest.importorskip("mteb", reason="mteb is not installed (the extra mteb)")
    names = ["OurSearch", "OurSTS", "OurClasses"]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump([{"mteb": name} for name in names]))
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache of one"))
    one, whole, _ = evaluated_by_mteb(tiny_model_folder, tmp_path / "suite.yaml", tmp_path / "one")
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache of two"))
    on_ranks(2, mteb_on_rank, 2, tiny_model_folder, tmp_path / "suite.yaml", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [times for _, _, times in ranks] == [len(names), 0]
    for metrics, _, _ in ranks:
        for name in names:
            assert metrics[name] == pytest.approx(one[name], abs=2e-5), name  # mteb rounds some to five places
    for texts, *parts in zip(whole, *(encoded for _, encoded, _ in ranks), strict=True):
        assert sum(parts) == texts
        assert max(parts) - min(parts) <= 1


# ---- files of texts ----

TEXTS = {"one": ["a b"], "three": ["a b c d", "b", "c a"], "ten": [*LETTERS[:7], "a b c d", "c a", "b"]}


def encoded(model_folder, folder, out):
    """Embeds `TEXTS` in both formats, 4 at once; how many this process encoded, and what it said of two failures."""
    counts, said = [], []

    def counting(encoder, own, **more):
        counts.append(len(own))
        return one_process(encoder, own, **more)

    def embed(name, output):
        return encode_file.encode_file(encoder, folder / f"{name}.jsonl", out / output)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        one_process = engine.encode
        patch.setattr(engine, "encode", counting)
        patch.setattr(encode_file, "CHUNK", 4)
        encoder = SentenceTransformer(str(model_folder), device="cpu")
        for name, suffix in product(TEXTS, encode_file.OUTPUTS):
            assert embed(name, f"{name}{suffix}") == len(TEXTS[name])
        count = sum(counts)
        for name, words in (("bad", "line 6"), ("ten", "No space left")):
            with pytest.raises(CodiembError, match=words) as error:
                embed(name, "none.npy")
            said.append(str(error.value).replace(str(out), "out"))
            patch.setattr(encode_file.NumpyFile, "add", no_room)
    return count, said


def encode_on_rank(rank, model_folder, folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(encoded(model_folder, folder, out), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_files_of_texts_on_two_ranks(tiny_model_folder, tmp_path):
    """Of three texts a rank has two, of one none; what the first rank cannot read or write ends both."""
    for name, texts in TEXTS.items():
        rows = [{"_id": f"{name} {number}", "text": text} for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 5 + "{\n")
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
    whole, said = encoded(tiny_model_folder, tmp_path, tmp_path / "one")
    on_ranks(2, encode_on_rank, tiny_model_folder, tmp_path, tmp_path / "two")
    ranks = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in range(2)]
    assert all(messages == said for _, messages in ranks)
    assert max(encoded for encoded, _ in ranks) < 0.7 * whole
    files = {f"{name}{suffix}" for name, suffix in product(TEXTS, encode_file.OUTPUTS)}
    assert {path.name for path in (tmp_path / "one").iterdir()} == files
    assert {path.name for path in (tmp_path / "two").iterdir()} == files | {"0.pt", "1.pt"}
    for name, texts in TEXTS.items():
        one, two = (np.load(tmp_path / out / f"{name}.npy") for out in ("one", "two"))
        assert one.shape[0] == len(texts)
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)
        one, two = (pq.read_table(tmp_path / out / f"{name}.parquet") for out in ("one", "two"))
        assert two.schema == one.schema
        assert two["id"].equals(one["id"])
        one, two = (np.stack(table["embedding"].to_numpy()) for table in (one, two))
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_verb_encode_on_two_ranks(tiny_model_folder, tmp_path):
    (tmp_path / "in.txt").write_text("a b\nc\na b c d e\n")
    arguments = ["encode", str(tiny_model_folder), "--input", str(tmp_path / "in.txt"), "--output"]
    cli.main([*arguments, str(tmp_path / "one.npy")])
    done = run_torchrun(*arguments, str(tmp_path / "two.npy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 embeddings of 16 dimensions") == 1
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), rtol=0, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "one.npy", "two.npy"}


# ---- one process, and what the verbs say ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config.yaml"],
        ["compare", "one", "two"],
        ["fuse", "one", "two", "--base", "base", "--out", "out"],
        ["analyze", "model", "--texts", "texts.txt", "--out", "out"],
        ["report", "run"],
    ],
)
def test_verbs_of_one_process_refuse_ranks(arguments, capsys, monkeypatch):
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "none"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown == f"error: {arguments[0]}: got WORLD_SIZE=2, expected one process, start it without torchrun\n"


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 15.00 MiB is "
    "free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved. If reserved ..."
)
FAILURES = {  # what a rank meets, and the words that every verb must say of it
    "memory": (torch.OutOfMemoryError(CUDA_SAYS), "of which 15.00 MiB is free, expected"),
    "lost rank": (dist.DistNetworkError("Connection closed by peer"), "expected an answer of every rank in time"),
}
PLACES = {  # where it meets it, and what is to be done
    "train": ("codiemb.training.run.train", {"memory": "train.memory_budget", "lost rank": "(train.ddp_timeout)"}),
    "evaluate": ("codiemb.evaluation.suite.evaluate_suite", {"memory": "CUDA_VISIBLE", "lost rank": "(1800 s)"}),
    "encode": ("codiemb.encoder.encode_file.encode_on_all_ranks", {"memory": "CUDA_VISIBLE", "lost rank": "(1800 s)"}),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("verb", PLACES)
def test_a_full_gpu_and_a_lost_rank_are_one_line(
    verb, failure, tiny_model_folder, suite_file, tmp_path, capsys, monkeypatch
):
    def fails(*_, **__):
        raise error

    (error, said), (place, fix) = FAILURES[failure], PLACES[verb]
    monkeypatch.setattr(place, fails)
    (tmp_path / "in.txt").write_text("a\n")
    arguments = {
        "train": [str(small_run(tmp_path, tiny_model_folder))],
        "evaluate": [str(tiny_model_folder), "--suite", str(suite_file), "--out", str(tmp_path / "out")],
        "encode": [str(tiny_model_folder), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.npy")],
    }
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, *arguments[verb]])
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.count("\n") == 1
    assert shown.split("\r")[-1].startswith("error: "), "after a progress bar that is gone"
    assert said in shown
    assert fix[failure] in shown
    assert ("--resume" in shown) == (verb == "train")
