"""What ranks hold alike and what each has for itself, in real runs."""

import hashlib
import os
import signal

import pytest
import torch
import yaml

from codiemb import load_config, train
from codiemb.batching.loader import StepReader
from codiemb.distributed import finish, start
from codiemb.errors import DistributedError, Stopped
from codiemb.evaluation.similarity import SIMILARITY
from codiemb.evaluation.suite import EVALUATIONS
from codiemb.training.joint import JointModel
from tests.distributed.conftest import free_port, join, on_ranks
from tests.small_run import small_run

ACTS = ("states", "other plan", "longer list", "other suite", "signal")


@pytest.fixture(scope="module")
def told(tiny_model_folder, tmp_path_factory):
    """By act the folder in which it was played by two ranks, and what each was told."""
    folders = {act: tmp_path_factory.mktemp(act) for act in ACTS}
    for act, folder in folders.items():
        small_run(
            folder,
            tiny_model_folder,
            model={"dropout": {"hidden": 0.1}},
            train={"max_steps": 8, "save_steps": 4, "rank_check_steps": 2},
            evaluation={"suite": None} if act in ("states", "other plan") else {"suite": str(folder / "suite.yaml")},
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
        on_ranks(2, play, folders, free_port())
    return {act: (folder, *(read(folder / f"told-{rank}") for rank in (0, 1))) for act, folder in folders.items()}


def read(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_each_rank_draws_its_own_dropout(told):
    """The same masks on all ranks would make noise that does not average out; a checkpoint keeps what each draws."""
    folder = told["states"][0]
    one, other = ((folder / f"states-{rank}").read_text().split() for rank in (0, 1))
    assert len(set(one + other)) == 16
    files = (folder / "run" / "checkpoint-4" / f"rng_state_{rank}.pth" for rank in (0, 1))
    kept = [torch.load(file, weights_only=False)["cpu"] for file in files]
    assert not torch.equal(*kept)


@pytest.mark.slow
def test_ranks_that_go_other_ways_in_training_are_told(told):
    """Every two steps; from the fifth on the second rank reads other rows."""
    _, one, other = told["other plan"]
    assert one == other
    assert one.startswith("rank 1, at step 5, source: got another, expected ")


@pytest.mark.slow
def test_a_setting_that_only_another_rank_has_is_told(told):
    _, one, other = told["longer list"]
    assert one == other
    assert "rank 1, before the first step, losses.matryoshka.dims.1: got 16, expected nothing as on rank 0" in one


@pytest.mark.slow
def test_a_suite_that_differs_is_told(told):
    """Each machine may have its own copy."""
    _, one, other = told["other suite"]
    assert one == other
    assert "rank 1, before the first step, data set 'pairs' of evaluation: got " in one


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_stops_both_with_a_checkpoint(told):
    """Of step 2, though checkpoints are due every 4."""
    folder, *said = told["signal"]
    assert said == [f"the newest checkpoint is {folder / 'run' / 'checkpoint-2'}; go on with --resume"] * 2
    assert [path.name for path in (folder / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list((folder / "run" / "eval" / "step-2").glob("*.json"))) == 1


def play(rank, folders, port):
    """Every act in its folder."""
    torch.set_num_threads(1)
    join(rank, 2, port)
    for act, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            overrides = prepare(act, folder, rank, patch)
            try:
                train(load_config(folder / "config.yaml", overrides))
            except (DistributedError, Stopped) as error:
                (folder / f"told-{rank}").write_text(error.message if isinstance(error, Stopped) else str(error))
    finish()


def prepare(act, folder, rank, patch):
    """What a rank does otherwise in this act; returns its own settings."""
    forward, read = JointModel.forward, StepReader.__getitem__
    steps_read = []

    def noted(self, *arguments):
        with (folder / f"states-{rank}").open("a") as file:
            file.write(hashlib.sha256(torch.get_rng_state().numpy()).hexdigest() + "\n")
        return forward(self, *arguments)

    def other(self, step):
        found = read(self, step)
        steps_read.append(step)
        if rank == 1 and len(steps_read) > 4:
            found["batches"][0]["source"] = "another"
        return found

    def signalled(*arguments):
        if rank == 1 and (folder / "run" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return SIMILARITY.evaluate(*arguments)

    def suite(*paths):
        sources = [{"name": path.stem, "task": "similarity", "path": str(path)} for path in paths]
        file = folder / f"suite-{rank}.yaml"
        file.write_text(yaml.safe_dump(sources))
        return f"evaluation.suite={file}"

    if act == "states":
        patch.setattr(JointModel, "forward", noted)
    if act == "other plan":
        patch.setattr(StepReader, "__getitem__", other)
    if act == "longer list":
        return [f"losses.matryoshka.dims=[8{', 16' * rank}]"]
    if act == "other suite":
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        own = folder / str(rank) / "pairs.jsonl"
        own.parent.mkdir()
        own.write_text("\n".join(lines[rank:]))
        return [suite(own)]
    if act == "signal":
        patch.setitem(EVALUATIONS, "similarity", SIMILARITY._replace(evaluate=signalled))
        copy = folder / "other.jsonl"
        copy.write_text((folder / "pairs.jsonl").read_text())
        return [suite(folder / "pairs.jsonl", copy), "evaluation.every_steps=2"]
    return []


def test_a_rank_that_cannot_find_the_others_is_told_so(monkeypatch):
    """Some clusters say how many there are and not which device is whose: each would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match=r"WORLD_SIZE=2: got no RANK, .*start with torchrun"):
        start(60)
