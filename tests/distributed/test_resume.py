"""Two processes that are stopped or killed go on to the model of those that were not; on one process too."""

import json
import logging
import os
import signal
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

from codiemb import load_config, train
from tests.distributed.conftest import train_on_ranks
from tests.small_run import small_run

STEPS = 40
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tiny_model_folder, tmp_path_factory):
    """With a config, and the run that nobody stopped on two processes as `whole`; dropout on."""
    folder = tmp_path_factory.mktemp("resume")
    small_run(
        folder,
        tiny_model_folder,
        model={"dropout": {"hidden": 0.1, "attention": 0.1}},
        train={"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 5, "save_total_limit": 2},
        evaluation={"suite": None},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(folder / "cache"))
        go(folder, "whole")
    return folder


def start(folder, run, *arguments):
    command = [sys.executable, *TORCHRUN, "-m", "codiemb", "train", str(folder / "config.yaml")]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CODIEMB_CACHE": str(folder / "cache")}
    with (folder / f"{run}.txt").open("w") as said:
        return psutil.Popen(
            [*command, f"output_dir={folder / run}", *arguments],
            stdout=said,
            stderr=said,
            env={**os.environ, **environment},
        )


def go(folder, run, *overrides, resume=False):
    """The same with nobody who ends it, without torchrun's start."""
    train_on_ranks(2, folder / "config.yaml", f"output_dir={folder / run}", *overrides, resume=resume)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists() or path.stat().st_size == 0:  # metrics.jsonl is there before its first line
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_run(folder, run, tolerance):
    one, other = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", run))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (other[name] - weight).abs().max() <= tolerance, name
    steps = [json.loads(line)["step"] for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_at_once_and_resumed_the_weights_are_the_same_to_the_last_bit(folder):
    process = start(folder, "killed")
    wait_for(folder / "killed" / "checkpoint-10", process)
    for one in [process, *process.children(recursive=True)]:
        one.kill()
    process.wait()
    assert not (folder / "killed" / "model").exists()
    go(folder, "killed", resume=True)
    assert_same_run(folder, "killed", tolerance=0)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_same_step(folder):
    process = start(folder, "stopped")
    wait_for(folder / "stopped" / "checkpoint-5", process)
    ranks = [child for child in process.children() if "codiemb" in child.cmdline()]
    ranks[-1].send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    said = (folder / "stopped.txt").read_text()
    assert said.count("stopped by SIGTERM: the newest checkpoint is ") == 2, said
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in (folder / "stopped").glob("checkpoint-*"))
    state = json.loads((folder / "stopped" / f"checkpoint-{newest}" / "trainer_state.json").read_text())
    assert state["global_step"] == newest < STEPS
    go(folder, "stopped", resume=True)
    assert_same_run(folder, "stopped", tolerance=0)


@pytest.mark.slow
def test_a_signal_to_torchrun_with_loader_workers_leaves_a_checkpoint(folder):
    """torchrun signals the whole group of processes, workers among them."""
    workers = "train.dataloader_num_workers=1"
    process = start(folder, "workers", workers, "train.save_steps=1000", "train.logging_steps=1")
    wait_for(folder / "workers" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    assert len(list((folder / "workers").glob("checkpoint-*"))) == 1, (folder / "workers.txt").read_text()
    go(folder, "workers", workers, resume=True)
    assert_same_run(folder, "workers", tolerance=0)


@pytest.mark.slow
def test_one_process_goes_on_with_the_plan_of_two(folder, caplog, monkeypatch):
    """Without dropout, which is drawn by each process for its own rows."""
    process = start(folder, "fewer", "model.dropout={hidden: 0, attention: 0}")
    wait_for(folder / "fewer" / "checkpoint-10", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    monkeypatch.setattr(logging.getLogger("codiemb"), "propagate", True)  # the command line sets it off
    caplog.set_level(logging.INFO, "codiemb")
    for run, resume in (("fewer", True), ("one", False)):
        settings = ["model.dropout={hidden: 0, attention: 0}", f"output_dir={folder / run}"]
        train(load_config(folder / "config.yaml", settings), resume=resume)
    assert "written by 2 process(es): the same plan goes on on 1" in caplog.text
    one, other = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", "fewer"))
    assert max((other[name] - weight).abs().max() for name, weight in one.items()) <= 1e-5
    whole = load_file(folder / "whole" / "model" / "model.safetensors")
    assert max((whole[name] - weight).abs().max() for name, weight in one.items()) > 1e-3, "dropout makes a difference"
