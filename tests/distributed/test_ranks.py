"""What ranks hold alike and what each has for itself, in real runs. This file is also the script of the ranks."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from codiemb import load_config, train
from codiemb.batching.loader import StepReader
from codiemb.distributed import finish, rank
from codiemb.errors import DistributedError, Stopped
from codiemb.evaluation.similarity import SIMILARITY
from codiemb.evaluation.suite import EVALUATIONS
from codiemb.training.joint import JointModel
from tests.distributed.conftest import DROPOUT, on_two_processes

HERE = Path(__file__)


@pytest.mark.slow
def test_each_rank_draws_its_own_dropout(eight_steps, tmp_path):
    """The same masks on all ranks would make noise that does not average out; a checkpoint keeps what each draws."""
    on_two_processes([str(HERE)], str(eight_steps), "states", DROPOUT)
    one, other = ((tmp_path / f"states-{rank}").read_text().split() for rank in (0, 1))
    assert len(set(one + other)) == 16
    kept = [
        torch.load(tmp_path / "run" / "checkpoint-4" / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)
    ]
    assert not torch.equal(kept[0]["cpu"], kept[1]["cpu"])


@pytest.mark.slow
def test_ranks_that_go_other_ways_in_training_are_told(eight_steps, tmp_path):
    """Every two steps; from the fourth on the second rank reads other rows."""
    on_two_processes([str(HERE)], str(eight_steps), "other plan", "train.rank_check_steps=2")
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("rank 1, at step 5, source: got another, expected ")


@pytest.mark.slow
def test_a_setting_that_only_another_rank_has_is_told(eight_steps, tmp_path):
    on_two_processes([str(HERE)], str(eight_steps), "longer list")
    told = (tmp_path / "told-0").read_text()
    assert "rank 1, before the first step, losses.matryoshka.dims.1: got 16, expected nothing as on rank 0" in told


@pytest.mark.slow
def test_a_suite_that_differs_is_told(eight_steps, tmp_path):
    """Each machine may have its own copy."""
    on_two_processes([str(HERE)], str(eight_steps), "other suite")
    assert "rank 1, before the first step, data set 'pairs' of evaluation: got " in (tmp_path / "told-0").read_text()


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_stops_both_with_a_checkpoint(eight_steps, tmp_path):
    """Of step 2, though checkpoints are due every 4."""
    evaluation = ["evaluation.suite=suite.yaml", "evaluation.every_steps=2"]
    on_two_processes([str(HERE)], str(eight_steps), "signal", *evaluation)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told == [f"the newest checkpoint is {tmp_path / 'run' / 'checkpoint-2'}; go on with --resume"] * 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list((tmp_path / "run" / "eval" / "step-2").glob("*.json"))) == 1


def main(config_file, act, *overrides):
    folder, number = Path(config_file).parent, int(os.environ["RANK"])
    forward, read = JointModel.forward, StepReader.__getitem__

    def noted(self, *arguments):
        with (folder / f"states-{number}").open("a") as file:
            file.write(hashlib.sha256(torch.get_rng_state().numpy()).hexdigest() + "\n")
        return forward(self, *arguments)

    def other(self, step):
        found = read(self, step)
        self.read = getattr(self, "read", 0) + 1
        if number == 1 and self.read > 4:
            found["batches"][0]["source"] = "another"
        return found

    def signalled(*arguments):
        if number == 1 and (folder / "run" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return SIMILARITY.evaluate(*arguments)

    if act == "signal":
        os.chdir(folder)
        EVALUATIONS["similarity"] = SIMILARITY._replace(evaluate=signalled)
        (folder / "suite.yaml").write_text(
            str([{"name": name, "task": "similarity", "path": "pairs.jsonl"} for name in ("one", "other")])
        )
    if act == "states":
        JointModel.forward = noted
    if act == "other plan":
        StepReader.__getitem__ = other
    if act == "longer list":
        overrides += (f"losses.matryoshka.dims=[8{', 16' * number}]",)
    if act == "other suite":
        pairs = (folder / "pairs.jsonl").read_text().splitlines()
        (folder / f"pairs-{number}.jsonl").write_text("\n".join(pairs[number:]))
        suite = [{"name": "pairs", "task": "similarity", "path": str(folder / f"pairs-{number}.jsonl")}]
        (folder / f"suite-{number}.yaml").write_text(str(suite))
        overrides += (f"evaluation.suite={folder / f'suite-{number}.yaml'}",)
    try:
        train(load_config(config_file, list(overrides)))
    except (DistributedError, Stopped) as error:
        (folder / f"told-{rank()}").write_text(error.message if isinstance(error, Stopped) else str(error))
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
