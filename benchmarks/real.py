"""The table of the README: the joint model of recipes/real.yaml beside its own single-task runs, on real data.

    python benchmarks/real.py runs/real-data --out runs/real-table

Every run sees the same sources of its task, the same batches and the same number of steps of each task; scores are on
test splits, in points of 0 to 100. Prints the table in Markdown, then one JSON line. Finished parts are kept, so that
the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

from machine import commit, machine

from codiemb.config import load_config
from codiemb.encoder.model import load_encoder, open_model
from codiemb.evaluation.suite import HEADLINE, evaluate_suite
from codiemb.suites.suite import load_suite
from codiemb.training.run import train
from codiemb.versions import versions

RECIPES = Path(__file__).parent.parent / "recipes"
RUNS = {"joint": ("retrieval", "similarity"), "retrieval only": ("retrieval",), "similarity only": ("similarity",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that scripts/prepare_real_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/real-table"))
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    suites = {name: load_suite(RECIPES / f"{name}.yaml", arguments.data) for name in ("real-suite", "real-ood-suite")}
    scores: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    steps = 0
    for run, tasks in RUNS.items():
        folder = arguments.out / run.replace(" ", "-")
        overrides = [f"data_root={arguments.data}", f"output_dir={folder}", "evaluation.suite=null"]
        config = load_config(RECIPES / "real.yaml", [*overrides, *arguments.overrides])
        if not scores:
            scores["base"] = evaluate(load_encoder(config.model), suites, arguments.out / "eval" / "base")
        config.data = [source for source in config.data if source.task in tasks]
        config.train.max_steps = steps or config.train.max_steps  # as many steps of its task as the joint run makes
        if not (folder / "model").is_dir():
            train(config, overwrite=True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds[run] = sum(line["seconds"] for line in lines)
        steps = steps or len(lines)
        scores[run] = evaluate(open_model(str(folder / "model")), suites, arguments.out / "eval" / folder.name)
    print(table(scores, suites))
    facts = {"benchmark": "real", "scores": scores, "train_seconds": seconds, "steps": steps, "seed": config.seed}
    print(json.dumps({**facts, **machine(), "versions": versions(), "commit": commit()}))


def evaluate(encoder, suites, out: Path) -> dict[str, float]:
    """Headline metric by data set. The large untrained collections are encoded in bf16, the others in float32."""
    found = {}
    for suite, bf16 in (("real-suite", False), ("real-ood-suite", True)):
        for source in suites[suite]:
            if not (out / f"{source.name}.json").is_file():
                evaluate_suite(encoder, [source], out, bf16=bf16)
            found[source.name] = json.loads((out / f"{source.name}.json").read_text())["metrics"][HEADLINE[source.task]]
    return found


def table(scores, suites) -> str:
    """Models in columns, data sets and means in rows."""

    def row(label: str, values: list[float]) -> str:
        return f"| {label} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"

    lines = ["| data set | " + " | ".join(scores) + " |", "|---|" + "---:|" * len(scores)]
    for name, suite in suites.items():
        where = "trained" if name == "real-suite" else "not trained"
        for task in ("retrieval", "similarity"):
            names = [source.name for source in suite if source.task == task]
            lines += [
                row(f"{data_set} ({HEADLINE[task]})", [s[data_set] for s in scores.values()]) for data_set in names
            ]
            if len(names) > 1:
                means = [sum(s[data_set] for data_set in names) / len(names) for s in scores.values()]
                lines.append(row(f"**mean {task}, {where}**", means))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
