"""A whole run on a tiny model: its files, its resumption, its schedules, and two processes."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from codiemb import load_config, train
from codiemb.encoder import memory
from codiemb.encoder.memory import Footprint, Memory
from codiemb.errors import ConfigError
from codiemb.training import trainer
from codiemb.training.checkpoint import checkpoints
from codiemb.training.clock import PHASES
from codiemb.training.merging import _merges
from codiemb.training.metrics import MetricsLog
from codiemb.training.results import compare_run, results_table
from tests.small_run import LETTERS, assert_equal_weights, small_run, weights, write_lines


@pytest.fixture
def config_file(tmp_path, tiny_model_folder):
    return small_run(
        tmp_path,
        tiny_model_folder,
        model={"max_length": {"query": 8, "document": 16, "similarity": 12}},
        batching={"schedule": "proportional"},
        train={"num_train_epochs": 2, "save_steps": 3, "learning_rate": 1e-3},
    )


def test_a_run_leaves_the_files_of_the_contract(config_file, tmp_path):
    result = train(load_config(config_file))
    run = tmp_path / "run"
    # 13 rows make 4 batches of at most 4, 11 pairs make 3: 7 steps an epoch, 14 in all
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert sum(line["rows"] for line in lines) == 2 * (13 + 11)
    for line in lines:
        assert line["tokens"] <= line["padded_tokens"]
        assert line["seconds"] > 0
        assert {"source", "task", "loss", "peak_memory_bytes", "learning_rate", "candidates_per_query"} <= line.keys()
        phases = [line[f"seconds/{phase}"] for phase in PHASES]
        assert min(phases) >= 0 < line["seconds/tokenizer"]
        assert sum(phases) == pytest.approx(line["seconds"], rel=0.01, abs=1e-3)
        parts = {"info_nce"} if line["task"] == "retrieval" else {"pearson", "rank_kl", "pro", "mid_nce"}
        assert {name for name in line if name.startswith("loss/")} == {f"loss/{part}" for part in parts}
    plan = json.loads((run / "plan.json").read_text())
    assert plan["steps"] == 14
    assert plan["sources"]["search"]["rows_used"] == 13
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 14, 3, 6, 9)]
    for model in ("base", "model"):
        scores = json.loads((run / "eval" / model / "pairs.json").read_text())
        assert scores["n"] == 11
        assert set(scores["metrics"]) == {"spearman", "pearson"}
    assert set(result.trained["search"]) == {"ndcg_at_10", "mrr_at_10", "map", "recall_at_100"}
    assert_equal_weights(run / "checkpoint-14", run / "model", rtol=0, atol=0)
    card = (run / "model" / "README.md").read_text()
    assert "| pairs | similarity | spearman |" in card
    page = (run / "report.html").read_text()
    assert all(f'<section id="{part}">' in page for part in ("results", "loss", "schedule", "cost", "data", "settings"))
    reused = load_config(run / "config.yaml")
    assert reused.model_dump() == load_config(config_file).model_dump()
    saved = SentenceTransformer(str(run / "model"))
    assert (saved[0].query_length, saved[0].document_length) == (8, 16)
    assert not list(run.rglob("*.partial"))
    assert not (run / ".writing").exists()


def test_training_changes_every_layer_and_lowers_the_loss(config_file, tmp_path, tiny_model_folder):
    train(load_config(config_file, ["train.num_train_epochs=15", "train.save_strategy=no"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    search = [line["loss"] for line in lines if line["source"] == "search"]
    assert sum(search[-8:]) < 0.8 * sum(search[:8])
    before, after = weights(tiny_model_folder), weights(tmp_path / "run" / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before if "layer.0." in name)


@pytest.mark.parametrize(
    ("workers", "save_steps"),
    [(0, 3), pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(1, 7, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_resumes_to_the_same_weights(config_file, tmp_path, monkeypatch, workers, save_steps):
    """From the middle of an epoch and from its end (7 steps); with workers, whose start draws random numbers."""
    dropout = "model.dropout.hidden=0.1"
    more = [f"train.dataloader_num_workers={workers}", f"train.save_steps={save_steps}"]
    train(load_config(config_file, [dropout, f"output_dir={tmp_path / 'whole'}", "train.save_strategy=no"]))
    original = MetricsLog.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt  # as if it were killed: no checkpoint is written for it
        original(self, args, state, control, **kwargs)

    config = load_config(config_file, [dropout, *more])
    monkeypatch.setattr(MetricsLog, "on_step_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ConfigError, match=r"--resume, seed 7 \(was 42\): got other settings"):
        train(load_config(config_file, [dropout, *more, "seed=7"]), resume=True)
    # Another budget, under which no activations are kept: the same weights to the last bit.
    monkeypatch.setattr(trainer, "plan_memory", lambda *arguments: Memory(-1, Footprint(1, 0), 2048))
    train(load_config(config_file, [dropout, *more, "train.memory_budget=9"]), resume=True)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 15))


def test_loader_workers_start_while_signals_wait(config_file, tmp_path, monkeypatch):
    """torchrun signals all processes of its group; a worker that had just been forked died of it, and with it the run.
    At the start, after each epoch, and from the middle of one."""
    held, started = [], []
    start = multiprocessing.process.BaseProcess.start

    def begin(process):
        held.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        start(process)

    step_begin = MetricsLog.on_step_begin

    def training(self, *arguments, **settings):
        started.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        step_begin(self, *arguments, **settings)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", begin)
    monkeypatch.setattr(MetricsLog, "on_step_begin", training)
    config = load_config(config_file, ["train.dataloader_num_workers=1", "evaluation.suite=null"])
    train(config)
    for name in ("model", "checkpoint-6", "checkpoint-9", "checkpoint-12", "checkpoint-14"):
        shutil.rmtree(tmp_path / "run" / name)
    train(config, resume=True)
    assert held == [True] * len(held)
    assert len(held) >= 3
    assert started == [False] * (14 + 11)


def test_a_run_that_goes_on_keeps_its_micro_batches(config_file, tmp_path, monkeypatch):
    """It was begun with little memory free, goes on with more, and has the same bits."""
    config = load_config(config_file, ["model.dropout.hidden=0.1", "evaluation.suite=null"])
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr(memory, "micro_batch_tokens", lambda encoder: 16)
        train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name in ("model", "checkpoint-12", "checkpoint-14"):
        shutil.rmtree(tmp_path / "run" / name)
    train(config, resume=True)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)
    train(config, overwrite=True)
    one, other = (weights(tmp_path / name / "model") for name in ("whole", "run"))
    assert any(not torch.equal(one[name], other[name]) for name in one), "micro-batches make no difference"


@pytest.mark.parametrize("schedule", ["balanced", "round_robin", "temperature", "weights", "staged", "paired"])
def test_every_schedule_trains(config_file, tmp_path, schedule):
    overrides = [f"batching.schedule={schedule}", "batching.weights={search: 1, pairs: 2}", "train.num_train_epochs=1"]
    train(load_config(config_file, [*overrides, "evaluation.suite=null", "train.save_strategy=no"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == json.loads((tmp_path / "run" / "plan.json").read_text())["steps_per_epoch"]
    if schedule == "paired":
        assert {line["task"] for line in lines} == {"retrieval+similarity"}


def test_evaluation_during_training(config_file, tmp_path):
    train(load_config(config_file, ["evaluation.every_steps=5", "train.save_strategy=no"]))
    assert sorted(path.name for path in (tmp_path / "run" / "eval").iterdir()) == ["base", "model", "step-10", "step-5"]


@pytest.mark.slow
def test_two_processes_train_the_same_model(config_file, tmp_path):
    """Dropout off, so that one process and two see the same batches and make the same weights.

    A key's bias adds the same number to all attention logits of a row: its true gradient is 0, so Adam scales up
    rounding, and it is left out.
    """
    overrides = ["model.dropout={hidden: 0, attention: 0}", "train.max_steps=7", "evaluation.every_steps=4"]
    result = train(load_config(config_file, [*overrides, f"output_dir={tmp_path / 'one'}"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "codiemb"]
    subprocess.run(
        [*command, "train", str(config_file), *overrides, f"output_dir={tmp_path / 'two'}"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "two" / "model", ["key.bias"], rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"] == 2
    for when, tolerance in (("base", 1e-6), ("step-4", 1e-3), ("model", 1e-3)):  # two trainings, then, are compared
        for name in result.base:
            one, two = (
                json.loads((tmp_path / run / "eval" / when / f"{name}.json").read_text()) for run in ("one", "two")
            )
            assert two["metrics"] == pytest.approx(one["metrics"], abs=tolerance), (when, name)


TOPICS = [{"text": f"{LETTERS[n]} {LETTERS[n % 3]}", "label": f"topic {n % 3}"} for n in range(12)]
DUPLICATES = [
    {"query": f"{LETTERS[n]} d", "positives": [f"{LETTERS[n]} e"], "positive_scores": [n % 2]} for n in range(9)
]
RANKED = [
    {
        "query": f"{LETTERS[n]} f",
        "positives": [f"{LETTERS[n]} g", f"{LETTERS[n + 1]} g"],
        "positive_scores": [2, 1],
        "negatives": [f"{LETTERS[n + 5]} h"],
    }
    for n in range(8)
]


def test_every_task_trains_in_one_run_with_balance_and_prefixes(config_file, tmp_path):
    """Resumed in the middle, the running sizes of the parts go on too: the weights are those of the whole run."""
    write_lines(tmp_path / "topics.jsonl", TOPICS)
    write_lines(tmp_path / "duplicates.jsonl", DUPLICATES)
    write_lines(tmp_path / "ranked.jsonl", RANKED)
    content = yaml.safe_load(config_file.read_text())
    content["data"] += [
        {
            "name": "topics",
            "task": "classification",
            "path": "topics.jsonl",
            "columns": {"query": "text", "label": "label"},
        },
        {"name": "duplicates", "task": "pair_classification", "path": "duplicates.jsonl"},
        {"name": "ranked", "task": "reranking", "path": "ranked.jsonl"},
    ]
    content["losses"] = {"balance": "magnitude", "emphasis": 0.3, "matryoshka": {"dims": [16, 4], "weights": [1, 0.5]}}
    content["train"] |= {"num_train_epochs": 1, "save_steps": 4}
    del content["evaluation"]
    config_file.write_text(yaml.safe_dump(content))
    train(load_config(config_file))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = {line["task"]: {name for name in line if name.startswith("loss/")} for line in lines}
    assert seen["classification"] == {"loss/info_nce@16", "loss/info_nce@4"}
    assert seen["pair_classification"] == {"loss/cosent@16", "loss/cosent@4"}
    assert seen["reranking"] == {"loss/list_softmax@16", "loss/list_softmax@4"}
    assert {"loss/mid_nce", "loss/pearson@4"} <= seen["similarity"]
    means = json.loads((run / "checkpoint-4" / "balance.json").read_text())
    assert all(mean > 0 for count, mean in means.values() if count)
    assert any(count for count, _ in means.values())

    halted = tmp_path / "halted"
    halted.mkdir()
    (halted / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (run / "checkpoint-4").rename(halted / "checkpoint-4")
    train(load_config(config_file, [f"output_dir={halted}"]), resume=True)
    assert_equal_weights(run / "model", halted / "model", rtol=0, atol=0)


def test_parts_of_one_name_in_a_paired_step_are_all_logged(config_file, tmp_path):
    """Retrieval and classification both have `info_nce`; no label is there twice, so classification has no term."""
    alone = [{"query": row["text"], "label": n} for n, row in enumerate(TOPICS)]
    write_lines(tmp_path / "topics.jsonl", alone)
    content = yaml.safe_load(config_file.read_text())
    content["data"].insert(0, {"name": "topics", "task": "classification", "path": "topics.jsonl"})
    content["batching"]["schedule"] = "paired"
    content["train"] |= {"max_steps": 2, "save_strategy": "no"}
    del content["evaluation"]
    config_file.write_text(yaml.safe_dump(content))
    train(load_config(config_file))
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in text  # which is no JSON
        line = json.loads(text)
        assert line["loss/classification/info_nce"] == 0
        assert line["loss/retrieval/info_nce"] > 0
        assert "loss/info_nce" not in line
        assert line["loss/pearson"] > 0
        parts = [line[f"loss/{name}"] for name in ("pearson", "rank_kl", "pro", "mid_nce", "retrieval/info_nce")]
        weights = (2, 5, 0.5, 1, 1)
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_checkpoints_of_a_run_are_fused_at_its_end(config_file, tmp_path, monkeypatch):
    def marked(folder, evaluated):
        found = compare_run(folder, evaluated)
        for row in found["comparisons"][0]["data_sets"] if len(evaluated) == 2 else []:
            row["verdict"] += ", before the merges"
        return found

    monkeypatch.setattr("codiemb.training.run.compare_run", marked)
    result = train(load_config(config_file, ["fusion={checkpoints: 3, method: uniform}"]))
    run = tmp_path / "run"
    facts = json.loads((run / "fused" / "uniform" / "fusion.json").read_text())
    assert {Path(parent["path"]).name for parent in facts["parents"]} == {
        "checkpoint-9",
        "checkpoint-12",
        "checkpoint-14",
    }
    assert facts["scores"] == {
        "retrieval": pytest.approx(result.fused["uniform"]["search"]["ndcg_at_10"]),
        "similarity": pytest.approx(result.fused["uniform"]["pairs"]["spearman"]),
    }
    scores = json.loads((run / "eval" / "uniform" / "pairs.json").read_text())["metrics"]
    assert scores == result.fused["uniform"]["pairs"]
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["reference"] == "base"
    assert [one["model"] for one in comparison["comparisons"]] == ["model", "uniform"]
    row = comparison["comparisons"][1]["data_sets"][0]
    assert (row["name"], row["model"]) == ("pairs", pytest.approx(scores["spearman"]))
    table = [line.split(" | ") for line in results_table(result).splitlines()]
    assert table[0][-3:] == ["95 % interval", "verdict", "uniform |"]
    assert {line[-2] for line in table[2:]} <= {"better", "worse", "no difference shown"}
    assert {len(line) for line in table[2:]} == {8}
    card = (run / "model" / "README.md").read_text()
    assert f"| {comparison['comparisons'][0]['data_sets'][0]['verdict']} |" in card
    assert "before the merges" not in card, "verdicts of the last comparison, which is corrected for the merges too"
    mean = (
        sum(weights(run / f"checkpoint-{step}")["0.model.embeddings.word_embeddings.weight"] for step in (9, 12, 14))
        / 3
    )
    fused = weights(run / "fused" / "uniform")["0.model.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(fused, mean)


def test_of_several_merges_the_best_on_a_dev_suite_stays(config_file, tmp_path):
    settings = "fusion={method: [uniform, delta, ema], suite: suite.yaml}"
    result = train(load_config(config_file, [settings]))
    run = tmp_path / "run"
    assert list(result.fused) == ["uniform", "delta", "ema"]
    choice = json.loads((run / "fused" / "choice.json").read_text())
    scores = {name: sum(found.values()) / 2 for name, found in choice["scores"].items()}
    assert scores["ema"] == pytest.approx(
        (result.fused["ema"]["search"]["ndcg_at_10"] + result.fused["ema"]["pairs"]["spearman"]) / 2
    )
    assert scores[choice["chosen"]] == max(scores.values())
    kept = {path.name for path in (run / "fused").iterdir() if path.is_dir()}
    assert kept == {choice["chosen"]} - {"model"}
    assert (run / "eval" / "delta" / "pairs.json").exists()
    assert "| uniform | delta | ema |" in results_table(result)


def test_the_mean_of_the_weights_goes_on_when_a_run_is_resumed(config_file, tmp_path):
    """To the same bits as without the stop; and a run that had no mean cannot begin one in its middle."""
    ema = "fusion={method: ema, ema_decay: 0.8}"
    train(load_config(config_file, [ema]))
    run, halted = tmp_path / "run", tmp_path / "halted"
    halted.mkdir()
    (halted / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    shutil.copytree(run / "checkpoint-6", halted / "checkpoint-6")
    for settings in ("fusion={method: ema, ema_decay: 0.9}", "fusion={method: [ema, uniform]}"):
        with pytest.raises(ConfigError, match="one mean over all steps"):
            train(load_config(config_file, [f"output_dir={halted}", settings]), resume=True)
        assert not (halted / "config.yaml").exists(), "refused before anything is written"
    train(load_config(config_file, [f"output_dir={halted}", ema]), resume=True)
    assert_equal_weights(run / "fused" / "ema", halted / "fused" / "ema", rtol=0, atol=0)
    before, after = weights(run / "fused" / "ema"), weights(run / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_that_is_not_as_it_was_written_is_not_merged(config_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("codiemb"), "propagate", True)
    train(load_config(config_file))
    run = tmp_path / "run"
    newest, *others = checkpoints(run)
    file = others[0] / "0_Transformer" / "model.safetensors"
    file = file if file.exists() else others[0] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    config = load_config(config_file, ["fusion={checkpoints: 2, method: uniform}"])
    assert _merges(config, config.fusion, None) == ["uniform"]
    facts = json.loads((run / "fused" / "uniform" / "fusion.json").read_text())
    assert [Path(parent["path"]) for parent in facts["parents"]] == sorted([newest, others[1]])
    assert f"not merged: file {file}" in caplog.text
