"""What merging gains on real data: every method on the checkpoints of recipes/real.yaml, several seeds.

    python benchmarks/soups.py runs/real-data --out runs/soups [--seeds 42 43 44] [--collections nq-sample stackfaq]
        [--set train.num_train_epochs=2 ...]

runs/real-data is the folder that scripts/prepare_real_data.py made. Each seed trains once, on `--collections` and stsb,
with the recipe's settings but those of `--set`, and leaves some checkpoints. Then, by seed: the last checkpoint, the
mean of the weights over all steps (ema), merges of the checkpoints, the greedy soup chosen on dev, and for the
delta-guided merges a control: the uniform average made as long as theirs. Across seeds: merges of the last checkpoints,
and of all checkpoints by run. Each model is scored on the dev and test splits of what it was trained on, and on
collections that nothing was trained on. Finished parts are kept, so that the same command goes on where it was cut off.
Prints a table in Markdown, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import pyarrow.parquet as pq
import torch
from machine import commit, machine
from scipy.stats import spearmanr

from codiemb.config import Source, load_config
from codiemb.encoder.location import folder_of
from codiemb.encoder.model import open_model
from codiemb.evaluation.suite import HEADLINE, evaluate_suite
from codiemb.fusion.fuse import fuse
from codiemb.suites.suite import load_suite
from codiemb.training.run import train
from codiemb.versions import versions

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = "bundled:all-MiniLM-L6-v2"
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "delta, by tensor": {"granularity": "tensor"},
    "delta, by element": {"granularity": "element"},
    "delta, by row": {"granularity": "row"},
    "delta, by model": {"granularity": "model"},
    "delta, by tensor, inverse": {"granularity": "tensor", "weighting": "inverse"},
    "ties": {"method": "ties"},
    "dare": {"method": "dare", "parameters": {"weight": 0.25}},
    "sce": {"method": "sce"},
    "model stock": {"method": "model_stock"},
}
STSB = {"columns": {"query": "sentence1", "positive": "sentence2", "score": "score"}, "score_range": [0, 5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/soups"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--collections", nargs="+", default=["nq-sample", "stackfaq", "cranfield"])
    parser.add_argument("--untrained", nargs="+", default=["pubmedqa", "sts13", "sts15"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of the training")
    parser.add_argument("--train-only", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    soups = Soups(arguments)
    for seed in arguments.seeds:
        soups.train(seed)
    if not arguments.train_only:
        soups.score_all()
        print(soups.table())
        facts = {"benchmark": "soups", "seeds": arguments.seeds, "models": soups.scores, "lengths": soups.lengths}
        print(json.dumps({**facts, **machine(), "versions": versions(), "commit": commit()}))


class Soups:
    """Models by name, `<seed>/<method>`, and their scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out
        self.base = folder_of(BASE)
        self.scores: dict[str, dict[str, float]] = {}
        self.lengths: dict[str, float] = {}
        self.suite, self.dev = both_splits(arguments.data, arguments.collections, self.out / "data")
        self.dev_alone = dev_split(arguments.data.resolve(), arguments.collections)
        untrained = load_suite(RECIPES / "real-ood-suite.yaml", arguments.data)
        self.untrained = [source for source in untrained if source.name in arguments.untrained]

    def train(self, seed: int) -> None:
        run = self.out / f"seed-{seed}"
        if (run / "fused" / "ema").is_dir():
            return
        overrides = [f"data_root={self.arguments.data}", f"output_dir={run}", f"seed={seed}", "evaluation.suite=null"]
        overrides += ["train.save_strategy=steps", "train.save_steps=20", "fusion={method: ema, ema_decay: 0.95}"]
        config = load_config(RECIPES / "real.yaml", [*overrides, *self.arguments.set])
        config.data = [source for source in config.data if source.name in (*self.arguments.collections, "stsb")]
        train(config, overwrite=True)

    def score_all(self) -> None:
        self.score("base", lambda folder: self.base)
        for seed in self.arguments.seeds:
            run = self.out / f"seed-{seed}"
            checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
            self.score(f"{seed}/last", lambda folder, run=run: run / "model")
            self.score(f"{seed}/ema", lambda folder, run=run: run / "fused" / "ema")
            for method in self.arguments.methods:
                self.score_merge(f"{seed}/{method}", checkpoints, METHODS[method])
            self.greedy(seed, checkpoints)
            for method in ("delta, by tensor", "delta, by element"):
                self.score_control(f"{seed}/uniform as long as {method}", checkpoints, f"{seed}/{method}", seed)
        if len(self.arguments.seeds) > 1:
            runs = [self.out / f"seed-{seed}" for seed in self.arguments.seeds]
            last = [run / "model" for run in runs]
            every = [checkpoint for run in runs for checkpoint in sorted(run.glob("checkpoint-*"))]
            for method in ("uniform", "delta, by tensor"):
                self.score_merge(f"last of all seeds/{method}", last, METHODS[method])
            self.score_merge("all seeds/delta, by tensor, by run", every, {"by_run": True})

    def score_merge(self, name: str, checkpoints: list[Path], settings: dict[str, Any], dev_only: bool = False) -> None:
        self.score(name, lambda folder: fuse(checkpoints, self.base, folder, **settings).path, dev_only)

    def score_control(self, name: str, checkpoints: list[Path], other: str, seed: int) -> None:
        """The uniform average with its delta as long as that of another merge."""
        if other in self.lengths and f"{seed}/uniform" in self.lengths:
            scale = self.lengths[other] / self.lengths[f"{seed}/uniform"]
            self.score_merge(name, checkpoints, {"method": "uniform", "scale": scale})

    def greedy(self, seed: int, checkpoints: list[Path]) -> None:
        """From the best checkpoint on dev, each next one stays if dev rises."""
        for checkpoint in checkpoints[:-1]:
            self.score(f"{seed}/{checkpoint.name}", lambda folder, checkpoint=checkpoint: checkpoint, dev_only=True)
        names = {checkpoint: f"{seed}/{checkpoint.name}" for checkpoint in checkpoints[:-1]}
        names[checkpoints[-1]] = f"{seed}/last"
        ranked = sorted(checkpoints, key=lambda path: -self.scores[names[path]]["dev mean"])
        soup, best = [ranked[0]], self.scores[names[ranked[0]]]["dev mean"]
        for checkpoint in ranked[1:]:
            steps = "+".join(sorted(path.name.partition("-")[2] for path in [*soup, checkpoint]))
            self.score_merge(f"{seed}/soup of {steps}", [*soup, checkpoint], {"method": "uniform"}, dev_only=True)
            if self.scores[f"{seed}/soup of {steps}"]["dev mean"] > best:
                soup, best = [*soup, checkpoint], self.scores[f"{seed}/soup of {steps}"]["dev mean"]
        if len(soup) > 1:
            self.score_merge(f"{seed}/greedy", soup, {"method": "uniform"})
        else:
            self.score(f"{seed}/greedy", lambda folder: soup[0])

    def score(self, name: str, make: Callable[[Path], Path], dev_only: bool = False) -> None:
        """Makes a model, scores it, and removes it if it was made here."""
        kept = self.out / "scores" / f"{name.replace('/', ' ')}.json"
        content = json.loads(kept.read_text()) if kept.is_file() else {"scores": {}, "length": None}
        missing = [source for source in self.untrained if not dev_only and source.name not in content["scores"]]
        if missing or not content["scores"]:
            folder = self.out / "merged"
            shutil.rmtree(folder, ignore_errors=True)
            path = make(folder)
            facts = json.loads((path / "fusion.json").read_text()) if (path / "fusion.json").is_file() else {}
            encoder = open_model(str(path), dtype=torch.float32)
            if dev_only:
                found = evaluate_suite(encoder, self.dev_alone, None)
                values = [found[source.name][HEADLINE[source.task]] for source in self.dev_alone]
                scores = {"dev mean": (mean(values[:-1]) + values[-1]) / 2}
            else:
                scores = content["scores"] or self.dev_and_test(encoder)
                found = evaluate_suite(encoder, missing, self.out / "eval")
                scores |= {source.name: found[source.name][HEADLINE[source.task]] for source in missing}
            kept.parent.mkdir(exist_ok=True)
            content = {"scores": scores, "length": facts.get("delta_length")}
            kept.write_text(json.dumps(content))
        self.scores[name] = content["scores"]
        if content["length"]:
            self.lengths[name] = content["length"]
        told = {key: round(100 * value, 2) for key, value in content["scores"].items()}
        logging.info(f"{name}: {told}")

    def dev_and_test(self, encoder: Any) -> dict[str, float]:
        """Texts of both splits are encoded once."""
        out = self.out / "eval"
        evaluate_suite(encoder, self.suite, out)
        scores: dict[str, float] = {}
        for split in ("dev", "test"):
            retrieval = []
            for source in self.suite[:-1]:
                items = pq.read_table(out / f"{source.name}.items.parquet").to_pydict()
                values = [
                    value
                    for key, value in zip(items["query_id"], items["ndcg_at_10"], strict=True)
                    if (key in self.dev[source.name]) == (split == "dev")
                ]
                scores[f"{split} {source.name}"] = mean(values)
                retrieval.append(mean(values))
            pairs = pq.read_table(out / "stsb.items.parquet").to_pydict()
            place = slice(0, self.dev["stsb"]) if split == "dev" else slice(self.dev["stsb"], None)
            similarity = float(spearmanr(pairs["cosine"][place], pairs["label"][place]).statistic)
            scores |= {f"{split} retrieval": mean(retrieval), f"{split} stsb": similarity}
            scores[f"{split} mean"] = (mean(retrieval) + similarity) / 2
        return scores

    def table(self) -> str:
        """Mean over seeds and standard deviation, in points; and of the difference from uniform, paired by seed."""
        seeds = [str(seed) for seed in self.arguments.seeds]
        columns = ["test retrieval", "test stsb", "test mean", *(source.name for source in self.untrained)]
        lines = [
            "| model | " + " | ".join(columns) + " | test mean - uniform |",
            "|---|" + "---:|" * (len(columns) + 1),
        ]
        by_seed = [name.partition("/")[2] for name in self.scores if name.startswith(f"{seeds[0]}/")]
        for method in by_seed:
            found = [self.scores[f"{seed}/{method}"] for seed in seeds if f"{seed}/{method}" in self.scores]
            if len(found) == len(seeds) and all(column in scores for scores in found for column in columns):
                uniform = [self.scores[f"{seed}/uniform"]["test mean"] for seed in seeds]
                beyond = [scores["test mean"] - other for scores, other in zip(found, uniform, strict=True)]
                cells = [spread([scores[column] for scores in found]) for column in columns]
                lines.append(f"| {method} | " + " | ".join([*cells, spread(beyond)]) + " |")
        for name in [name for name in self.scores if name.partition("/")[0] not in seeds]:
            cells = [spread([self.scores[name][column]]) for column in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " | |")
        chosen = []
        for seed in seeds:
            candidates = [
                name for name in self.scores if name.startswith(f"{seed}/") and "test mean" in self.scores[name]
            ]
            chosen.append(max(candidates, key=lambda name: self.scores[name]["dev mean"]))
        told = [f"{name} (test {100 * self.scores[name]['test mean']:.2f})" for name in chosen]
        return "\n".join([*lines, "", f"best on dev: {', '.join(told)}"])


def spread(values: list[float]) -> str:
    points = [100 * value for value in values]
    return f"{mean(points):.2f}" + (f" ± {stdev(points):.2f}" if len(points) > 1 else "")


def dev_split(data: Path, collections: list[str]) -> list[Source]:
    """The data sets to choose on, stsb last."""
    found = [Source(name=one, task="retrieval", path=str(data / "ir" / one), split="dev") for one in collections]
    pairs = str(data / "sts" / "stsb" / "dev.jsonl")
    return [*found, Source(name="stsb", task="similarity", path=pairs, **STSB)]


def both_splits(data: Path, collections: list[str], out: Path) -> tuple[list[Source], dict[str, Any]]:
    """Data sets of dev and test together; by collection the ids of dev queries, of stsb the number of dev pairs."""
    data, suite, dev = data.resolve(), [], {}
    for name in collections:
        folder = out / name
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for file in ("corpus.jsonl", "queries.jsonl"):
            if not (folder / file).exists():
                (folder / file).symlink_to(data / "ir" / name / file)
        head, *of_dev = (data / "ir" / name / "qrels" / "dev.tsv").read_text().splitlines()
        of_test = (data / "ir" / name / "qrels" / "test.tsv").read_text().splitlines()[1:]
        (folder / "qrels" / "both.tsv").write_text("\n".join([head, *of_dev, *of_test]) + "\n")
        dev[name] = {line.split("\t")[0] for line in of_dev}
        suite.append(Source(name=name, task="retrieval", path=str(folder.resolve()), split="both"))
    of_dev, of_test = ((data / "sts" / "stsb" / f"{split}.jsonl").read_text() for split in ("dev", "test"))
    (out / "stsb.jsonl").write_text(of_dev + of_test)
    dev["stsb"] = len(of_dev.splitlines())
    suite.append(Source(name="stsb", task="similarity", path=str((out / "stsb.jsonl").resolve()), **STSB))
    return suite, dev


if __name__ == "__main__":
    main()
