"""Two processes with a slice each give every gradient of one process on the whole batch."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from codiemb.batching.loader import StepReader
from codiemb.batching.plan import Batch, Plan, Step
from codiemb.config import Batching, Losses, Source
from codiemb.data.store import load_records
from codiemb.training.joint import JointModel

WORLD = 2
QUERIES = [  # ragged, with a document that is the positive of one query and the negative of another
    {"query": "abc", "positives": ["abd", "xyz"], "negatives": ["mno", "pq"]},
    {"query": "codi", "positives": ["emb"], "negatives": []},
    {"query": "one", "positives": ["two", "three", "four"], "negatives": ["emb"]},
    {"query": "left", "positives": ["right"], "negatives": ["up", "down", "abd"]},
    {"query": "long query text", "positives": ["short"], "negatives": ["mno"]},
]
PAIRS = [("ab", "ba", 1.0), ("cd", "dc", 0.2), ("ef", "xx", 1.0), ("gh", "hgh", 0.6), ("ij", "ba", 0.2)]


def step(**rows):
    batches = [Batch(source, np.array(places), 0) for source, places in rows.items()]
    return Step(0, 0, tuple(batches))


STEPS = {
    "ragged queries": (step(queries=[4, 0, 2, 1, 3]), "all"),
    "ragged queries, same slot": (step(queries=[4, 0, 2, 1, 3]), "same_slot"),
    "pairs": (step(pairs=[0, 1, 2, 3, 4]), "all"),
    "one query for two ranks": (step(queries=[0]), "all"),
    "one query and all pairs": (step(queries=[2], pairs=[3, 0, 1, 2, 4]), "all"),
    "all queries and one pair": (step(queries=[0, 1, 2, 3, 4], pairs=[3]), "same_slot"),
}


def loss_and_gradients(model_folder, data_folder, rank, world):
    """By step: the loss, and the mean over ranks of every parameter's gradient, as DDP takes it."""
    torch.set_num_threads(1)
    sources = [
        Source(name="queries", task="retrieval", path=str(data_folder / "queries.jsonl")),
        Source(name="pairs", task="similarity", path=str(data_folder / "pairs.jsonl")),
    ]
    records = {source.name: load_records(source) for source in sources}
    encoder = SentenceTransformer(str(model_folder), device="cpu").train()  # its dropout is 0
    lengths = {name: len(source) for name, source in records.items()}
    tasks = {source.name: source.task for source in sources}
    plan = Plan(lengths, tasks, Batching(retrieval={"positives": 2, "negatives": 2}), seed=0)
    reader = StepReader(plan, records, encoder, rank, world)
    results = {}
    for name, (taken, candidates) in STEPS.items():
        losses = Losses(
            retrieval={"temperature": 0.5, "candidates": candidates},
            similarity={"temperature": 0.5, "mid_nce_temperature": 0.5},
        )
        model = JointModel(encoder, losses)
        model.zero_grad(set_to_none=True)
        batches = reader[taken]["batches"]
        loss = model(batches)["loss"]
        loss.backward()
        gradients = {}
        for key, parameter in encoder.named_parameters():
            gradients[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if world > 1:
                dist.all_reduce(gradients[key])
                gradients[key] /= world
        results[name] = {"loss": loss.item(), "gradients": gradients, "rows": [batch["rows"] for batch in batches]}
    return results


def run_rank(rank, model_folder, data_folder, out):
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=WORLD)
    torch.save(loss_and_gradients(model_folder, data_folder, rank, WORLD), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_model_folder, tmp_path_factory):
    """(one process, [rank 0, rank 1]), every step of `STEPS` each."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    pairs = [{"query": left, "positives": [right], "positive_scores": [label]} for left, right, label in PAIRS]
    for name, rows in (("queries", QUERIES), ("pairs", pairs)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
        one = loss_and_gradients(tiny_model_folder, data, 0, 1)  # also fills the cache of the others
        torch.multiprocessing.spawn(run_rank, (tiny_model_folder, data, out), nprocs=WORLD)
    return one, [torch.load(out / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_gradients_equal_those_of_one_process(runs, name):
    """To float32 rounding: 1e-6 of the step's largest gradient where that is above 1 (8.4 for the pairs), else 1e-6."""
    one, ranks = runs[0][name], [run[name] for run in runs[1]]
    largest = {key: gradient.abs().max().item() for key, gradient in one["gradients"].items()}
    assert sum(value > 1e-3 for value in largest.values()) > 30, "zeros would be compared"
    atol = 1e-6 * max(1, *largest.values())
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5)
        torch.testing.assert_close(rank["gradients"], one["gradients"], rtol=0, atol=atol)


@pytest.mark.slow
def test_every_rank_has_its_own_rows(runs):
    """Without this both could have read the whole batch."""
    rows = {name: [run[name]["rows"] for run in runs[1]] for name in STEPS}
    assert sorted(rows["ragged queries"]) == [[2], [3]]
    assert sorted(rows["one query for two ranks"]) == [[0], [1]]
    assert sorted(rows["one query and all pairs"])[0][0] == 0
