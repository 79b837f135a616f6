"""Encoding a corpus with codiemb beside `SentenceTransformer.encode`, in turn: texts a second, nDCG@10, peak memory.

    python benchmarks/encode.py DATA_ROOT [--dtype fp32 bf16] [--repeats 3] [--collection ir/nq-sample]

Every run is a process of its own, and encodes the whole corpus and the test queries with the bundled model at the
length it is used with (256 tokens). The sides:

    ours        `codiemb.encoder.engine.encode`; bf16 is autocast
    theirs-32   `encode` with its default of 32 texts at once; bf16 is `model_kwargs={"dtype": "bfloat16"}`
    theirs-8, theirs-128   the same with other batch sizes

Prints one JSON line a number type: medians over the turns, and the ratio of ours to the fastest of theirs in each
turn. On two cores a turn takes about 4 minutes in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import commit, machine
from train import spread

from codiemb.versions import versions

SIDES = ("ours", "theirs-32", "theirs-8", "theirs-128")
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_ROOT")
    parser.add_argument("--collection", default="ir/nq-sample")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--texts", type=int, help="of the corpus, at most; nDCG@10 is then left out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        Path(task["result"]).write_text(json.dumps(work(task)), encoding="utf-8")
        return
    for dtype in arguments.dtype:
        print(json.dumps(compare(dtype, arguments)), flush=True)


def compare(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    before = machine()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for turn in range(arguments.repeats):
        for side in arguments.sides:
            runs[side].append(run(side, dtype, arguments))
            print(f"{dtype}, turn {turn + 1}, {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    theirs = [side for side in runs if side != "ours"]
    ratios = [
        min(runs[side][turn]["seconds"] for side in theirs) / runs["ours"][turn]["seconds"]
        for turn in range(arguments.repeats)
        if "ours" in runs and theirs
    ]
    return {
        "benchmark": "encode",
        "collection": arguments.collection,
        "dtype": dtype,
        "repeats": arguments.repeats,
        "sides": {
            side: {
                "seconds": spread([turn["seconds"] for turn in turns]),
                "texts_per_second": round(turns[0]["texts"] / median(turn["seconds"] for turn in turns), 1),
                "peak_gb": spread([turn["peak_gb"] for turn in turns]),
                "ndcg_at_10": turns[0]["ndcg_at_10"],
            }
            for side, turns in runs.items()
        },
        "ours / fastest of theirs": spread(ratios) if ratios else None,
        "machine": before,
        "versions": versions(),
        "commit": commit(),
    }


def run(side: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures."""
    with tempfile.TemporaryDirectory() as folder:
        task = {"side": side, "dtype": dtype, "texts": arguments.texts, "result": f"{folder}/result.json"}
        task["path"] = str(arguments.data / arguments.collection)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if side == "ours":
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it
        command = [sys.executable, __file__, ".", "--worker", json.dumps(task)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(ended.stderr[-3000:])
        return json.loads(Path(task["result"]).read_text(encoding="utf-8"))


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Encodes the corpus, timed, then the queries, and scores."""
    from codiemb.encoder.allocator import keep_memory

    if task["side"] == "ours":
        keep_memory()
    import torch

    from codiemb.config import Source
    from codiemb.evaluation import retrieval
    from codiemb.training.metrics import peak_memory_bytes

    source = Source(name="corpus", task="retrieval", path=task["path"], split="test")
    collection = retrieval.load_collection(source)
    documents = list(collection.documents.values())[: task["texts"]]
    encode = ours(task) if task["side"] == "ours" else theirs(task)
    encode(documents[:64])
    started = time.perf_counter()
    found = encode(documents)
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "texts": len(documents), "peak_gb": peak_memory_bytes() / 1e9, "ndcg_at_10": None}
    if task["texts"] is None:
        keys = list(collection.documents)
        queries = encode(list(collection.queries.values()))
        scores, places = retrieval.search(queries, found, torch.arange(len(keys)), retrieval.RETRIEVED)
        run = {
            key: {keys[place]: float(score) for place, score in zip(places[row], scores[row], strict=True)}
            for row, key in enumerate(collection.queries)
        }
        by_query = retrieval.score(run, collection.qrels)
        measured["ndcg_at_10"] = round(sum(values["ndcg_at_10"] for values in by_query.values()) / len(by_query), 5)
    return measured


def ours(task: dict[str, Any]) -> Any:
    from codiemb.config import ModelSection
    from codiemb.encoder.engine import Text, encode
    from codiemb.encoder.model import load_encoder

    encoder = load_encoder(ModelSection(base="bundled:all-MiniLM-L6-v2"))
    bf16 = task["dtype"] == "bf16"
    return lambda texts: encode(encoder, [Text(text, "", LENGTH) for text in texts], bf16=bf16).float()


def theirs(task: dict[str, Any]) -> Any:
    from sentence_transformers import SentenceTransformer

    from codiemb.encoder.location import locate

    kwargs = {"dtype": "bfloat16"} if task["dtype"] == "bf16" else {}
    model = SentenceTransformer(locate("bundled:all-MiniLM-L6-v2"), model_kwargs=kwargs)
    model.max_seq_length = LENGTH
    size = int(task["side"].removeprefix("theirs-"))

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, batch_size=size, normalize_embeddings=True, convert_to_tensor=True).float()

    return encode


if __name__ == "__main__":
    main()
