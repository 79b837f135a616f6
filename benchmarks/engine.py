"""Each lever of the step engine alone, on a processor: seconds, page faults and memory of a training step.

    python benchmarks/engine.py [--only attention memory ...] [--repeats 3] [--out FILE]

A case differs in one setting from what codiemb does (`Setting`'s defaults), runs in a process of its own, and takes
whole steps: forward and backward of every micro-batch, clipping, the optimizer. The cases of a group run in turn.
Each group prints a table, and a JSON line a case with medians and range; with `--out` the lines are kept, and a group
whose lines are there is not run again. On two cores a turn takes about 20 seconds a case; `cost` takes 10 minutes in
all, `compile` about 3 a turn.

    attention   eager, SDPA and ours by length and number type; with and without attention dropout
    dropout     masks of torch, ours, none
    budget      tokens of a micro-batch
    memory      malloc as it is, kept, with huge pages, jemalloc and tcmalloc (where they are installed)
    optimizer   AdamW fused, foreach, in a loop
    threads     one and two; waiting threads that spin
    precision   bf16 autocast, flushed denormals, oneDNN's reduced precision
    compile     torch.compile of the encoder (first step apart)
    padding     texts of mixed lengths, micro-batches padded to multiples of 1, 8, 16, 32
    cost        batch 16..1,024 x length 32..512: time is to be linear in tokens
"""

from __future__ import annotations

import argparse
import ctypes.util
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from machine import commit, machine

from codiemb.versions import versions

SEED = 7
BUNDLED = "bundled:all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Setting:
    """One case; the defaults are codiemb's."""

    attention: str = "codiemb_cpu"
    attention_dropout: float = 0.0
    dropout: str = "codiemb"
    length: int = 256
    mixed: bool = False
    multiple: int = 1
    texts: int = 16
    micro_batch: int = 2048
    memory: str = "kept"
    optimizer: str = "fused"
    threads: int | None = None
    wait: str = "PASSIVE"
    bf16: bool = False
    flush_denormals: bool = False
    matmul_precision: str = "highest"
    compiled: bool = False
    steps: int = 3


OURS = Setting()
SHORT = replace(OURS, length=16, texts=128, steps=6)
LENGTHS = {16: 128, 64: 64, 128: 32, 256: 16}  # texts of a step by length

GROUPS: dict[str, dict[str, Setting]] = {
    "attention": {
        f"{attention} {length} {'bf16' if bf16 else 'fp32'} dropout {p}": replace(
            OURS, attention=attention, length=length, texts=texts, bf16=bf16, attention_dropout=p
        )
        for bf16, p in ((False, 0.0), (False, 0.1), (True, 0.0))
        for length, texts in LENGTHS.items()
        for attention in ("eager", "sdpa", "codiemb_cpu")
        if not bf16 or length in (16, 256)
    },
    "dropout": {name: replace(OURS, dropout=name) for name in ("torch", "codiemb", "none")},
    "budget": {
        f"{tokens} tokens at length {base.length}": replace(base, micro_batch=tokens, texts=16384 // base.length)
        for base in (OURS, SHORT)
        for tokens in (512, 1024, 2048, 4096, 8192, 16384)
    },
    "memory": {
        f"{memory} length {base.length}": replace(base, memory=memory)
        for base in (OURS, SHORT)
        for memory in ("glibc", "kept", "kept, huge pages of malloc", "kept, no huge pages", "jemalloc", "tcmalloc")
    },
    "optimizer": {name: replace(SHORT, optimizer=name) for name in ("fused", "foreach", "loop")},
    "threads": {
        "two, passive": replace(OURS, threads=2),
        "two, active": replace(OURS, threads=2, wait="ACTIVE"),
        "one": replace(OURS, threads=1),
    },
    "precision": {
        "fp32": OURS,
        "bf16": replace(OURS, bf16=True),
        "denormals flushed": replace(OURS, flush_denormals=True),
        "matmul high": replace(OURS, matmul_precision="high"),
        "matmul medium": replace(OURS, matmul_precision="medium"),
    },
    "compile": {"plain": replace(OURS, steps=5), "compiled": replace(OURS, steps=5, compiled=True)},
    "padding": {
        f"multiple of {multiple}": replace(OURS, mixed=True, texts=64, multiple=multiple) for multiple in (1, 8, 16, 32)
    },
    "cost": {
        f"{texts} x {length}": replace(OURS, texts=texts, length=length, steps=1 if texts * length > 32768 else 2)
        for texts in (16, 64, 256, 1024)
        for length in (32, 128, 512)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file of results, appended to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        given = json.loads(arguments.worker)
        print(json.dumps(peak_of_matmul() if given is None else work(Setting(**given))))
        return
    peak = run(None)["gflops"]
    for group in arguments.only:
        if not done(group, arguments.out):
            lines = measure(group, peak, arguments.repeats if group != "cost" else 1)
            print(table(lines), flush=True)
            for line in map(json.dumps, lines):
                print(line, flush=True)
                if arguments.out:
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


def done(group: str, out: Path | None) -> bool:
    if out is None or not out.is_file():
        return False
    return any(json.loads(line)["group"] == group for line in out.read_text(encoding="utf-8").splitlines())


def measure(group: str, peak: float, repeats: int) -> list[dict[str, Any]]:
    """A line for each case of a group."""
    cases = {name: setting for name, setting in GROUPS[group].items() if library(setting.memory) is not None}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    before = machine()
    for turn, (name, setting) in itertools.product(range(repeats), cases.items()):
        turns[name].append(run(setting))
        print(f"{group}, turn {turn + 1}, {name}: {turns[name][-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
    return [
        {
            "benchmark": "engine",
            "group": group,
            "case": name,
            **{key: round(median(turn[key] for turn in turns[name]), 4) for key in turns[name][0]},
            "fastest": round(min(turn["seconds"] for turn in turns[name]), 4),
            "slowest": round(max(turn["seconds"] for turn in turns[name]), 4),
            "percent_of_peak": round(100 * median(turn["gflops"] for turn in turns[name]) / peak, 1),
            "matmul_gflops": peak,
            "repeats": repeats,
            "setting": asdict(setting),
            "machine": before,
            "versions": versions(),
            "commit": commit(),
        }
        for name, setting in cases.items()
    ]


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        f"| {line['case']} | {line['seconds']:.3f} | {line['fastest']:.3f}-{line['slowest']:.3f} | "
        f"{line['tokens_per_second']:.0f} | {line['gflops']:.0f} | {line['percent_of_peak']:.0f} | "
        f"{line['page_faults']:.0f} | {line['peak_gb']:.2f} |"
        for line in lines
    ]
    head = "seconds | range | tokens/s | GFLOP/s | % of peak | page faults | peak GB |"
    return "\n".join([f"| {lines[0]['group']} | {head}", "|---|" + "---:|" * 7, *rows])


def library(memory: str) -> str | None:
    """The allocator to load before all others: "" for none, None where it is not installed."""
    if memory not in ("jemalloc", "tcmalloc"):
        return ""
    return ctypes.util.find_library(memory) or ctypes.util.find_library(f"{memory}_minimal")


def run(setting: Setting | None) -> dict[str, float]:
    """What a process of its own measures; without a setting, the matrix product."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if setting is not None:
        environment |= {"OMP_WAIT_POLICY": setting.wait, "LD_PRELOAD": library(setting.memory) or ""}
        environment |= {} if setting.threads is None else {"OMP_NUM_THREADS": str(setting.threads)}
        if "huge pages of malloc" in setting.memory:
            environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "0"}
        elif setting.memory != "kept":
            environment |= {"THP_MEM_ALLOC_ENABLE": "0"}
    given = json.dumps(asdict(setting)) if setting is not None else "null"
    command = [sys.executable, __file__, "--worker", given]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])


def work(setting: Setting) -> dict[str, float]:
    """Steps of one case, timed one by one after two that are not."""
    from codiemb.encoder.allocator import keep_memory

    if setting.memory.startswith("kept"):
        keep_memory()
    import torch
    from flops import forward_flops

    torch.set_flush_denormal(setting.flush_denormals)
    torch.set_float32_matmul_precision(setting.matmul_precision)
    encoder = open_encoder(setting)
    chosen = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[setting.optimizer]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-5, **chosen)
    micro_batches = texts(setting)

    def step() -> None:
        for ids, mask in micro_batches:
            features = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
                embeddings = encoder(features)["sentence_embedding"]
            embeddings.float().pow(2).sum().mul(1e-3).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    if setting.steps > 1:
        step()
    seconds = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(setting.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    real = [int(length) for _, mask in micro_batches for length in mask.sum(dim=1)]
    flops = 3 * sum(forward_flops(encoder[0].config, length) for length in real)
    return {
        "seconds": median(seconds),
        "first_seconds": first,
        "tokens_per_second": sum(real) / median(seconds),
        "padding": sum(ids.numel() for ids, _ in micro_batches) / sum(real) - 1,
        "gflops": flops / median(seconds) / 1e9,
        "page_faults": (usage.ru_minflt - faults) / setting.steps,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def open_encoder(setting: Setting) -> Any:
    """The bundled model in training mode, with a case's attention and dropout."""
    import torch
    from sentence_transformers import SentenceTransformer

    from codiemb.encoder.cpu import replace_dropout
    from codiemb.encoder.location import locate

    chosen: dict[str, Any] = {"attention_probs_dropout_prob": setting.attention_dropout}
    if setting.dropout == "none":
        chosen["hidden_dropout_prob"] = 0.0
    kwargs = {"attn_implementation": setting.attention}
    encoder = SentenceTransformer(locate(BUNDLED), device="cpu", config_kwargs=chosen, model_kwargs=kwargs)
    if setting.dropout == "codiemb":
        replace_dropout(encoder)
    if setting.compiled:
        encoder[0].model = torch.compile(encoder[0].model)
    return encoder.train()


def texts(setting: Setting) -> list[tuple[Any, Any]]:
    """Ids and masks of random texts of one length, or of mixed ones, in micro-batches, longest first."""
    import torch

    torch.manual_seed(SEED)
    lengths = torch.full((setting.texts,), setting.length)
    if setting.mixed:
        lengths = torch.randint(8, setting.length + 1, (setting.texts,)).sort(descending=True).values
    pieces, start = [], 0
    while start < len(lengths):
        width = -(-int(lengths[start]) // setting.multiple) * setting.multiple
        rows = lengths[start : start + max(1, setting.micro_batch // width)]
        mask = (torch.arange(width) < rows[:, None]).long()
        pieces.append((torch.randint(1000, 20000, mask.shape), mask))
        start += len(rows)
    return pieces


def peak_of_matmul() -> dict[str, float]:
    import torch
    from flops import matmul_flops

    return {"gflops": round(matmul_flops(torch.float32) / 1e9, 1)}


if __name__ == "__main__":
    main()
