"""What a run folder holds when a run begins in it: nothing of an earlier run, unless it goes on from there."""

import shutil
from types import SimpleNamespace

import pytest

from codiemb.errors import CheckpointError
from codiemb.training.run_folder import RUN_FILES, begin, require_disk

WRITTEN = {"config.yaml", "plan.json", "environment.json"}
STALE = {
    "eval/step-50/sts.json", "conflict.jsonl", "comparison.json", "geometry/geometry.json", "geometry.json",
    "geometry.svg", "pareto.json", "pareto.svg", "trials.jsonl", "metrics.jsonl", "report.html",
    "moves.json", "moves.svg", ".finished",
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Begins a run in a folder that holds STALE, and says which files are there then."""

    def start(*, overwrite=False, from_start=True, left=(*STALE, *WRITTEN, "notes.txt")):
        for name in left:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("old")
        begin(tmp_path, overwrite, from_start, dict.fromkeys(WRITTEN, "new"))
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert all((tmp_path / name).read_text() != "old" for name in WRITTEN)
        return {str(path.relative_to(tmp_path)) for path in files}

    return start


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_from_the_first_step_keeps_nothing_of_an_earlier_one(start, overwrite):
    """Killed before its first checkpoint and started again, a run would show scores of the one before it. Files of
    nobody's run stay."""
    assert start(overwrite=overwrite) == {*WRITTEN, "notes.txt"}


def test_a_run_that_goes_on_keeps_its_files(start):
    """But what calls it finished."""
    assert start(from_start=False) == {*STALE, *WRITTEN, "notes.txt"} - {".finished"}


def test_a_folder_where_no_run_was_loses_nothing(start):
    """What somebody has laid there by hand is not removed without --overwrite."""
    assert start(left=("eval/mine.txt", "geometry.json")) == {*WRITTEN, "eval/mine.txt", "geometry.json"}


def test_a_removal_that_was_cut_goes_on_at_the_next_start():
    """The file that tells of an earlier run is the last to go."""
    assert RUN_FILES[-1] == "environment.json"


def test_what_only_looks_like_a_checkpoint_stays(start, tmp_path):
    """A note, an archive, a folder of another name; a link goes, what it leads to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("old")
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    left = ("checkpoint-2/weights", "checkpoint-notes.txt", "checkpoint-best/weights")
    assert start(overwrite=True, left=left) == {*WRITTEN, *left[1:], "elsewhere/weights"}


def test_what_the_run_will_remove_is_room(tmp_path, monkeypatch):
    """A checkpoint that was being written, and with --overwrite the run before: on a tight disk neither could go on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    for name, size in ((".writing/checkpoint-4/weights", 30), ("checkpoint-2/weights", 50), ("model/weights", 20)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    require_disk(tmp_path, 130, overwrite=False)
    require_disk(tmp_path, 200, overwrite=True)
    for needed, overwrite in ((131, False), (201, True)):
        with pytest.raises(CheckpointError, match="of free disk"):
            require_disk(tmp_path, needed, overwrite)
