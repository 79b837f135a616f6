"""A checkpoint is whole or is told from its manifest, and the last whole one is never removed."""

import json

import pytest

from codiemb.errors import CheckpointError
from codiemb.files import publish
from codiemb.training.checkpoint import MANIFEST, checkpoints, clean, keep_newest, newest_whole, replace, seal, verify


def write(run, step, content=b"weights", scheduled=True):
    """As the Trainer does it: written aside, sealed, then named."""
    written = run / ".writing" / f"checkpoint-{step}"
    (written / "1_Pooling").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(content)
    (written / "1_Pooling" / "config.json").write_text("{}")
    environment = {"threads": 2, "versions": {}}
    seal(written, step=step, world_size=2, facts={"seed": "42"}, environment=environment, scheduled=scheduled)
    replace(written, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def test_a_sealed_folder_is_verified_and_says_what_it_is(tmp_path):
    found = verify(write(tmp_path, 7))
    assert (found.path, found.step, found.world_size) == (tmp_path / "checkpoint-7", 7, 2)
    assert (found.facts, found.environment) == ({"seed": "42"}, {"threads": 2, "versions": {}})
    listed = json.loads((found.path / MANIFEST).read_text())["files"]
    # echo -n weights | sha256sum
    assert listed["model.safetensors"] == {
        "bytes": 7,
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert set(listed) == {"model.safetensors", "1_Pooling/config.json"}


def cut(folder):
    (folder / "model.safetensors").write_bytes(b"weight")


def change(folder):
    (folder / "model.safetensors").write_bytes(b"Weights")


def rename(folder):
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": ', '"step": 7'))


def lose(folder):
    (folder / "1_Pooling" / "config.json").unlink()


def lose_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def deepen_manifest(folder):
    (folder / MANIFEST).write_text("[" * 100_000)


def no_versions(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"versions"', '"version"'))


def empty_manifest(folder):
    (folder / MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "model.safetensors: got 6 bytes, expected 7 bytes"),
        (change, "model.safetensors: got another content"),
        (rename, "manifest.json: got step 7"),
        (lose, "1_Pooling/config.json: got no file"),
        (lose_manifest, "manifest.json: got nothing there"),
        (cut_manifest, "manifest.json: got JSONDecodeError"),
        (empty_manifest, "manifest.json: got TypeError"),
        (deepen_manifest, "manifest.json: got RecursionError"),
        (no_versions, "manifest.json: got KeyError"),
    ],
)
def test_damage_is_found_and_an_older_checkpoint_taken(tmp_path, damage, said):
    write(tmp_path, 9)
    damage(write(tmp_path, 10))
    with pytest.raises(CheckpointError, match=said):
        verify(tmp_path / "checkpoint-10")
    checkpoint, faults = newest_whole(tmp_path)
    assert checkpoint.step == 9
    assert len(faults) == 1
    assert said in faults[0]
    damage(tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        newest_whole(tmp_path)


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    """As a bad block of a disk: the file has its size, and reading it fails."""
    write(tmp_path, 3)

    def unreadable(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("codiemb.training.checkpoint.sha256", unreadable)
    with pytest.raises(CheckpointError, match=r"checkpoint-3/\S+: got \[Errno 5\] Input/output error"):
        verify(tmp_path / "checkpoint-3")


def test_a_run_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert newest_whole(tmp_path) == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 100, 10):
        write(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(None, {10, 20, 30, 40, 90}), (9, {10, 20, 30, 40}), (3, {20, 30, 40}), (2, {30, 40}), (1, {40})],
)
def test_the_limit_never_removes_the_checkpoint_just_written(tmp_path, limit, kept):
    """checkpoint-90 is damaged: the run went on from before it. By number alone it would be the one to keep."""
    for step in (10, 20, 30, 90, 40):
        write(tmp_path, step)
    cut(tmp_path / "checkpoint-90")
    keep_newest(tmp_path, limit, tmp_path / "checkpoint-40")
    assert {int(path.name.removeprefix("checkpoint-")) for path in checkpoints(tmp_path)} == kept
    assert not list(tmp_path.glob(".removing*"))


@pytest.mark.parametrize(("limit", "kept"), [(None, {10, 20, 30}), (2, {20, 30})])
def test_what_a_signal_left_goes_when_the_next_checkpoint_is_there(tmp_path, limit, kept):
    """It takes the place of none that is due."""
    for step in (10, 20):
        write(tmp_path, step)
    write(tmp_path, 25, scheduled=False)
    keep_newest(tmp_path, limit, tmp_path / "checkpoint-25")
    assert (tmp_path / "checkpoint-25").exists()
    write(tmp_path, 30)
    keep_newest(tmp_path, limit, tmp_path / "checkpoint-30")
    assert {int(path.name.removeprefix("checkpoint-")) for path in checkpoints(tmp_path)} == kept


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    cut(write(tmp_path, 5))
    assert verify(write(tmp_path, 5, b"new weights")).step == 5


def test_what_a_dead_process_left_is_cleaned(tmp_path):
    for name in (".writing/checkpoint-4", ".removing-checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gets_its_name_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "written" / "inner").mkdir(parents=True)
    (tmp_path / "written" / "inner" / "file").write_text("a")
    synced = []
    monkeypatch.setattr("codiemb.files.sync", lambda path: synced.append((path, (tmp_path / "final").exists())))
    publish(tmp_path / "written", tmp_path / "final")
    before = {path.relative_to(tmp_path / "written").as_posix() for path, named in synced if not named}
    assert before == {".", "inner", "inner/file"}
    assert synced[-1] == (tmp_path, True)
