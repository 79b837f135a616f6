"""Adapters, a head, and a head on a frozen backbone: two processes train the model that one process trains."""

import pytest
import torch

from codiemb import load_config
from codiemb.distributed import finish
from codiemb.training.run import train
from tests.conftest import needs_peft
from tests.distributed.conftest import STILL, free_port, join, on_ranks
from tests.small_run import assert_equal_weights, weights

HEAD = "model.head.dim=8"
PARTLY = {
    "head": [HEAD],
    "frozen backbone": [HEAD, "model.freeze_backbone=true", "losses.similarity.mid_nce=0"],
}
WITH_ADAPTERS = {"lora": ["model.lora={r: 2}"], "lora and head": ["model.lora={r: 2}", HEAD]}
SGD = ["train.optim=sgd", "train.max_grad_norm=0", "train.learning_rate=2e-3", "train.save_strategy=no"]
ONE_QUERY = "batching.retrieval.batch_size=1"  # so that the second rank has no row


def train_on(rank, world, config_file, variants, port=0):
    """Every variant, into `<world> <variant>`."""
    torch.set_num_threads(1)
    if world > 1:
        join(rank, world, port)
    for name, settings in variants.items():
        out = f"output_dir={config_file.parent / f'{world} {name}'}"
        train(load_config(config_file, [STILL, *SGD, ONE_QUERY, *settings, out]))
    finish()


@pytest.mark.slow
@pytest.mark.parametrize("variants", [PARTLY, pytest.param(WITH_ADAPTERS, marks=needs_peft)], ids=["head", "lora"])
def test_two_processes_train_the_model_of_one(eight_steps, tmp_path, tiny_model_folder, variants):
    """Weights that are not trained have no gradient to wait for; plain SGD shows a wrong scale."""
    train_on(0, 1, eight_steps, variants)
    on_ranks(2, train_on, 2, eight_steps, variants, free_port())
    before = weights(tiny_model_folder)
    for name in variants:
        one = weights(tmp_path / f"1 {name}" / "model")
        moved = max((one[key] - weight).abs().max().item() for key, weight in before.items())
        assert (moved == 0) == (name == "frozen backbone")
        assert moved > 1e-3 or (one["2.linear.weight"] - torch.eye(8, 16)).abs().max() > 1e-3
        assert_equal_weights(tmp_path / f"1 {name}" / "model", tmp_path / f"2 {name}" / "model", rtol=0, atol=1e-5)
