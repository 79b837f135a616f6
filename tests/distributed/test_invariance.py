"""The same run on 1, 2 and 4 processes makes the same model, cached or not, and ranks that differ are told so."""

import json

import pytest
import torch
import torch.distributed as dist
import yaml
from sentence_transformers import SentenceTransformer

from codiemb import load_config
from codiemb.distributed import agree, finish
from codiemb.encoder.memory import Footprint, Memory
from codiemb.errors import DistributedError
from codiemb.training import trainer
from codiemb.training.run import train
from tests.distributed.conftest import free_port, join, on_ranks

LETTERS = "abcdefghijklmnopqrst"  # the tiny model has a token for each
RETRIEVAL = [  # one, two or three positives; none, one or two negatives
    {
        "query": f"{LETTERS[n]} {LETTERS[n + 1]}",
        "positives": [f"{LETTERS[n]} {LETTERS[n + 2]}", f"{LETTERS[n]} t", f"{LETTERS[n]} s"][: 1 + n % 3],
        "negatives": [f"{LETTERS[(n + 7) % 20]} {LETTERS[(n + 5) % 20]}", f"{LETTERS[n]} q"][: (n + 1) % 3],
        "positive_scores": [2, 1, 0.5][: 1 + n % 3],
    }
    for n in range(17)
]
PAIRS = [
    {"query": f"{LETTERS[n]} h", "positives": [f"{LETTERS[n]} {LETTERS[n % 5]}"], "positive_scores": [(n % 5) / 4]}
    for n in range(13)
]
LABELS = [{"query": f"{LETTERS[n]} {LETTERS[(n * 3) % 20]}", "label": n % 4} for n in range(15)]
DATA = [
    {"name": "search", "task": "retrieval", "path": "retrieval.jsonl"},
    {"name": "pairs", "task": "similarity", "path": "pairs.jsonl"},
]
LABELLED = [{"name": task, "task": task, "path": "labels.jsonl"} for task in ("classification", "clustering")]
CACHED = Memory(8, Footprint(1, 0), 24)  # of one byte a token: a micro-batch of one short text is kept, others are not
STEPS = 20
FEWER = 12
SHORT = f"train.max_steps={FEWER}"
CACHED_TOO = {
    "across devices": [],
    "in groups": [
        "losses.retrieval.cross_device=false",
        "losses.retrieval.group_size=2",
        "losses.similarity.reduction=sum",
    ],
    "both tasks in a step": ["batching.schedule=paired", "losses.balance=magnitude", "losses.retrieval.symmetric=true"],
    # Weights above the middle have no gradient in batches of pairs, so AdamW must leave them alone there.
    "the middle layer alone": [
        "losses.similarity={pearson: 0, rank_kl: 0, pro: 0, mid_nce: 1, mid_nce_threshold: 0.5}",
        "train.weight_decay=0.1",
        SHORT,
    ],
}
SGD = ["train.optim=sgd", "train.max_grad_norm=0", "train.learning_rate=1e-2"]  # Adam and clipping hide a wrong scale
VARIANTS = CACHED_TOO | {
    "sgd": [*SGD, "losses.emphasis=0.7", SHORT],
    "sgd, other losses and tasks": [
        *SGD,
        "losses.retrieval.type=list_softmax",
        "losses.similarity={list_net: 1, list_mle: 1, rank_net: 1, lambda_rank: 1, cosine_mse: 1, temperature: 0.2}",
        f"data={json.dumps([*DATA, *LABELLED])}",
        "batching.classification.batch_size=5",
        "batching.clustering.batch_size=7",
        SHORT,
    ],
}
RUNS = [(world, variant) for world in ("2", "4") for variant in VARIANTS]
RUNS += [(f"{world} cached", variant) for world in (1, 2, 4) for variant in CACHED_TOO]


@pytest.fixture(scope="module")
def config_file(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    for name, rows in (("retrieval", RETRIEVAL), ("pairs", PAIRS), ("labels", LABELS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "output_dir": "unused",
        "model": {"base": str(tiny_model_folder), "dropout": {"hidden": 0, "attention": 0}},
        "data": DATA,
        # 17 queries and 13 pairs in batches of 6 and 5: neither divides by 2 or 4, nor do the last ones
        "batching": {"retrieval": {"batch_size": 6, "negatives": 1}, "similarity": {"batch_size": 5}},
        "losses": {"retrieval": {"temperature": 0.05}, "similarity": {"mid_nce_temperature": 0.05}},
        "train": {"max_steps": STEPS, "learning_rate": 1e-3, "bf16": False, "save_strategy": "no"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def train_all(rank, world, config_file, port=0):
    """Every variant, into <world>/<variant>."""
    torch.set_num_threads(1 if world == 4 else 2)  # with two, micro-batches run side by side
    if world > 1:
        join(rank, world, port)
    for variant, overrides in VARIANTS.items():
        for cached in (False, True) if variant in CACHED_TOO else (False,):
            out = config_file.parent / f"{world}{' cached' * cached}" / variant
            with pytest.MonkeyPatch.context() as patch:
                if cached:
                    patch.setattr(trainer, "plan_memory", lambda *arguments: CACHED)
                train(load_config(config_file, [f"output_dir={out}", *overrides]))
    finish()


@pytest.fixture(scope="module")
def runs(config_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_CACHE", str(tmp_path_factory.mktemp("cache")))
        train_all(0, 1, config_file)
        for world in (2, 4):
            on_ranks(world, train_all, world, config_file, free_port())
    return config_file.parent


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "variant"), RUNS)
def test_loss_curve_and_weights_do_not_depend_on_the_number_of_processes(runs, world, variant):
    one, several = runs / "1" / variant, runs / world / variant
    assert json.loads((several / "environment.json").read_text())["world_size"] == int(world[0])
    lines = list(zip(metrics(one), metrics(several), strict=True))
    assert len(lines) == (FEWER if SHORT in VARIANTS[variant] else STEPS)
    for alone, shared in lines:
        for name in ("step", "source", "rows"):
            assert alone[name] == shared[name]
        for name in (key for key in alone if key.startswith("loss") or key == "candidates_per_query"):
            # A part may be a small difference of large numbers: 1 - a correlation.
            rounding = 2e-5 if "/" in name else 0
            assert shared[name] == (alone[name] and pytest.approx(alone[name], rel=1e-5, abs=rounding))
    weights, others = (SentenceTransformer(str(run / "model")).state_dict() for run in (one, several))
    for name, weight in weights.items():
        torch.testing.assert_close(
            others[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.slow
def test_the_runs_compared_above_did_learn_and_differ(runs, tiny_model_folder):
    weights = [SentenceTransformer(str(runs / "1" / variant / "model")).state_dict() for variant in VARIANTS]
    weights.append(SentenceTransformer(str(tiny_model_folder)).state_dict())
    name = next(name for name in weights[0] if name.endswith("layer.0.output.dense.weight"))
    for place, one in enumerate(weights):
        assert all((one[name] - other[name]).abs().max() > 1e-3 for other in weights[:place])


def disagree(rank, folder, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    agree({"seed": 1, "source": "faq"}, "at step 3")
    try:
        agree({"seed": 1, "source": "faq" if rank < 2 else "pairs"}, "at step 4")
    except DistributedError as error:
        (folder / str(rank)).write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_differ_are_named_on_every_rank(tmp_path):
    on_ranks(3, disagree, tmp_path, free_port())
    expected = "rank 2, at step 4, source: got pairs, expected faq as on rank 0, start all ranks with"
    assert [(tmp_path / str(rank)).read_text().startswith(expected) for rank in range(3)] == [True] * 3
