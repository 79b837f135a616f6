"""Two and four processes with a slice each give every gradient of one process on the whole batch, cached or not."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from codiemb import distributed
from codiemb.batching.loader import StepReader
from codiemb.batching.plan import Batch, Plan, Step
from codiemb.config import Batching, Losses, Source
from codiemb.data.store import load_records
from codiemb.encoder.memory import Footprint, Memory
from codiemb.training.joint import JointModel
from tests.distributed.conftest import on_ranks

WORLDS = (2, 4)
QUERIES = [  # ragged, with a document that is the positive of one query and the negative of another
    {"query": "abc", "positives": ["abd", "xyz"], "negatives": ["mno", "pq"]},
    {"query": "codi", "positives": ["emb"], "negatives": []},
    {"query": "one", "positives": ["two", "three", "four"], "negatives": ["emb"]},
    {"query": "left", "positives": ["right"], "negatives": ["up", "down", "abd", "in", "out"]},
    {"query": "long query text", "positives": ["short"], "negatives": ["mno"]},
]
PAIRS = [("ab", "ba", 1.0), ("cd", "dc", 0.2), ("ef", "xx", 1.0), ("gh", "hgh", 0.6), ("ij", "ba", 0.2)]


def step(**rows):
    batches = [Batch(source, np.array(places), 0) for source, places in rows.items()]
    return Step(tuple(batches))


RAGGED = step(queries=[4, 0, 2, 1, 3])
STEPS = {  # what a step holds, and settings of the losses
    "ragged queries": (RAGGED, {}),
    **{
        f"at most {positives} positives, {negatives} negatives": (
            RAGGED,
            {"drawn": {"positives": positives, "negatives": negatives}},
        )
        for positives in (1, 3)
        for negatives in (0, 4)
    },
    "same slot": (RAGGED, {"candidates": "same_slot"}),
    "in chunks": (RAGGED, {"chunk_size": 3}),
    "hardness and margin": (RAGGED, {"hardness": 2, "false_negative_margin": 0.05}),
    "symmetric": (RAGGED, {"symmetric": True}),
    "groups of two": (RAGGED, {"cross_device": False, "group_size": 2}),
    "groups of three, symmetric": (RAGGED, {"cross_device": False, "group_size": 3, "symmetric": True}),
    "triplets": (RAGGED, {"type": "triplet"}),
    "graded lists": (RAGGED, {"type": "list_softmax"}),
    "pairs": (step(pairs=[0, 1, 2, 3, 4]), {}),
    "pairs, lists of all": (
        step(pairs=[0, 1, 2, 3, 4]),
        {"pairs": {"list_net": 1, "list_mle": 1, "rank_net": 1, "lambda_rank": 1, "cosine_mse": 1}},
    ),
    "pairs, sum": (step(pairs=[0, 1, 2, 3, 4]), {"pairs": {"rank_kl": 1, "reduction": "sum"}}),
    "pairs, other losses": (
        step(pairs=[0, 1, 2, 3, 4]),
        {"pairs": {"cosent": 1, "angle": 1, "soft_spearman": 1, "info_nce": 1, "mid_nce_temperature": 0.5}},
    ),
    # Without Pearson, which makes of roundings 1e-5 where five cosines are within 0.02 of each other.
    "prefixes": (
        step(queries=[4, 0, 2, 1, 3], pairs=[0, 1, 2, 3, 4]),
        {"matryoshka": {"dims": [16, 4]}, "pairs": {"pearson": 0, "mid_nce_temperature": 0.5}},
    ),
    "one query for all ranks": (step(queries=[0]), {}),
    "one query and all pairs": (step(queries=[2], pairs=[3, 0, 1, 2, 4]), {}),
    "all queries and one pair": (step(queries=[0, 1, 2, 3, 4], pairs=[3]), {"candidates": "same_slot"}),
}
TOKENS = 12  # of a micro-batch: two or three texts
MEMORIES = {  # of one byte a token
    "direct": None,
    "the last micro-batch direct": Memory(TOKENS, Footprint(1, 0), TOKENS),
    "cached": Memory(-1, Footprint(1, 0), TOKENS),
}


def loss_and_gradients(model_folder, data_folder, rank, world, memory="direct", dropout=0.0):
    """By step: the loss, and the mean over ranks of every parameter's gradient, as DDP takes it."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    sources = [
        Source(name="queries", task="retrieval", path=str(data_folder / "queries.jsonl")),
        Source(name="pairs", task="similarity", path=str(data_folder / "pairs.jsonl")),
    ]
    records = {source.name: load_records(source) for source in sources}
    encoder = SentenceTransformer(str(model_folder), device="cpu").train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    lengths = {name: len(source) for name, source in records.items()}
    tasks = {source.name: source.task for source in sources}
    results = {}
    for name, (taken, settings) in STEPS.items():
        settings = dict(settings)
        drawn = Batching(retrieval=settings.pop("drawn", {"positives": 2, "negatives": 2}))
        reader = StepReader(Plan(lengths, tasks, drawn, seed=0), records, encoder, rank, world, TOKENS)
        pairs = settings.pop("pairs", {"mid_nce_temperature": 0.5})
        prefixes = settings.pop("matryoshka", None)
        losses = Losses(
            retrieval={"temperature": 0.5, **settings},
            similarity={"temperature": 0.5, **pairs},
            matryoshka=prefixes,
        )
        model = JointModel(encoder, losses, MEMORIES[memory])
        model.zero_grad(set_to_none=True)
        inputs = reader[taken]
        with mock.patch.object(distributed, "_all_rows", wraps=distributed._all_rows) as exchange:
            outputs = model(inputs["batches"], inputs["micro_batches"])
        loss = outputs["loss"]
        loss.backward()
        parameters = dict(encoder.named_parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()])
        if world > 1:
            dist.all_reduce(flat)
        parts = (flat / world).split([p.numel() for p in parameters.values()])
        gradients = {key: part.view_as(p) for (key, p), part in zip(parameters.items(), parts, strict=True)}
        results[name] = {
            "loss": loss.item(),
            "gradients": gradients,
            "rows": [batch["rows"] for batch in inputs["batches"]],
            "micro_batches": len(inputs["micro_batches"]),
            "exchanges": exchange.call_count,
            "random": torch.rand(1).item(),
            "candidates": [float(one["candidates"] or 0) for one in outputs["objectives"]],
        }
    return results


def run_rank(rank, world, model_folder, data_folder, out):
    meeting = f"file://{out / f'meeting-{world}'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    for memory in MEMORIES:
        found = loss_and_gradients(model_folder, data_folder, rank, world, memory)
        torch.save(found, out / f"{memory} {rank}-of-{world}.pt")
    dist.destroy_process_group()


def write_data(folder):
    pairs = [{"query": left, "positives": [right], "positive_scores": [label]} for left, right, label in PAIRS]
    for name, rows in (("queries", QUERIES), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tiny_model_folder, tmp_path_factory):
    """By number of processes and memory what each rank found, every step of `STEPS` each."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    write_data(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
        one = loss_and_gradients(tiny_model_folder, data, 0, 1)  # also fills the cache of the others
        found = {(1, "direct"): [one]}
        for world in WORLDS:
            on_ranks(world, run_rank, world, tiny_model_folder, data, out)
            for memory in MEMORIES:
                files = [out / f"{memory} {rank}-of-{world}.pt" for rank in range(world)]
                found[world, memory] = [torch.load(file) for file in files]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", STEPS)
def test_gradients_equal_those_of_one_process(runs, name, memory, world):
    """To float32 rounding: 1e-6 of the step's largest gradient where that is above 1 (8.4 for the pairs), else 1e-6."""
    one, ranks = runs[1, "direct"][0][name], [run[name] for run in runs[world, memory]]
    largest = {key: gradient.abs().max().item() for key, gradient in one["gradients"].items()}
    assert sum(value > 1e-3 for value in largest.values()) > 30, "zeros would be compared"
    atol = 1e-6 * max(1, *largest.values())
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert rank["candidates"] == pytest.approx(one["candidates"], rel=1e-5)
        torch.testing.assert_close(rank["gradients"], one["gradients"], rtol=0, atol=atol)


@pytest.mark.slow
def test_every_rank_has_its_own_rows(runs):
    """Without this both could have read the whole batch."""
    rows = {name: [run[name]["rows"] for run in runs[2, "direct"]] for name in STEPS}
    assert sorted(rows["ragged queries"]) == [[2], [3]]
    assert sorted(rows["one query for all ranks"]) == [[0], [1]]
    assert sorted(rows["one query and all pairs"])[0][0] == 0
    assert sorted(run["ragged queries"]["rows"] for run in runs[4, "cached"]) == [[1], [1], [1], [2]]


@pytest.mark.slow
def test_exchanges_of_a_step(runs):
    """Pairs: labels and ids, cosines, the middle layer. Queries: what is listed, documents; a list needs no other."""
    expected = {"pairs": 3, "ragged queries": 2, "symmetric": 4, "graded lists": 0, "one query and all pairs": 5}
    assert {name: runs[2, "direct"][0][name]["exchanges"] for name in expected} == expected
