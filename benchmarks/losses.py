"""Seconds and memory of the losses, forward and backward, beside another form of the same loss.

    python benchmarks/losses.py [case ...]        without names, all but info-nce-large, which takes long

Each case prints one JSON line, progress goes to stderr. The sides of a case run in turn (a, b, a, b, ...) in one
process; seconds are of one call, median and range over the turns, and a ratio is taken within each turn. Before they
are timed, the sides must agree on the loss and its gradient.

- pro-*: `pro` beside the form of the reference, a Python loop over the pairs with masks over all of them.
- cosent-*: `cosent` beside that of sentence-transformers, both from the cosines.
- info-nce*: `info_nce` with all logits at once (dense) and in tiles, every query with one positive.

Memory is the growth of the process's peak (`ru_maxrss`) over a baseline in which the inputs and one gradient for each
of them are allocated and written to; those gradients are given back before the loss makes its own. So inputs and
gradients do not count, and all the rest does: logits, masks, copies, the libraries' workspaces. Where a loss frees
something before its gradients exist, only what that exceeds them by can be seen; this holds for every side alike. Each
side is measured in a process of its own, because a peak never falls, and the first process imports no torch, because
a process starts with the peak of its parent. The loss runs once on a tiny input before the baseline, so that the
libraries are loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from machine import commit, machine

from codiemb.versions import versions

SEED = 7
TEMPERATURE = 0.05
DIMENSIONS = 768
GRADES = 26
CHUNKS = (1024, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    chosen = parser.parse_args().cases or [case for case in CASES if case != "info-nce-large"]
    if unknown := set(chosen) - set(CASES):
        parser.error(f"case: got {', '.join(sorted(unknown))}, expected some of {', '.join(CASES)}")
    for case in chosen:
        print(f"{case} ...", file=sys.stderr)
        before = machine()
        result = CASES[case]()
        facts = {"machine": before, "versions": versions(), "commit": commit()}
        print(json.dumps({"benchmark": "losses", "case": case, **result, **facts}), flush=True)


def pro_case(pairs: int, continuous: bool, loop: bool = True) -> dict[str, Any]:
    """`pro` on random cosines and labels, and the loop over the pairs."""
    from codiemb.losses import pro

    predicted, target = graded_pairs(pairs, continuous)
    sides = {"ours": partial(pro, predicted, target, temperature=TEMPERATURE)}
    if loop:
        sides["loop"] = partial(pro_loop, predicted, target)
    return {"pairs": pairs, "labels": len(target.unique()), **in_turn(sides, [predicted])}


def pro_loop(predicted: Any, target: Any) -> Any:
    """PRO in the reference's form: each pair against those with a lower label, found by a mask over all pairs."""
    import torch

    terms = []
    for k in range(len(predicted)):
        below = target < target[k]
        if not below.any():
            continue
        distance = target[k] - target[below]
        own = distance.max() * predicted[k] / TEMPERATURE
        others = distance * predicted[below] / TEMPERATURE
        terms.append(torch.cat([own[None], others]).logsumexp(dim=0) - own)
    return torch.stack(terms).mean()


def cosent_case(pairs: int) -> dict[str, Any]:
    """`cosent` and sentence-transformers' CoSENTLoss, which is given the cosines in place of embeddings."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    from codiemb.losses import cosent

    predicted, target = graded_pairs(pairs, continuous=False)
    theirs = CoSENTLoss(None, scale=1 / TEMPERATURE, similarity_fct=lambda cosines, _: cosines)
    sides = {
        "ours": partial(cosent, predicted, target, temperature=TEMPERATURE),
        "sentence_transformers": partial(theirs.compute_loss_from_embeddings, [predicted, predicted], target),
    }
    return {"pairs": pairs, "labels": len(target.unique()), **in_turn(sides, [predicted])}


def graded_pairs(pairs: int, continuous: bool) -> tuple[Any, Any]:
    """Random cosines, which want a gradient, and random labels: 26 grades from 0 to 1, or any number."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    predicted = (torch.rand(pairs, generator=random) * 1.6 - 0.8).requires_grad_()
    if continuous:
        return predicted, torch.rand(pairs, generator=random)
    return predicted, torch.randint(GRADES, (pairs,), generator=random) / (GRADES - 1)


def info_nce_case(queries: int, documents: int) -> dict[str, Any]:
    """Dense and tiled: seconds in turn in one process, memory in one process each."""
    sides = {"dense": None, **{f"tiled {chunk}": chunk for chunk in CHUNKS}}
    times = apart(info_nce_seconds, queries, documents, sides)
    memory = {name: apart(info_nce_memory, queries, documents, chunk)["extra_bytes"] for name, chunk in sides.items()}
    return {"queries": queries, "documents": documents, "dimensions": DIMENSIONS, **times, "extra_bytes": memory}


def info_nce_large_case(queries: int, documents: int, chunk: int) -> dict[str, Any]:
    """Tiled alone, once."""
    measured = apart(info_nce_memory, queries, documents, chunk)
    return {"queries": queries, "documents": documents, "dimensions": DIMENSIONS, "chunk": chunk, **measured}


def info_nce_seconds(queries: int, documents: int, chunks: dict[str, int | None]) -> dict[str, Any]:
    from codiemb.losses import info_nce

    embeddings, listed = retrieval_batch(queries, documents)
    return in_turn(
        {name: partial(info_nce, *embeddings, **listed, chunk_size=chunk) for name, chunk in chunks.items()},
        embeddings,
        turns=3,
    )


def info_nce_memory(queries: int, documents: int, chunk: int | None) -> dict[str, Any]:
    import torch

    from codiemb.losses import info_nce

    tiny, listed = retrieval_batch(8, 64)
    info_nce(*tiny, **listed, chunk_size=chunk and 16).backward()
    embeddings, listed = retrieval_batch(queries, documents)
    gradients = [torch.empty_like(side).fill_(1) for side in embeddings]  # written to, so the memory is there
    baseline = peak_bytes()
    del gradients
    started = time.perf_counter()
    info_nce(*embeddings, **listed, chunk_size=chunk).backward()
    seconds = time.perf_counter() - started
    return {"seconds": rounded(seconds), "baseline_bytes": baseline, "extra_bytes": peak_bytes() - baseline}


def retrieval_batch(queries: int, documents: int) -> tuple[list[Any], dict[str, Any]]:
    """Random unit vectors, made in place so that nothing larger was ever there, and who listed which document."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    embeddings = []
    for rows in (queries, documents):
        vectors = torch.empty(rows, DIMENSIONS).normal_(generator=random)
        embeddings.append(vectors.div_(vectors.norm(dim=1, keepdim=True)).requires_grad_())
    document = torch.arange(documents)  # the first ones are the positives of the queries in order
    return embeddings, {"owner": document % queries, "positive": document < queries, "document_ids": document}


def in_turn(sides: dict[str, Callable[[], Any]], inputs: list[Any], turns: int = 15) -> dict[str, Any]:
    """Seconds of one call of each side, forward and backward, and the ratio of each further side to the first."""
    import torch

    def run(loss: Callable[[], Any]) -> list[Any]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    def time_calls(loss: Callable[[], Any], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run(loss)
        return time.perf_counter() - started

    calls = dict.fromkeys(sides, 1)
    differences = {}
    expected: list[Any] = []
    for name, loss in sides.items():
        found = run(loss)
        expected = expected or found
        differences[name] = max(relative_difference(a, b) for a, b in zip(found, expected, strict=True))
        if not differences[name] < 1e-3:
            raise SystemExit(f"{name}: loss or gradient differs by {differences[name]}, expected less than 1e-3")
        del found
        while time_calls(loss, calls[name]) < 0.02:  # what is short is called several times in each turn
            calls[name] *= 2
    del expected

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, loss in sides.items():
            seconds[name].append(time_calls(loss, calls[name]) / calls[name])
    first, *others = sides
    ratios = {name: [b / a for a, b in zip(seconds[first], seconds[name], strict=True)] for name in others}
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        **({f"ratio_to_{first}": {name: spread(values) for name, values in ratios.items()}} if ratios else {}),
        **({"relative_difference": {name: rounded(differences[name]) for name in others}} if others else {}),
        "turns": turns,
        "calls_per_turn": calls,
        "threads": torch.get_num_threads(),
    }


def relative_difference(found: Any, expected: Any) -> float:
    """The largest difference of two tensors beside the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: rounded(value) for name, value in found.items()}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the function returns in a fresh process."""
    print(f"  {function.__name__} {arguments}", file=sys.stderr)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "pro-graded-4096": partial(apart, pro_case, 4096, False),
    "pro-continuous-4096": partial(apart, pro_case, 4096, True),
    "pro-graded-65536": partial(apart, pro_case, 65_536, False, False),
    "cosent-64": partial(apart, cosent_case, 64),
    "cosent-4096": partial(apart, cosent_case, 4096),
    "cosent-65536": partial(apart, cosent_case, 65_536),
    "info-nce": partial(info_nce_case, 1024, 65_536),
    "info-nce-large": partial(info_nce_large_case, 4096, 262_144, 4096),
}

if __name__ == "__main__":
    main()
