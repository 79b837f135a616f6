"""Seconds and memory of `codiemb analyze` on many texts.

    python benchmarks/analyze.py TEXTS [--texts 10000] [--models MODEL ...]

TEXTS is JSONL of objects with `text`, such as the corpus.jsonl of a BEIR folder; the first `--texts` distinct ones are
taken. The command runs as a process of its own, its start included. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import commit, machine

from codiemb.versions import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="TEXTS")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--models", nargs="+", default=["bundled:all-MiniLM-L6-v2"])
    arguments = parser.parse_args()
    with arguments.file.open(encoding="utf-8") as lines:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))[: arguments.texts]
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        command = ["analyze", *arguments.models, "--texts", str(file), "--out", str(Path(folder) / "out")]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "codiemb", *command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        analyzed = json.loads((Path(folder) / "out" / "geometry.json").read_text())["texts"]
    found = {
        "benchmark": "analyze",
        "texts": analyzed,
        "characters": sum(map(len, texts)),
        "models": arguments.models,
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 3),
        "machine": before,
    }
    print(json.dumps({**found, "versions": versions(), "commit": commit()}), flush=True)


if __name__ == "__main__":
    main()
