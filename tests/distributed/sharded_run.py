"""`codiemb train` with FSDP2 on processors: torch can, accelerate takes the setting for granted on GPUs only.

Started by torchrun from test_sharded.py. Accelerate is told that this is FSDP; all the rest is the real run. With
ZeRO, from test_zero.py, it is told nothing.
"""

import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from codiemb import load_config, train
from codiemb.distributed import finish
from codiemb.encoder import memory
from codiemb.training import run

made = Accelerator.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.state.fsdp_plugin = fsdp_plugin
    self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if self.state._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self.state._mixed_precision)


if "train.fsdp=true" in sys.argv:
    Accelerator.__init__ = sharded
run.require_devices = lambda config: None
if "--one-by-one" in sys.argv:  # a text a micro-batch, so that a rank with three rows runs more of them than with two
    memory.micro_batch_tokens = lambda encoder: 1
if "--two-threads" in sys.argv:
    torch.set_num_threads(2)
if "--cached" in sys.argv:
    memory.Memory.recomputed = lambda self, micro_batches: len(micro_batches) - 1
overrides = [value for value in sys.argv[2:] if not value.startswith("--")]
train(load_config(sys.argv[1], overrides), resume="--resume" in sys.argv)
finish()
