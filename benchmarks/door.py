"""Two processes, retrieval with candidates from both, and similarity: sentence-transformers, with our parts, and ours.

    python benchmarks/door.py [--limit 180]

All runs have the same data and a tiny random BERT on the processor. sentence-transformers alone stands still, under
either of its samplers, as soon as the two processes are in different data sets; it is ended after `--limit` seconds.
`SameDatasetBatchSampler` and our losses in its trainer finish, and so does `codiemb train`. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import string
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from codiemb.integrations.sentence_transformers import CoDiEmbSimilarity, InfoNCE, SameDatasetBatchSampler
from codiemb.versions import versions

VARIANTS = ("proportional", "round_robin", "codiemb")
HERE = Path(__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=180, help="seconds for each run")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train(arguments.worker)
        return
    results = {variant: run([str(HERE), "--worker", variant], arguments.limit) for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        results["codiemb train"] = run(["-m", "codiemb", "train", str(config)], arguments.limit)
        results["codiemb train"]["steps"] = len((config.parent / "run" / "metrics.jsonl").read_text().splitlines())
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE.parent
    ).stdout.strip()
    facts = {"benchmark": "door", "processes": 2, "limit_seconds": arguments.limit, "runs": results}
    print(json.dumps({**facts, **machine, "versions": versions(), "commit": commit}))


def run(script: list[str], limit: float) -> dict[str, object]:
    """How two processes of a script ended, whether both of our trainers began, their steps, and the seconds taken."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            process.terminate()  # torchrun then ends its processes
            process.wait()
        output.seek(0)
        said = output.read()
    if code:
        print(said[-3000:], file=sys.stderr)
    return {
        "ended": {0: "finished", None: "hung"}.get(code, f"failed with {code}"),
        "started": "[0] starts" in said and "[1] starts" in said,
        "steps_of_first_process": said.count("[0] step "),
        "seconds": round(time.perf_counter() - started, 1),
    }


def train(variant: str) -> None:
    """One process of a run."""
    ours = variant == "codiemb"
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder)
        if ours:
            loss = {"search": InfoNCE(model), "pairs": CoDiEmbSimilarity(model)}
        else:
            loss = {
                "search": MultipleNegativesRankingLoss(model, gather_across_devices=True),
                "pairs": CoSENTLoss(model),
            }
        sampler = partial(SameDatasetBatchSampler, batch_sizes={"search": 16, "pairs": 8}) if ours else variant
        trainer = Announcing(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                multi_dataset_batch_sampler=sampler,
                per_device_train_batch_size=8,
                num_train_epochs=1,
                use_cpu=True,
                ddp_backend="gloo",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=data(),
            loss=loss,
        )
        print(f"[{trainer.args.process_index}] starts", flush=True)
        trainer.train()


class Announcing(SentenceTransformerTrainer):
    """Says when a step is done."""

    def training_step(self, *arguments: object, **more: object) -> torch.Tensor:
        loss = super().training_step(*arguments, **more)
        print(f"[{self.args.process_index}] step {self.state.global_step}", flush=True)
        return loss


def data() -> dict[str, Dataset]:
    """96 queries with their documents, 64 graded pairs, all of letters."""

    def text(number: int) -> str:
        return " ".join(string.ascii_lowercase[(number * step) % 26] for step in (1, 3, 5, 7, 11))

    search = {"query": [text(n) for n in range(96)], "positive": [text(n + 100) for n in range(96)]}
    pairs = {
        "sentence1": [text(n) for n in range(64)],
        "sentence2": [text(2 * n) for n in range(64)],
        "score": [n % 5 / 4 for n in range(64)],
    }
    return {"search": Dataset.from_dict(search), "pairs": Dataset.from_dict(pairs)}


def write_config(folder: Path) -> Path:
    """The same data, batches and model for `codiemb train`."""
    rows = data()
    lists = [{"query": row["query"], "positives": [row["positive"]]} for row in rows["search"]]
    pairs = [
        {"query": row["sentence1"], "positives": [row["sentence2"]], "positive_scores": [row["score"]]}
        for row in rows["pairs"]
    ]
    for name, records in (("search", lists), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_model(str(folder / "parts")).save(str(folder / "base"), create_model_card=False)
    config = {
        "output_dir": str(folder / "run"),
        "model": {"base": "base"},
        "data": [
            {"name": "search", "task": "retrieval", "path": "search.jsonl"},
            {"name": "pairs", "task": "similarity", "path": "pairs.jsonl"},
        ],
        "batching": {"retrieval": {"batch_size": 16}, "similarity": {"batch_size": 8}},
        "train": {"save_strategy": "no"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def tiny_model(folder: str) -> SentenceTransformer:
    """A random BERT of two layers and width 16; one token a letter."""
    special = ["[PAD]", "[UNK]"]
    tokenizer = Tokenizer(
        WordLevel({token: number for number, token in enumerate([*special, *string.ascii_lowercase])}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    fast.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(folder), Pooling(16, "mean")], device="cpu")


if __name__ == "__main__":
    main()
