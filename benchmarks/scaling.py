"""How fast the same training is on one process and on two, on the shipped data; gloo, processors.

    python benchmarks/scaling.py [--repeats 3] [--steps 12]

On c cores: one process with c threads, two with c / 2 each, and one with c / 2, in turn in one run. The first two share
the same cores, so their ratio is what the second process costs; the last two differ by the second core alone. Exchanges
are those of embeddings, labels and counts, with the wait for the slower process; DDP's of gradients, which run beside
the backward pass, are not in it. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import commit, machine

from codiemb.demo import CONFIG
from codiemb.versions import versions

WARM_UP = 4  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 2
    layouts = {
        "one process": (1, cores),
        "two processes": (2, cores // 2),
        "one process, half the cores": (1, cores // 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    exchanges: list[float] = []
    for _ in range(arguments.repeats):
        for name, (processes, threads) in layouts.items():
            rate, share = speed(processes, threads, arguments.steps)
            rates[name].append(rate)
            if processes > 1:
                exchanges.append(share)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    facts = {
        "benchmark": "scaling",
        "cores": cores,
        "steps": arguments.steps,
        "tokens_a_second": {name: [round(rate) for rate in found] for name, found in rates.items()},
        "two_processes_over_one": round(medians["two processes"] / medians["one process"], 3),
        "share_of_exchanges": [round(share, 4) for share in exchanges],
        "second_core_gains": round(medians["two processes"] / medians["one process, half the cores"], 3),
    }
    print(json.dumps({**facts, **machine(), "versions": versions(), "commit": commit()}))


def speed(processes: int, threads: int, steps: int) -> tuple[float, float]:
    """Tokens a second of all processes together, and the share of their time in exchanges, after the warm-up."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "codiemb", "train", str(CONFIG)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [f"output_dir={run}", f"train.max_steps={steps}", "train.save_strategy=no"]
        settings += ["evaluation.suite=null", "fusion=null"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*command, *settings], check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = sum(line["seconds"] for line in lines)
    exchanged = sum(line["seconds/communication"] for line in lines)
    return sum(line["tokens"] for line in lines) / seconds, exchanged / seconds


if __name__ == "__main__":
    main()
