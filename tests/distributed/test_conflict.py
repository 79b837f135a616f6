"""The conflict meter finds on two processes what it finds on one."""

import json

import pytest
import torch

from codiemb import load_config
from codiemb.distributed import finish
from codiemb.training.run import train
from tests.distributed.conftest import free_port, join, on_ranks
from tests.small_run import assert_equal_weights, small_run


def train_on(rank, world, config_file, port=0):
    torch.set_num_threads(1)
    if world > 1:
        join(rank, world, port)
    for name, every in (("measured", "1"), ("plain", "null"))[:world]:
        out = config_file.parent / f"{world} {name}"
        train(load_config(config_file, [f"output_dir={out}", f"train.conflict_every={every}"]))
    finish()


@pytest.mark.slow
def test_two_processes_find_the_cosines_of_one(tiny_model_folder, tmp_path):
    """A batch of 4 pairs or queries is shared by two; with the meter the weights are still those without."""
    file = small_run(
        tmp_path,
        tiny_model_folder,
        train={"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"},
        batching={"schedule": "proportional"},
        evaluation={"suite": None},
    )
    train_on(0, 1, file)
    on_ranks(2, train_on, 2, file, free_port())
    assert_equal_weights(tmp_path / "2 plain" / "model", tmp_path / "2 measured" / "model", rtol=0, atol=0)
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{world} measured" / "conflict.jsonl").read_text().splitlines()]
        for world in (1, 2)
    )
    assert [line["step"] for line in two] == [0, 1, 2]
    for alone, shared in zip(one, two, strict=True):
        assert shared["cosine"] == pytest.approx(alone["cosine"], abs=1e-4)
        assert shared["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
