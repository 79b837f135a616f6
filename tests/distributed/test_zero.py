"""DeepSpeed ZeRO trains the model that one process trains, and resumes to the same bits; on processors, with gloo."""

import json
import shutil
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from codiemb import load_config, train
from codiemb.encoder import memory
from tests.distributed.conftest import DROPOUT, STILL, train_on_ranks
from tests.small_run import assert_equal_weights, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which is for Linux"),
]
MOST = 10  # norm of the gradients, which is 4 to 45 here


def uncompiled():
    """Without DeepSpeed's own exchange in shared memory, which takes a minute to compile: gloo exchanges."""
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def one_by_one():
    """A text a micro-batch, so that a rank with three rows runs more of them than one with two."""
    uncompiled()
    torch.set_num_threads(2)
    memory.micro_batch_tokens = lambda encoder: 1


def zero(stage):
    settings = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return "train.deepspeed=" + json.dumps({**settings, "train_micro_batch_size_per_gpu": "auto"})


def test_zero_2_trains_the_model_of_one_process(eight_steps, tmp_path):
    """Adam hides a wrong scale of the loss; SGD shows it, as long as not every step is clipped."""
    settings = [STILL, "train.optim=sgd", f"train.max_grad_norm={MOST}"]
    train(load_config(eight_steps, [*settings, f"output_dir={tmp_path / 'one'}"]))
    train_on_ranks(2, eight_steps, *settings, zero(2), changed=uncompiled)
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "run" / "model", ["key.bias"], rtol=0, atol=1e-5)
    train(load_config(eight_steps, [*settings, "train.max_grad_norm=0", f"output_dir={tmp_path / 'unclipped'}"]))
    one, other = (weights(tmp_path / name / "model") for name in ("one", "unclipped"))
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-4, "nothing was clipped"


def test_zero_3_with_threads_and_micro_batches_that_differ_in_number(eight_steps, tmp_path):
    """Weights are exchanged in each micro-batch, in one order on all ranks; threads of a rank would mix it up.

    With batches of one query the second rank has no row of it.
    """
    settings = [STILL, "batching.retrieval.batch_size=1", "train.optim=sgd", "train.max_grad_norm=0"]
    train(load_config(eight_steps, [*settings, f"output_dir={tmp_path / 'one'}"]))
    train_on_ranks(2, eight_steps, *settings, zero(3), "train.ddp_timeout=60", changed=one_by_one)
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "run" / "model", ["key.bias"], rtol=0, atol=1e-5)


def test_zero_resumes_to_the_same_bits(eight_steps, tmp_path):
    train_on_ranks(2, eight_steps, DROPOUT, zero(3), changed=uncompiled)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name in ("model", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    train_on_ranks(2, eight_steps, DROPOUT, zero(3), resume=True, changed=uncompiled)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)
