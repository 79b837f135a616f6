"""Each loss of graded pairs alone, and the sum of CoDiEmb, in joint training with InfoNCE on real data.

    python benchmarks/ablation.py runs/real-data --out runs/ablation

Sources are nq-sample (retrieval) and stsb (similarity) in alternating single-task steps, so that gradient clipping and
Adam take the scale out of the losses; scores are on the test splits, in points of 0 to 100, mean and standard
deviation over the seeds. Prints one JSON line for each loss, then the table in Markdown. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from machine import commit, machine

from codiemb.config import load_config
from codiemb.encoder.model import load_encoder, open_model
from codiemb.evaluation.suite import HEADLINE, evaluate_suite
from codiemb.suites.suite import load_suite
from codiemb.tasks.task import PAIR_LOSSES
from codiemb.training.run import train

RECIPE = Path(__file__).parent.parent / "recipes" / "real.yaml"
SOURCES = ("nq-sample", "stsb")
SETTINGS = [
    "batching.schedule=balanced",
    "batching.retrieval={batch_size: 16, positives: 1, negatives: 2}",
    "batching.similarity.batch_size=64",
    "model.max_length={query: 64, document: 64, similarity: 64}",
    "train.max_steps=90",
    "evaluation.suite=null",
]
LOSSES: dict[str, dict[str, float]] = {
    "codiemb (sum)": {"pearson": 2, "rank_kl": 5, "pro": 0.5, "mid_nce": 1},
    **{name: {**dict.fromkeys(PAIR_LOSSES, 0), name: 1} for name in PAIR_LOSSES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that scripts/prepare_real_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    arguments = parser.parse_args()
    scores: dict[str, dict[str, list[float]]] = {"base": run(arguments, None, 0)}
    for seed in arguments.seeds:  # seed after seed, so that a run cut short has compared all losses
        for name in arguments.losses:
            for data_set, score in run(arguments, name, seed).items():
                scores.setdefault(name, {}).setdefault(data_set, []).extend(score)
    for name in arguments.losses:
        line = {"benchmark": "ablation", "loss": name, "seeds": arguments.seeds, "scores": scores[name]}
        print(json.dumps({**line, "commit": commit(), **machine()}))
    print(table(scores))


def run(arguments: argparse.Namespace, name: str | None, seed: int) -> dict[str, list[float]]:
    """Scores by data set of a model trained with a loss, or of the base."""
    folder = arguments.out / (f"{name}-{seed}".replace(" ", "-") if name else "base")
    kept = folder / "scores.json"
    if not kept.is_file():
        overrides = [f"data_root={arguments.data}", f"output_dir={folder}", f"seed={seed}", *SETTINGS]
        config = load_config(RECIPE, overrides + ([f"losses.similarity={json.dumps(LOSSES[name])}"] if name else []))
        config.data = [source for source in config.data if source.name in SOURCES]
        model = open_model(str(train(config, overwrite=True).model)) if name else load_encoder(config.model)
        suite = load_suite(RECIPE.with_name("real-suite.yaml"), arguments.data)
        suite = [source for source in suite if source.name in SOURCES]
        results = evaluate_suite(model, suite, folder / "eval", bf16=True)
        kept.write_text(json.dumps({source.name: [results[source.name][HEADLINE[source.task]]] for source in suite}))
    return json.loads(kept.read_text())


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Losses in rows, the best on stsb first."""
    lines = ["| similarity loss | nq-sample nDCG@10 | stsb Spearman |", "|---|---:|---:|"]
    for name, found in sorted(scores.items(), key=lambda item: -mean(item[1]["stsb"])):
        cells = [
            f"{100 * mean(found[data_set]):.2f}" + (f" ± {100 * stdev(found[data_set]):.2f}" if name != "base" else "")
            for data_set in SOURCES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
