"""A run of seconds on the tiny model, with lists and pairs, for tests of whole runs."""

import json

import torch
import yaml
from sentence_transformers import SentenceTransformer

LETTERS = "abcdefghijklmnopqrst"  # the tiny model has a token for each
RETRIEVAL = [
    {
        "query": f"{LETTERS[n]} {LETTERS[n + 1]}",
        "positives": [f"{LETTERS[n]} {LETTERS[n + 2]}", f"{LETTERS[n]} t"][: 1 + n % 2],
    }
    | ({"negatives": [f"{LETTERS[(n + 7) % 20]} {LETTERS[(n + 5) % 20]}"]} if n % 3 else {})
    for n in range(13)
]
PAIRS = [
    {"query": f"{LETTERS[n]} d", "positives": [f"{LETTERS[n]} {LETTERS[n % 5]}"], "positive_scores": [(n % 5) / 4]}
    for n in range(11)
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_run(folder, base, **sections):
    """Writes the data, a suite of the same and `config.yaml` into `folder`; returns the config's path.

    13 rows make 4 batches of at most 4, 11 pairs make 3: 7 steps an epoch. `sections` add to what stands here.
    """
    write_lines(folder / "retrieval.jsonl", RETRIEVAL)
    write_lines(folder / "pairs.jsonl", PAIRS)
    data = [
        {"name": "search", "task": "retrieval", "path": "retrieval.jsonl"},
        {"name": "pairs", "task": "similarity", "path": "pairs.jsonl"},
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump(data))
    content = {
        "output_dir": str(folder / "run"),
        "model": {"base": str(base)},
        "data": data,
        "batching": {"retrieval": {"batch_size": 4}, "similarity": {"batch_size": 4}},
        "train": {"bf16": False},
        "evaluation": {"suite": "suite.yaml"},
    }
    for name, settings in sections.items():
        content[name] = content.get(name, {}) | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def weights(folder):
    return SentenceTransformer(str(folder)).state_dict()


def assert_equal_weights(one, other, leave_out=(), **tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one.keys() - {name for name in one if name.endswith(tuple(leave_out))}:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
