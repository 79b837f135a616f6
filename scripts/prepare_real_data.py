"""Makes the data folder of recipes/real.yaml: training records with hard negatives mined once.

    python scripts/prepare_real_data.py DATA_ROOT --out runs/real-data

DATA_ROOT holds ir/<name> (BEIR folders) and sts/<name>. OUT gets links to both, and train/<name>.jsonl: for each
training query its positives and the hard negatives that sentence-transformers' `mine_hard_negatives` finds with the
untuned base. Documents scored above 95 % of the query's positive are taken for unjudged relevant ones and left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
from sentence_transformers.util import mine_hard_negatives

from codiemb.config import Source
from codiemb.data.beir import read_corpus
from codiemb.data.readers import beir_files
from codiemb.data.store import load_records
from codiemb.encoder.model import locate, open_model

COLLECTIONS = ("nq-sample", "stackfaq", "checkthat2020", "climate-fever", "cranfield")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="bundled:all-MiniLM-L6-v2")
    parser.add_argument("--negatives", type=int, default=5, help="mined for each query")
    parser.add_argument("--collections", nargs="+", choices=COLLECTIONS, default=COLLECTIONS)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args()
    encoder = open_model(locate(arguments.base))
    encoder.max_seq_length = arguments.max_length
    for folder in ("ir", "sts"):
        link = arguments.out / folder
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((arguments.data_root / folder).resolve(), target_is_directory=True)
    for name in arguments.collections:
        target = arguments.out / "train" / f"{name}.jsonl"
        target.parent.mkdir(exist_ok=True)
        source = Source(
            name=name, task="retrieval", path=str(arguments.data_root.resolve() / "ir" / name), split="train"
        )
        records = load_records(source)
        corpus = [text for _, text in read_corpus(beir_files(Path(source.path))[0])]
        pairs = datasets.Dataset.from_list(
            [{"query": row["query"], "positive": positive} for row in records.table for positive in row["positives"]]
        )
        mined = mine_hard_negatives(
            pairs,
            encoder,
            corpus=corpus,
            num_negatives=arguments.negatives,
            range_max=100,
            relative_margin=0.05,
            sampling_strategy="top",
            output_format="labeled-list",
            include_positives=False,
            verbose=False,
        )
        negatives: dict[str, list[str]] = {}
        for row in mined:
            for text, label in zip(row["positive"], row["labels"], strict=True):
                if not label and text not in negatives.setdefault(row["query"], []):
                    negatives[row["query"]].append(text)
        with target.open("w", encoding="utf-8") as file:
            for row in records.table:
                found = [text for text in negatives.get(row["query"], []) if text not in row["positives"]]
                content = {
                    "id": row["id"],
                    "query": row["query"],
                    "positives": row["positives"],
                    "negatives": found[: arguments.negatives],
                }
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
        print(f"{target}: {len(records)} queries, {sum(map(len, negatives.values()))} negatives")


if __name__ == "__main__":
    main()
