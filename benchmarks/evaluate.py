"""What an evaluation costs beside the bare encoding of its texts, and how much memory it takes.

    python benchmarks/evaluate.py BEIR_FOLDER [--split test] [--model MODEL] [--documents N] [--random]

One run: reading, encoding, exact search, metrics and the written files are timed as a whole, and the calls of the
encoder in it apart. `--documents` keeps so many documents (the judged ones first) and the queries that they answer.
`--random` puts random embeddings in the place of the model's: what is left of the time is what an evaluation costs
beside encoding, which does not depend on their values. Prints one JSON line. Results are not taken from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import commit, machine

from codiemb.encoder.allocator import keep_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="BEIR_FOLDER")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="bundled:all-MiniLM-L6-v2")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CODIEMB_CACHE"] = folder
        data = arguments.folder
        if arguments.documents is not None:
            data = cut(arguments.folder, arguments.split, arguments.documents, Path(folder) / arguments.folder.name)
        found = measure(data, arguments.split, arguments.model, arguments.random, Path(folder) / "out")
        print(json.dumps(found), flush=True)


def measure(data: Path, split: str, model: str, random: bool, out: Path) -> dict[str, Any]:
    import torch

    from codiemb.encoder import engine
    from codiemb.encoder.location import locate
    from codiemb.encoder.model import open_model
    from codiemb.evaluation import retrieval
    from codiemb.evaluation.suite import evaluate_suite
    from codiemb.suites.suite import DataSet
    from codiemb.training.metrics import peak_memory_bytes
    from codiemb.versions import versions

    encoding = 0.0
    encode = random_embeddings if random else engine.encode

    def timed(*arguments: Any, **settings: Any) -> Any:
        nonlocal encoding
        started = time.perf_counter()
        found = encode(*arguments, **settings)
        encoding += time.perf_counter() - started
        return found

    before = machine()
    encoder = open_model(locate(model), dtype=torch.float32)
    source = DataSet(name=data.name, task="retrieval", path=str(data), split=split)
    engine.encode = timed
    started = time.perf_counter()
    found = evaluate_suite(encoder, [source], out)
    seconds = time.perf_counter() - started
    result = json.loads((out / f"{data.name}.json").read_text(encoding="utf-8"))
    return {
        "benchmark": "evaluate",
        "collection": data.name,
        "model": "random embeddings" if random else model,
        "queries": result["n"],
        "documents": result["documents"],
        "retrieved": min(retrieval.RETRIEVED, result["documents"]),
        "seconds": round(seconds, 2),
        "encoding_seconds": round(encoding, 2),
        "beside_encoding_seconds": round(seconds - encoding, 2),
        "evaluation / encoding": None if random else round(seconds / encoding, 4),
        "peak_gb": round(peak_memory_bytes() / 1e9, 3),
        "ndcg_at_10": round(found[data.name]["ndcg_at_10"], 5),
        "machine": before,
        "versions": versions(),
        "commit": commit(),
    }


def random_embeddings(encoder: Any, texts: Any, **_: Any) -> Any:
    import torch

    drawn = torch.randn(len(texts), encoder.get_embedding_dimension(), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1)


def cut(folder: Path, split: str, documents: int, to: Path) -> Path:
    """A BEIR folder of fewer documents."""
    lines = (folder / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    judged = {line.split("\t")[1] for line in lines[1:]}
    corpus = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.sort(key=lambda line: json.loads(line)["_id"] not in judged)  # stable: the rest in its own order
    kept = corpus[:documents]
    ids = {json.loads(line)["_id"] for line in kept}
    (to / "qrels").mkdir(parents=True)
    (to / "corpus.jsonl").write_text("".join(kept), encoding="utf-8")
    (to / "queries.jsonl").write_bytes((folder / "queries.jsonl").read_bytes())
    answered = [line for line in lines[1:] if line.split("\t")[1] in ids]
    (to / "qrels" / f"{split}.tsv").write_text("".join([lines[0], *answered]), encoding="utf-8")
    return to


if __name__ == "__main__":
    main()
