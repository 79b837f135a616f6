"""Kills a run in every way, resumes it each time, and compares its weights with those of a run that nobody touched.

    python benchmarks/chaos.py [--kills 20] [--terms 10] [--seed 0]

On one process (two threads, micro-batches side by side) and on two (torchrun, gloo, with loader workers), dropout on, a
checkpoint every other step: kill -9 of all processes at random moments, half of them while a checkpoint is written;
SIGTERM; a file of the newest checkpoint cut; the disk full while a checkpoint is written (a small tmpfs, else a limit
on the size of a file); with two processes one of them killed, one of them stopped; and after the last step kill -9
while the model is evaluated, and while the merges of the checkpoints are. Prints one JSON line for each number of
processes; exits 1 if a weight of the model or of a merge, or a step, differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
import yaml
from machine import commit, machine
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from codiemb.training.checkpoint import checkpoints, newest_whole
from codiemb.training.run_folder import FINISHED
from codiemb.versions import versions

STEPS, SAVED_EVERY, KEPT = 240, 2, 2  # an epoch has 26 steps, so the last one ends in the middle
MERGES = ("uniform", "delta")
SILENCE = 15  # seconds of train.ddp_timeout
WORDS = [f"w{number}" for number in range(500)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kill -9, over both numbers of processes")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERM, over both numbers of processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    sound = True
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk") as disk:
            write_inputs(Path(folder))
            share = len(arguments.processes)
            chaos = Chaos(Path(folder), disk, processes, random.Random(arguments.seed + processes))
            facts = chaos.play(arguments.kills // share, arguments.terms // share)
            print(json.dumps({"benchmark": "chaos", **facts, **machine(), "versions": versions(), "commit": commit()}))
            sound = sound and facts["weights_bit_identical"] and facts["every_step_once"] and facts["losses_identical"]
    sys.exit(0 if sound else 1)


class Chaos:
    """One run, ended and resumed until it is whole.

    Args:
        folder: with the inputs.
        disk: a folder of limited size for the run, or None if there is none.
    """

    def __init__(self, folder: Path, disk: Path | None, processes: int, random: random.Random) -> None:
        self.folder, self.disk, self.processes, self.random = folder, disk, processes, random
        self.run = (disk or folder) / "run"
        self.said = folder / "said.txt"

    def play(self, kills: int, terms: int) -> dict[str, object]:
        """Every trouble in turn, then the comparison."""
        whole = self.folder / "whole"
        self.finish(whole, "the run that nobody touches")
        troubles: list[Callable[[], object]] = [
            *[self.kill_at_random] * (kills // 2),
            *[self.kill_while_writing] * (kills - kills // 2),
            *[self.terminate] * terms,
        ]
        self.random.shuffle(troubles)
        troubles += [self.cut_a_file, self.fill_the_disk]
        if self.processes > 1:
            troubles += [self.kill_one_rank, self.stop_one_rank]
        facts: dict[str, list[object]] = {}
        for trouble in troubles:
            began = time.monotonic()
            found = trouble()
            facts.setdefault(trouble.__name__, []).append(found)
            self.say(f"{trouble.__name__}: {found} ({time.monotonic() - began:.0f} s), at {self.steps_written()}")
            assert self.run.joinpath("model").exists() is False, "the run ended before its troubles: raise STEPS"
        for words in ("evaluation after training", f"evaluation of the merge {MERGES[-1]}"):
            self.kill_after(words)
            facts.setdefault("kill_after_the_last_step", []).append(words)
            self.say(f"killed in the {words}, at {self.steps_written()}")
        self.finish(self.run, "the rest")
        compared = [compare(whole / name, self.run / name) for name in ("model", *(f"fused/{name}" for name in MERGES))]
        same, differing = (sum(numbers) for numbers in zip(*compared, strict=True))
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        untouched = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        return {
            "processes": self.processes,
            "steps": STEPS,
            "events": {name: len(found) for name, found in facts.items()},
            "what_happened": {name: found for name, found in facts.items() if len(found) == 1},
            "weights_compared": same + differing,
            "weights_bit_identical": differing == 0 and same > 0,
            "every_step_once": [line["step"] for line in lines] == list(range(1, STEPS + 1)),
            "losses_identical": [line["loss"] for line in lines] == [line["loss"] for line in untouched],
        }

    def kill_at_random(self) -> str:
        """SIGKILL to all processes, at any moment from their start on."""
        with self.start() as process:
            wait = self.random.uniform(0, 25 if self.random.random() < 0.3 else 5)
            if wait <= 5:
                self.until(process, lambda: self.said_that("train:"))
            time.sleep(wait / 2)
            kill(process)
        return "killed"

    def kill_while_writing(self) -> str:
        """SIGKILL to all processes, up to 0.1 s after the writing of a checkpoint has begun."""
        with self.start() as process:
            writing = self.run / ".writing"
            for _ in range(self.random.randint(1, 4)):
                self.until(process, lambda: not writing.exists())
                self.until(process, writing.exists)
            time.sleep(self.random.uniform(0, 0.1))
            kill(process)
        return "killed"

    def kill_after(self, words: str) -> None:
        """SIGKILL to all processes once these words are said."""
        with self.start() as process:
            self.until(process, lambda: self.said_that(words), 300)
            kill(process)
        assert not (self.run / FINISHED).exists()

    def terminate(self) -> str:
        """SIGTERM to what the user started; the processes end by themselves, with a checkpoint."""
        with self.start() as process:
            self.until(process, lambda: self.said_that("train:"))
            time.sleep(self.random.uniform(0, 2))
            before = self.steps_written()
            began = time.monotonic()
            process.terminate()
            code = process.wait(60)
        assert "stopped by SIGTERM" in self.said.read_text(), self.said.read_text()
        assert self.processes > 1 or code == 143, code
        assert self.steps_written() >= before
        return f"exit {code} after {time.monotonic() - began:.1f} s"

    def cut_a_file(self) -> str:
        """A file of the newest checkpoint loses its end; the run goes on from the one before."""
        newest = checkpoints(self.run)[0]
        file = self.random.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with self.start() as process:
            self.until(process, lambda: self.said_that("resuming from"))
            kill(process)
        said = self.said.read_text()
        assert str(file) in said, said
        assert f"resuming from {checkpoints(self.run)[1]}" in said
        return f"{file.name} of {newest.name} cut, told and passed over"

    def fill_the_disk(self) -> str:
        """No room for the next checkpoint: one line, exit 2, and the checkpoints that were there."""
        filler = self.run.parent / "filler"
        with self.start(None if self.disk else limit_file_size) as process:
            self.until(process, lambda: self.said_that("train:"))
            if self.disk:
                fill(filler)
            code = process.wait(120)
        filler.unlink(missing_ok=True)
        errors = [line for line in self.said.read_text().splitlines() if line.startswith("error: writing")]
        assert 1 <= len(errors) <= self.processes, self.said.read_text()
        assert code != 0
        assert not (self.run / ".writing").exists()
        assert newest_whole(self.run)[0]
        return errors[0].partition("got ")[2]

    def kill_one_rank(self) -> str:
        """SIGKILL to one of the processes; the job ends by itself."""
        return self.without_one_rank(psutil.Process.kill)

    def stop_one_rank(self) -> str:
        """One of the processes stands still; the others wait for train.ddp_timeout, and the job ends by itself."""
        return f"ddp_timeout {SILENCE} s, {self.without_one_rank(psutil.Process.suspend)}"

    def without_one_rank(self, act: Callable[[psutil.Process], None]) -> str:
        with self.start() as process:
            self.until(process, lambda: self.said_that("train:"))
            time.sleep(1)
            began = time.monotonic()
            act(ranks(process)[-1])
            process.wait(SILENCE + 60)
        return f"job ended after {time.monotonic() - began:.1f} s: {self.said_of_ranks()}"

    @contextlib.contextmanager
    def start(self, before: Callable[[], None] | None = None, run: Path | None = None) -> Iterator[psutil.Popen]:
        """The run, from its newest checkpoint if it was begun; whatever is left of it is killed at the end."""
        run = run or self.run
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m"]
        command = [sys.executable, "-m", *(torchrun if self.processes > 1 else []), "codiemb", "train"]
        command += [str(self.folder / "config.yaml"), f"output_dir={run}"]
        command += ["train.dataloader_num_workers=1"] if self.processes > 1 else []
        command += ["--resume"] if (run / "config.yaml").exists() else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // self.processes), "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONUNBUFFERED"] = "1"
        environment["CODIEMB_CACHE"] = str(self.folder / "cache")
        with self.said.open("w") as said:
            process = psutil.Popen(
                command, stdout=said, stderr=said, env=environment, start_new_session=True, preexec_fn=before
            )
        try:
            yield process
        finally:
            kill(process)

    def finish(self, run: Path, what: str) -> None:
        """Lets a run come to its end."""
        began = time.monotonic()
        with self.start(run=run) as process:
            code = process.wait(600)
        assert code == 0, self.said.read_text()
        self.say(f"{what}: {time.monotonic() - began:.0f} s")

    def until(self, process: psutil.Popen, holds: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.002)

    def said_that(self, words: str) -> bool:
        return words in self.said.read_text()

    def said_of_ranks(self) -> str:
        errors = [line for line in self.said.read_text().splitlines() if line.startswith("error: rank")]
        assert errors, self.said.read_text()
        return errors[0]

    def steps_written(self) -> int:
        written = checkpoints(self.run)
        return int(written[0].name.removeprefix("checkpoint-")) if written else 0

    def say(self, what: str) -> None:
        print(f"{self.processes} process(es), {what}", file=sys.stderr, flush=True)


def ranks(process: psutil.Popen) -> list[psutil.Process]:
    return [child for child in process.children() if "codiemb" in child.cmdline()]


def kill(process: psutil.Popen) -> None:
    """SIGKILL to a process and all it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def compare(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors are the same to the last bit, and how many are not."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    same = sum(torch.equal(left[name], right[name]) for name in left)
    return same, len(left) - same


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs with room for some checkpoints, where it may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(filler: Path) -> None:
    """Takes all room but that of a small file."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 16))
            file.flush()


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def write_inputs(folder: Path) -> None:
    """A random BERT with dropout, retrieval and graded pairs, a suite, and the config."""
    random_ = random.Random(0)
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = folder / "parts"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(parts)
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 768}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(parts)
    modules = [Transformer(str(parts)), Pooling(sizes["hidden_size"], "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "base"), create_model_card=False)

    def text(length: int) -> str:
        return " ".join(random_.choices(WORDS, k=length))

    lists = [{"query": text(5), "positives": [text(20)], "negatives": [text(20)]} for _ in range(300)]
    pairs = [{"query": text(8), "positives": [text(8)], "positive_scores": [random_.random()]} for _ in range(300)]
    for name, rows in (("lists", lists), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"name": "lists", "task": "retrieval", "path": "lists.jsonl"},
        {"name": "pairs", "task": "similarity", "path": "pairs.jsonl"},
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump(sources))
    config = {
        "output_dir": "given on the command line",
        "model": {"base": str(folder / "base"), "dropout": {"hidden": 0.1, "attention": 0.1}},
        "data": sources,
        "batching": {"retrieval": {"batch_size": 24}, "similarity": {"batch_size": 24}},
        "train": {"max_steps": STEPS, "bf16": False, "save_steps": SAVED_EVERY, "save_total_limit": KEPT}
        | {"ddp_timeout": SILENCE, "logging_steps": 1},
        "evaluation": {"suite": "suite.yaml"},
        "fusion": {"method": list(MERGES)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    main()
