"""Writes golden.json: `python tests/losses/make_golden.py`.

Small random inputs with the values and gradients of the losses, from the definitions in loops, in NumPy and float64;
the gradients are central differences. Nothing of codiemb or torch is used.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

STEP = 1e-6


def pearson(c, y, t):
    c, y = c - c.mean(), y - y.mean()
    return 1 - (c * y).sum() / np.sqrt((c * c).sum() * (y * y).sum())


def rank_kl(c, y, t):
    n = len(c)
    rank = np.array([(y > label).sum() + ((y == label).sum() - 1) / 2 for label in y])
    p, q = np.exp((n - 1 - rank) / (n - 1) / t), np.exp(c / t)
    p, q = p / p.sum(), q / q.sum()
    return (p * np.log(p / q)).sum() / n


def pro(c, y, t):
    terms = []
    for k in range(len(c)):
        below = [j for j in range(len(c)) if y[j] < y[k]]
        if below:
            own = np.exp(max(y[k] - y[j] for j in below) * c[k] / t)
            terms.append(-np.log(own / (own + sum(np.exp((y[k] - y[j]) * c[j] / t) for j in below))))
    return np.mean(terms)


def info_nce(queries, documents, case):
    of_queries = []
    for i, query in enumerate(queries):
        mine = [d for d, (owner, slot, _) in enumerate(case["listed"]) if owner == i and slot >= 0]
        known = {case["listed"][d][2] for d in mine} | {number for row, number in case["relevant"] if row == i}
        terms = []
        for p in mine:
            own = total = np.exp(query @ documents[p] / case["temperature"])
            for document, (_, slot, number) in zip(documents, case["listed"], strict=True):
                if number in known or (case["candidates"] == "same_slot" and slot not in (-1, case["listed"][p][1])):
                    continue
                total = total + np.exp(query @ document / case["temperature"])
            terms.append(-np.log(own / total))
        if terms:
            of_queries.append(np.mean(terms))
    return np.mean(of_queries)


def mid_nce(left, right, case):
    pairs = [i for i, label in enumerate(case["target"]) if label >= case["threshold"]]
    similarity = np.exp(left @ right.T / case["temperature"])
    return np.mean([-np.log(similarity[i, i] / similarity[i].sum()) for i in pairs])


def gradient(loss, inputs, which):
    """Central differences by the entries of one input."""
    result = np.zeros_like(inputs[which])
    for place in np.ndindex(result.shape):
        around = []
        for sign in (1, -1):
            moved = [value.copy() for value in inputs]
            moved[which][place] += sign * STEP
            around.append(loss(*moved))
        result[place] = (around[0] - around[1]) / (2 * STEP)
    return result.round(7).tolist()


def unit(random, rows):
    drawn = random.normal(size=(rows, 4))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).round(6)


def similarity_cases(random):
    for labels in (random.random(5).round(3), random.integers(0, 6, 8) / 5, random.integers(0, 2, 6).astype(float)):
        predicted, t = random.uniform(-0.9, 0.9, len(labels)).round(4), 0.2
        case = {"predicted": predicted.tolist(), "target": labels.tolist(), "temperature": t}
        for name, loss in (("pearson", pearson), ("rank_kl", rank_kl), ("pro", pro)):
            at_labels = partial(loss, y=labels, t=t)
            case[name] = {"loss": float(at_labels(predicted)), "grad": gradient(at_labels, [predicted], 0)}
        yield case


def retrieval_cases(random):
    listed = [(0, 0, 1), (0, 1, 2), (0, -1, 7), (1, 0, 3), (2, 0, 3), (2, 1, 4), (2, -1, 2), (2, -1, 8), (-1, 1, 9)]
    for candidates in ("all", "same_slot"):
        case = {"listed": listed, "relevant": [[1, 8]], "temperature": 0.2, "candidates": candidates}
        inputs = [unit(random, 3), unit(random, len(listed))]
        yield finished(case, ("queries", "documents"), inputs, lambda q, d, case=case: info_nce(q, d, case))


def mid_nce_cases(random):
    case = {"target": [1.0, 0.4, 0.8, 0.2], "threshold": 0.8, "temperature": 0.2}
    yield finished(case, ("left", "right"), [unit(random, 4), unit(random, 4)], lambda a, b: mid_nce(a, b, case))


def finished(case, names, inputs, loss):
    case |= {name: value.tolist() for name, value in zip(names, inputs, strict=True)}
    case["loss"] = float(loss(*inputs))
    case |= {f"grad_{name}": gradient(loss, inputs, which) for which, name in enumerate(names)}
    return case


def one_case_a_line(content):
    if isinstance(content, str):
        return json.dumps(content)
    return "[\n" + ",\n".join(json.dumps(case) for case in content) + "\n]"


if __name__ == "__main__":
    random = np.random.default_rng(20250811)
    golden = {
        "about": "Written by make_golden.py: float64 values of the definitions, gradients by central differences.",
        "similarity": list(similarity_cases(random)),
        "retrieval": list(retrieval_cases(random)),
        "mid_nce": list(mid_nce_cases(random)),
    }
    sections = [f"{json.dumps(name)}: {one_case_a_line(content)}" for name, content in golden.items()]
    Path(__file__).with_name("golden.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")
