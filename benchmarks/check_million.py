"""Seconds and peak memory of `codiemb check` on a million generated rows, read for the first time (fresh cache).

    python benchmarks/check_million.py [--rows 1000000]

Three rows in five are retrieval records of one positive and one negative, the rest scored pairs; a text has about
twelve words. Generating them is not timed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import commit, machine

from codiemb.versions import versions

WORDS = 12
SEED = 7
CONFIG = """\
output_dir: run
model: {base: "bundled:all-MiniLM-L6-v2"}
data:
  - {name: questions, task: retrieval, path: questions.jsonl}
  - {name: pairs, task: similarity, path: pairs.jsonl, score_range: [0, 5]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, rows)
        started = time.perf_counter()
        finished = subprocess.run(
            [sys.executable, "-m", "codiemb", "check", "config.yaml"],
            cwd=folder,
            env={**os.environ, "CODIEMB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
    if finished.returncode:
        sys.exit(finished.stderr)
    result = {
        "benchmark": "check_million",
        "rows": rows,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    print(json.dumps(result))


def write_rows(folder: Path, rows: int) -> None:
    """The two data files and the configuration."""
    texts = sentences()
    retrieval = rows * 3 // 5
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(retrieval):
            row = {"query": f"{next(texts)} {number}", "positives": [next(texts)], "negatives": [next(texts)]}
            file.write(json.dumps(row) + "\n")
    scores = random.Random(SEED)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows - retrieval):
            score = round(scores.uniform(0, 5), 1)
            row = {"query": f"{next(texts)} {number}", "positives": [next(texts)], "positive_scores": [score]}
            file.write(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")


def sentences() -> Iterator[str]:
    """Endless random texts of 8 to 16 made-up words."""
    choose = random.Random(SEED)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = ["".join(choose.choices(syllables, k=choose.choice((1, 2, 3)))) for _ in range(20_000)]
    while True:
        yield " ".join(choose.choices(words, k=choose.randint(WORDS - 4, WORDS + 4)))


if __name__ == "__main__":
    main()
