"""Our scores beside those of mteb on the same data: retrieval and similarity of one model, each side by itself.

    python benchmarks/mteb_agreement.py DATA_ROOT [--collections ir/cranfield ir/stackfaq] [--pairs sts/stsb]

mteb reads the collection as a task of its own making and encodes it with its own wrapper of the SentenceTransformer;
ours is `codiemb.evaluate`. Prints one JSON line a data set, in points of 0 to 100, and ends with an error where the
main scores differ by 0.01 or more. Needs the extra `mteb`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from machine import commit, machine

MODEL = "bundled:all-MiniLM-L6-v2"
LARGEST = 0.01  # points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_ROOT")
    parser.add_argument("--collections", nargs="*", default=["ir/cranfield", "ir/stackfaq"])
    parser.add_argument("--pairs", nargs="*", default=["sts/stsb"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CODIEMB_CACHE"] = folder
        lines = [compare(arguments.data / name, "retrieval") for name in arguments.collections]
        lines += [compare(arguments.data / name, "similarity") for name in arguments.pairs]
    if any(abs(line["difference"]) >= LARGEST for line in lines):
        raise SystemExit("the scores differ")


def compare(path: Path, task: str) -> dict[str, Any]:
    from importlib.metadata import version

    from codiemb.versions import versions

    theirs = run_mteb(path, task)
    ours = run_ours(path, task)
    line = {
        "benchmark": "mteb_agreement",
        "data_set": path.name,
        "task": task,
        "model": MODEL,
        "ours": ours,
        "mteb": theirs,
        "difference": round(next(iter(ours.values())) - next(iter(theirs.values())), 5),
        "machine": machine(),
        "versions": {**versions(), "mteb": version("mteb")},
        "commit": commit(),
    }
    print(json.dumps(line), flush=True)
    return line


def run_ours(path: Path, task: str) -> dict[str, float]:
    from codiemb import evaluate
    from codiemb.suites.suite import DataSet

    more: dict[str, Any] = {"path": str(path), "split": "test"}
    if task == "similarity":
        more["columns"] = {"query": "sentence1", "positive": "sentence2", "score": "score"}
        more["score_range"] = (0, 5)
    found = evaluate(MODEL, [DataSet(name=path.name, task=task, **more)])[path.name]
    return {metric: round(100 * value, 5) for metric, value in found.items()}


def run_mteb(path: Path, task: str) -> dict[str, float]:
    import mteb
    from sentence_transformers import SentenceTransformer

    from codiemb.encoder.location import locate

    made = retrieval_task(path) if task == "retrieval" else similarity_task(path)
    result = mteb.evaluate(SentenceTransformer(locate(MODEL)), made, cache=None, co2_tracker=False)
    scores = result.task_results[0].scores["test"][0]
    names = ("ndcg_at_10", "mrr_at_10", "map_at_1000", "recall_at_100")
    return {
        name: round(100 * scores[name], 5)
        for name in (names if task == "retrieval" else ("cosine_spearman", "cosine_pearson"))
    }


def retrieval_task(path: Path) -> Any:
    """The BEIR folder as a task of mteb."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval

    class Collection(AbsTaskRetrieval):
        metadata = describe(path.name, "Retrieval", "ndcg_at_10")

        def load_data(self, *_: Any, **__: Any) -> None:
            qrels: dict[str, dict[str, int]] = {}
            for line in (path / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
                query, document, gain = line.split("\t")
                qrels.setdefault(query, {})[document] = int(gain)
            corpus = [
                {"id": row["_id"], "title": row.get("title", ""), "text": row["text"]} for row in rows(path, "corpus")
            ]
            queries = [{"id": row["_id"], "text": row["text"]} for row in rows(path, "queries") if row["_id"] in qrels]
            part = {"queries": Dataset.from_list(queries), "corpus": Dataset.from_list(corpus)}
            self.dataset = {"default": {"test": {**part, "relevant_docs": qrels, "top_ranked": None}}}
            self.data_loaded = True

    return Collection()


def similarity_task(path: Path) -> Any:
    """The file of pairs as a task of mteb."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS

    class Pairs(AbsTaskSTS):
        metadata = describe(path.name, "STS", "cosine_spearman")

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = DatasetDict({"test": Dataset.from_list(rows(path, "test"))})
            self.data_loaded = True

    return Pairs()


def describe(name: str, kind: str, score: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=f"Local-{name}",
        type=kind,
        main_score=score,
        description="local data",
        dataset={"path": f"local/{name}", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        modalities=["text"],
        category="t2t",
    )


def rows(path: Path, stem: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
