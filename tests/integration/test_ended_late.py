"""A run that is ended after its last step, or that cannot end, goes on to what one that nobody touched leaves."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from codiemb import load_config, train
from codiemb.errors import ConfigError, Stopped
from codiemb.report.page import write_report
from codiemb.training import run as training
from codiemb.training.metrics import MetricsLog
from tests.small_run import assert_equal_weights, small_run

pytestmark = pytest.mark.slow
MERGES = ("uniform", "delta", "ema")
SETTINGS = ["train.save_steps=3", "model.dropout.hidden=0.1", f"fusion={{method: [{', '.join(MERGES)}]}}"]


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tmp_path_factory):
    """The folder of a run that nobody touched; 10 steps, and an epoch has 7."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(folder / "cache"))
        small_run(folder, tiny_model_folder, train={"max_steps": 10, "learning_rate": 1e-3})
        train(load_config(folder / "config.yaml", SETTINGS))
    return folder


def assert_same(folder, run):
    for model in ("model", *(f"fused/{name}" for name in MERGES)):
        assert_equal_weights(folder / "run" / model, run / model, rtol=0, atol=0)
    one, other = ({path.name for path in each.iterdir()} for each in (folder / "run", run))
    assert one == other
    one, other = ({path.name for path in (each / "fused").iterdir()} for each in (folder / "run", run))
    assert one == other
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("killed_in", ["_finish", "merge_run", "report_run"])
def test_a_run_killed_after_its_last_step_does_what_is_left(whole, tmp_path, monkeypatch, killed_in):
    config = load_config(whole / "config.yaml", [*SETTINGS, f"output_dir={tmp_path / 'run'}"])

    def killed(*arguments):
        if killed_in == "merge_run":
            for half in ("uniform", ".writing-delta-a1b2"):
                (tmp_path / "run" / "fused" / half).mkdir(parents=True)
            (tmp_path / "run" / "fused" / half / "fusion.json").write_text('{"method": "delta"}')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    page = write_report(tmp_path / "run")  # looked at in between, it is not finished
    assert "delta-a1b2" not in page.read_text()
    with pytest.raises(ConfigError, match=r"an unfinished run \(checkpoint-10\)"):
        train(config)
    train(config, resume=True)
    assert_same(whole, tmp_path / "run")
    with pytest.raises(ConfigError, match="a finished run"):
        train(config, resume=True)


def test_the_checkpoint_of_a_signal_is_not_merged(whole, tmp_path, monkeypatch):
    """It was not due: what a run leaves does not depend on when it was stopped."""
    config = load_config(whole / "config.yaml", [*SETTINGS, f"output_dir={tmp_path / 'run'}"])
    step_end = MetricsLog.on_step_end

    def signalled(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "on_step_end", signalled)
        with pytest.raises(Stopped, match="go on with --resume"):
            train(config)
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert "checkpoint-3" in kept
    assert kept & {"checkpoint-4", "checkpoint-5"}
    train(config, resume=True)
    assert_same(whole, tmp_path / "run")


def test_without_checkpoints_that_are_due_none_stays(whole, tmp_path, monkeypatch):
    """Also the one of a signal goes, at the end of the resumed run."""
    settings = ["train.save_strategy=no", f"output_dir={tmp_path / 'run'}"]
    config = load_config(whole / "config.yaml", settings)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "on_step_begin", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="go on with --resume"):
            train(config)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    train(config, resume=True)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_finished_run_without_checkpoints_is_refused(whole, tmp_path):
    """It does not say that it is finished, but there is nothing to go on from."""
    shutil.copytree(whole / "run" / "model", tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match="a finished run"):
        train(load_config(whole / "config.yaml", [f"output_dir={tmp_path / 'run'}"]), resume=True)


PROGRAM = """
import sys
from codiemb import cli
from codiemb.training.trainer import JointTrainer

def fails(self, *arguments, **settings):
    raise RuntimeError("as a defect")

if sys.argv[1] == "fails":
    JointTrainer.training_step = fails
cli.main(sys.argv[2:])
"""


def codiemb(program, *arguments, **settings):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, program, *map(str, arguments)], capture_output=True, text=True, **settings
    )


@pytest.mark.parametrize(("program", "code"), [("ends", 0), ("fails", 1)])
def test_a_process_with_loader_workers_ends(whole, tmp_path, program, code):
    """They take no signals, so multiprocessing would wait for them for ever."""
    settings = [f"output_dir={tmp_path / 'run'}", "train.dataloader_num_workers=3", "evaluation.every_steps=5"]
    done = codiemb(program, "train", whole / "config.yaml", *settings, timeout=150)
    assert done.returncode == code, done.stderr
    assert ("as a defect" in done.stderr) == (code == 1)
    assert "Exception ignored" not in done.stderr


def test_a_disk_that_fills_while_the_moments_are_written_is_one_line(whole, tmp_path):
    """torch's writer fails a second time when it is closed, with words that do not tell why."""
    weights = (whole / "run" / "model" / "model.safetensors").stat().st_size
    settings = [f"output_dir={tmp_path / 'run'}", "evaluation.suite=null"]
    done = codiemb(
        "ends",
        *("train", whole / "config.yaml", *settings),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (weights * 3 // 2, weights * 3 // 2)),
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "free some disk, then go on with --resume" in errors[0]
    assert "Traceback" not in done.stderr
