"""Files are whole, and a run has its folder to itself: a process that was killed holds nothing."""

import json
import os
import subprocess
import sys

import pytest

from codiemb.errors import CheckpointError, ConfigError
from codiemb.files import held, write_json

# Holds the folder, forks a child (as data workers are) that lives on, says both process numbers, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from codiemb.files import held
with held(Path(sys.argv[1]), Path(sys.argv[1], 'unfinished')):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    subprocess.run(["kill", "-9", str(child)], check=False)


def test_a_folder_is_held_by_one_process(tmp_path, holder):
    with pytest.raises(ConfigError, match="running process"), held(tmp_path, tmp_path / "unfinished"):
        pass


def test_a_killed_process_lets_go_though_its_child_lives_on(tmp_path, holder):
    holder.kill()
    holder.wait()
    with held(tmp_path, tmp_path / "unfinished"):
        pass


def test_a_folder_can_be_held_again(tmp_path):
    for _ in range(2):
        with held(tmp_path / "new", tmp_path / "unfinished"):
            pass


@pytest.mark.parametrize("error", [CheckpointError("disk", got="full", expected="room"), RuntimeError("peer lost")])
def test_what_is_unfinished_goes_with_any_error(tmp_path, error):
    """Also when it is another rank's disk that is full, which this one only sees as a lost connection."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    with pytest.raises(type(error)), held(tmp_path, unfinished):
        raise error
    assert not unfinished.exists()


def test_json_holds_a_path_that_is_not_utf_8(tmp_path):
    """Python reads the byte 0xff in the name of a file as half of a surrogate pair, which UTF-8 cannot hold."""
    write_json(tmp_path / "a.json", {"path": os.fsdecode(b"r\xff"), "word": "größer"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["path"] == os.fsdecode(b"r\xff")
    assert "größer" in (tmp_path / "a.json").read_text(encoding="utf-8")
