"""Training with codiemb beside training with sentence-transformers: rows a second and peak memory, in turn.

    python benchmarks/train.py --against sentence-transformers DATA_ROOT [--only long-ir] [--dtype fp32 bf16]

DATA_ROOT holds `sts/stsb` and the BEIR folders `ir/pubmedqa` and `ir/medquad`. Three workloads, each with the same
model, rows, batches, lengths, optimizer, number type and steps on both sides:

    short-pairs   stsb, 64 pairs a step
    long-ir       pubmedqa, 16 queries x (1 positive + 4 negatives), 256 tokens
    mixed-ir      medquad, 32 queries x (1 positive + 2 negatives), 256 tokens
    large-batch   medquad, 1,024 queries x (1 positive + 4 negatives), 256 tokens: for `--sides ours-2gb`, where the
                  peak is the figure; one step takes a quarter of an hour, and it is run only when it is named

The collections bring no hard negatives; here they are documents drawn at random. Every run is a process of its own:
`codiemb train CONFIG` on our side, on theirs a script with `SentenceTransformerTrainer` (`their_training.py`). Seconds
are those of whole steps, data included, after the warm-up steps; memory is the peak of the process as the system
counts it. The sides, of which `--sides` takes some:

    ours            attention dropout 0, hidden dropout of the model: what codiemb does unless told otherwise
    theirs          both dropouts of the model (0.1): what sentence-transformers does unless told otherwise
    ours-dropout    both dropouts of the model: to set beside `theirs`
    theirs-dropout0 attention dropout 0: to set beside `ours`
    theirs-cached   as `theirs`, with CachedMultipleNegativesRankingLoss, 32 texts at once (retrieval only)
    theirs-eager    as `theirs`, with eager attention in place of SDPA
    ours-2gb        as `ours`, within `train.memory_budget: 2`

A figure is worth reporting when `share_of_machine_taken_by_others` is near 0 on all sides.

Prints one JSON line a workload and number type, with medians over `--repeats` turns, the spread, and ratios taken
within each turn. With `--out FILE` lines are appended, and what the file holds already is not run again. On two cores
a turn of the first four sides takes about 1 (short), 3 (long) and 3 (mixed) minutes in fp32.

`--model large` or `tiny` trains a random BERT of that size (24 layers of width 1024; 2 of 64) in place of the bundled
model; with a GPU both sides use it. Then model FLOPs utilisation is the figure to look at: `percent_of_peak`, the FLOPs
that the real tokens need (three times the forward pass) beside a matrix product measured in the same call.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from machine import commit, machine

from codiemb.batching.plan import Plan
from codiemb.config import Batching
from codiemb.versions import versions

HERE = Path(__file__).parent
SEED = 7
RATIOS = (
    ("ours", "theirs"),
    ("ours-dropout", "theirs"),
    ("ours", "theirs-dropout0"),
    ("ours", "theirs-cached"),
    ("ours", "theirs-eager"),
    ("ours-2gb", "theirs"),
)
DEFAULT_SIDES = ("ours", "theirs", "ours-dropout", "theirs-dropout0")


@dataclass(frozen=True)
class Workload:
    """`rows` a step, the first `warm_up` of `steps` steps not counted."""

    task: str
    path: str
    rows: int
    negatives: int
    max_length: int
    warm_up: int
    steps: int


WORKLOADS = {
    "short-pairs": Workload("similarity", "sts/stsb", 64, 0, 128, 5, 25),
    "long-ir": Workload("retrieval", "ir/pubmedqa", 16, 4, 256, 1, 4),
    "mixed-ir": Workload("retrieval", "ir/medquad", 32, 2, 256, 1, 5),
    "large-batch": Workload("retrieval", "ir/medquad", 1024, 4, 256, 0, 1),
}


@dataclass(frozen=True)
class Side:
    """How one side trains; `attention_dropout` None is the model's own."""

    ours: bool
    attention_dropout: float | None
    attention: str = "sdpa"
    cached: bool = False
    memory_budget: float | None = None


SIDES = {
    "ours": Side(True, 0.0),
    "ours-dropout": Side(True, None),
    "ours-2gb": Side(True, 0.0, memory_budget=2),
    "theirs": Side(False, None),
    "theirs-dropout0": Side(False, 0.0),
    "theirs-cached": Side(False, None, cached=True),
    "theirs-eager": Side(False, None, attention="eager"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_ROOT")
    parser.add_argument("--against", choices=["sentence-transformers"], default="sentence-transformers")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS)[:3])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(DEFAULT_SIDES))
    parser.add_argument("--model", choices=["bundled", "large", "tiny"], default="bundled")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps counted, in place of each workload's own")
    parser.add_argument("--warm-up", type=int, help="steps not counted, in place of each workload's own")
    parser.add_argument("--out", type=Path, help="a file of results, appended to")
    arguments = parser.parse_args()
    for name in arguments.only:
        for dtype in arguments.dtype:
            asked = {"workload": name, "dtype": dtype, "model": arguments.model, "sides": sorted(arguments.sides)}
            if not done(asked, arguments.out):
                line = json.dumps(compare(name, dtype, arguments) | asked)
                print(line, flush=True)
                if arguments.out:
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


def done(asked: dict[str, Any], out: Path | None) -> bool:
    """Whether the file of results holds this comparison."""
    if out is None or not out.is_file():
        return False
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return any(asked.items() <= line.items() for line in lines)


def compare(name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides of one workload, in turn, `--repeats` times."""
    workload, before = WORKLOADS[name], machine()
    warm_up = workload.warm_up if arguments.warm_up is None else arguments.warm_up
    steps = warm_up + (arguments.steps or workload.steps - workload.warm_up)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = ROWS[workload.task](arguments.data / workload.path, workload, workload.rows * steps)
        write_rows(folder, rows, workload)
        spec = asdict(workload) | {"warm_up": warm_up, "steps": steps, "dtype": dtype, "folder": str(folder)}
        spec |= {"model": arguments.model}
        work = worker("work", spec)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
        for turn in range(arguments.repeats):
            for side in arguments.sides:
                runs[side].append(run(side, spec))
                told = {key: round(value, 2) for key, value in runs[side][-1].items()}
                print(f"{name} {dtype} turn {turn + 1} {side}: {told}", file=sys.stderr, flush=True)
    return {
        "benchmark": "train",
        "against": arguments.against,
        "repeats": arguments.repeats,
        "steps_counted": steps - warm_up,
        "rows_per_step": workload.rows,
        "sides_measured": {side: summary(turns, workload, work) for side, turns in runs.items()},
        "ratios": {
            f"{a} / {b}": {
                "rows_per_second": spread([y["seconds"] / x["seconds"] for x, y in zip(runs[a], runs[b], strict=True)]),
                "peak_memory": spread([x["peak_gb"] / y["peak_gb"] for x, y in zip(runs[a], runs[b], strict=True)]),
            }
            for a, b in RATIOS
            if runs.get(a) and runs.get(b)
        },
        **work,
        "machine": before,
        "versions": versions(),
        "commit": commit(),
    }


def summary(turns: list[dict[str, float]], workload: Workload, work: dict[str, Any]) -> dict[str, Any]:
    """Medians of one side over its turns."""
    seconds = spread([turn["seconds"] for turn in turns])
    flops = work["flops_per_step"] / seconds["median"]
    return {
        "seconds_per_step": seconds,
        "rows_per_second": round(workload.rows / seconds["median"], 2),
        "tokens_per_second": round(work["tokens_per_step"] / seconds["median"]),
        "peak_gb": spread([turn["peak_gb"] for turn in turns]),
        "share_of_machine_taken_by_others": round(max(turn["others"] for turn in turns), 2),
        "page_faults_per_step": round(median(turn["page_faults"] for turn in turns)),
        "gflops": round(flops / 1e9, 1),
        "percent_of_peak": round(100 * flops / (work["matmul_gflops"] * 1e9), 1),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}


def run(side: str, spec: dict[str, Any]) -> dict[str, float]:
    """Seconds a step and peak memory of one training run in a process of its own."""
    chosen = SIDES[side]
    folder = Path(spec["folder"])
    result = folder / "result.json"
    if chosen.ours:
        config = folder / "config.json"  # JSON is YAML
        config.write_text(json.dumps(our_config(chosen, spec)), encoding="utf-8")
        usage = measured([sys.executable, "-m", "codiemb", "train", str(config), "--overwrite"])
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
    else:
        task = folder / "task.json"
        task.write_text(json.dumps(spec | asdict(chosen) | {"result": str(result)}), encoding="utf-8")
        usage = measured([sys.executable, str(HERE / "their_training.py"), "train", str(task)])
        seconds = json.loads(result.read_text(encoding="utf-8"))["seconds"]
    counted = seconds[spec["warm_up"] :]
    return {
        "seconds": sum(counted) / len(counted),
        "peak_gb": usage["peak"] / 1e9,
        "page_faults": usage["faults"] / spec["steps"],
        "others": usage["others"],
    }


def measured(command: list[str]) -> dict[str, float]:
    """Peak memory in bytes, minor page faults, and the share of the machine that others took meanwhile.

    The command must succeed.
    """
    with tempfile.TemporaryFile("w+") as output:
        started, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-3000:]}")
    others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    share = max(0.0, others / (time.perf_counter() - started) / (os.cpu_count() or 1))
    return {"peak": usage.ru_maxrss * 1024, "faults": usage.ru_minflt, "others": share}


def busy_seconds() -> float:
    """Seconds that all processors have worked since the machine started (Linux)."""
    user, nice, system, _, _, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def worker(verb: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What `their_training.py` answers; this process imports no torch, so that it lends no peak to its children."""
    task, result = Path(spec["folder"]) / "task.json", Path(spec["folder"]) / "result.json"
    task.write_text(json.dumps(spec | {"result": str(result)}), encoding="utf-8")
    measured([sys.executable, str(HERE / "their_training.py"), verb, str(task)])
    return json.loads(result.read_text(encoding="utf-8"))


def our_config(side: Side, spec: dict[str, Any]) -> dict[str, Any]:
    """The configuration of `codiemb train`; losses of the same cost as theirs."""
    folder, task = spec["folder"], spec["task"]
    lists = {"batch_size": spec["rows"], "positives": 1, "negatives": spec["negatives"]}
    budget = {} if side.memory_budget is None else {"memory_budget": side.memory_budget}
    return {
        "output_dir": f"{folder}/run",
        "seed": SEED,
        "model": {
            "base": "bundled:all-MiniLM-L6-v2" if spec["model"] == "bundled" else f"{folder}/model",
            "max_length": dict.fromkeys(("query", "document", "similarity"), spec["max_length"]),
            "dropout": {"attention": side.attention_dropout},
        },
        "data": [{"name": "rows", "task": task, "path": f"{folder}/rows.jsonl"}],
        "batching": {task: lists if task == "retrieval" else {"batch_size": spec["rows"]}},
        "losses": {
            task: {"temperature": 0.02}
            if task == "retrieval"
            else {"pearson": 0, "rank_kl": 0, "pro": 0, "mid_nce": 0, "cosent": 1}
        },
        "train": {
            "learning_rate": 2e-5,
            "max_steps": spec["steps"],
            "warmup_ratio": 0.1,
            "bf16": spec["dtype"] == "bf16",
            "save_strategy": "no",
            "logging_steps": 1,
            **budget,
        },
    }


def write_rows(folder: Path, rows: list[dict[str, Any]], workload: Workload) -> None:
    """The rows for us, and the same in the order in which our plan brings them, for the other side."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Batching.model_validate({workload.task: {"batch_size": workload.rows}})
    plan = Plan({"rows": len(rows)}, {"rows": workload.task}, settings, SEED)
    planned = [rows[place] for step in plan.steps(0) for place in step.batches[0].rows]
    (folder / "planned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planned), encoding="utf-8")


def pairs(folder: Path, workload: Workload, wanted: int) -> list[dict[str, Any]]:
    """The first pairs of the training split, with scores from 0 to 1."""
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    distinct = {(row["sentence1"], row["sentence2"]): row["score"] / 5 for row in read}
    rows = [{"query": a, "positives": [b], "positive_scores": [score]} for (a, b), score in distinct.items()]
    return random.Random(SEED).sample(rows, wanted)


def questions(folder: Path, workload: Workload, wanted: int) -> list[dict[str, Any]]:
    """Queries of the training split, each with one positive and random documents as negatives."""
    texts: dict[str, dict[str, str]] = {}
    for kind in ("corpus", "queries"):
        with (folder / f"{kind}.jsonl").open(encoding="utf-8") as file:
            texts[kind] = {row["_id"]: row["text"] for row in map(json.loads, file)}
    relevant: dict[str, str] = {}
    for line in (folder / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        relevant.setdefault(query, document)
    chance = random.Random(SEED)
    documents = list(texts["corpus"])
    rows = []
    for query in chance.sample(list(relevant), wanted):
        others = [document for document in chance.sample(documents, workload.negatives + 1) if document != query]
        others = [document for document in others if document != relevant[query]][: workload.negatives]
        rows.append(
            {
                "query": texts["queries"][query],
                "positives": [texts["corpus"][relevant[query]]],
                "negatives": [texts["corpus"][document] for document in others],
            }
        )
    return rows


ROWS: dict[str, Callable[[Path, Workload, int], list[dict[str, Any]]]] = {"similarity": pairs, "retrieval": questions}


if __name__ == "__main__":
    main()
