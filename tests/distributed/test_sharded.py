"""FSDP2 and gradient checkpointing train the model that one process trains, and resume to the same bits.

FSDP2 runs on processors here: torch can, but accelerate takes the setting for granted on GPUs only, so it is told. On
GPUs the same runs go through `codiemb train` as it is.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from codiemb import load_config, train
from codiemb.encoder import memory
from codiemb.training import run
from tests.conftest import needs_peft
from tests.distributed.conftest import DROPOUT, STILL, train_on_ranks
from tests.small_run import assert_equal_weights

pytestmark = pytest.mark.slow
FSDP = "train.fsdp=true"


def told_of_fsdp():
    made = Accelerator.__init__

    def sharded(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.state.fsdp_plugin = fsdp_plugin
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.state._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.state._mixed_precision)

    Accelerator.__init__ = sharded
    run.require_devices = lambda config: None


def one_by_one():
    """A text a micro-batch, so that a rank with three rows runs more of them than one with two."""
    told_of_fsdp()
    torch.set_num_threads(2)
    memory.micro_batch_tokens = lambda encoder: 1


def recomputed():
    one_by_one()
    memory.Memory.recomputed = lambda self, micro_batches: len(micro_batches) - 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ["train.optim=sgd", "train.max_grad_norm=0", "train.gradient_checkpointing=true"],
            id="sgd, unclipped, gradient checkpointing",
        ),
        pytest.param(["model.lora={r: 2}", "model.head.dim=8"], id="lora and head", marks=needs_peft),
    ],
)
def test_fsdp_trains_the_model_of_one_process(eight_steps, tmp_path, settings):
    """Over 8 steps. Adam hides a wrong scale of the loss, and clipping does; plain SGD shows it."""
    train(load_config(eight_steps, [STILL, *settings, f"output_dir={tmp_path / 'one'}"]))
    train_on_ranks(2, eight_steps, STILL, *settings, FSDP, changed=told_of_fsdp)
    tolerance = {"rtol": 0, "atol": 1e-5}
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "run" / "model", ["key.bias"], **tolerance)
    assert_equal_weights(
        tmp_path / "one" / "checkpoint-4", tmp_path / "run" / "checkpoint-4", ["key.bias"], **tolerance
    )


@pytest.mark.parametrize("changed", [one_by_one, recomputed])
def test_fsdp_with_micro_batches_that_differ_in_number(eight_steps, tmp_path, changed):
    """A rank that ran fewer than another would wait for ever: weights are exchanged inside each, in one order.

    With batches of one query the second rank has no row of it.
    """
    settings = [STILL, "batching.retrieval.batch_size=1"]
    train(load_config(eight_steps, [*settings, f"output_dir={tmp_path / 'one'}"]))
    train_on_ranks(2, eight_steps, *settings, FSDP, "train.ddp_timeout=60", changed=changed)
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "run" / "model", ["key.bias"], rtol=0, atol=1e-5)


def test_fsdp_resumes_to_the_same_bits(eight_steps, tmp_path):
    train_on_ranks(2, eight_steps, DROPOUT, FSDP, changed=told_of_fsdp)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name in ("model", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    train_on_ranks(2, eight_steps, DROPOUT, FSDP, resume=True, changed=told_of_fsdp)
    assert_equal_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model", rtol=0, atol=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_gradient_checkpointing_changes_nothing(eight_steps, tmp_path, processes):
    """With dropout, whose masks are drawn again in the second forward pass: the same bits after 8 steps."""
    for name, setting in (("plain", "false"), ("again", "true")):
        overrides = [DROPOUT, f"train.gradient_checkpointing={setting}", f"output_dir={tmp_path / name}"]
        if processes == 1:
            train(load_config(eight_steps, overrides))
        else:
            train_on_ranks(2, eight_steps, *overrides)
    assert_equal_weights(tmp_path / "plain" / "model", tmp_path / "again" / "model", rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("bf16", ["false", "true"])
def test_fsdp_on_two_gpus(eight_steps, tmp_path, bf16):
    settings = [STILL, f"train.bf16={bf16}"]
    train(load_config(eight_steps, [*settings, f"output_dir={tmp_path / 'one'}"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "codiemb"]
    subprocess.run([*command, "train", str(eight_steps), *settings, FSDP], check=True, timeout=300)
    tolerance = {"rtol": 0, "atol": 1e-5 if bf16 == "false" else 1e-2}
    assert_equal_weights(tmp_path / "one" / "model", tmp_path / "run" / "model", ["key.bias"], **tolerance)
