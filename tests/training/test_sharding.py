"""What a sharded run refuses before it begins."""

from pathlib import Path

import pytest

from codiemb.config import Config
from codiemb.errors import ConfigError
from codiemb.training.checkpoint import Checkpoint
from codiemb.training.sharding import require_same_shards


def config_with(**train):
    data = [{"name": "a", "task": "similarity", "path": "a.csv"}]
    return Config.model_validate({"output_dir": "run", "model": {"base": "b"}, "data": data, "train": train})


def test_deepspeed_goes_on_with_as_many_processes_only():
    """DeepSpeed would say so itself, in an error of its own, when the run folder has been changed already."""
    of_two = Checkpoint(Path("run/checkpoint-4"), 4, 2, True, {}, {})
    of_one = Checkpoint(Path("run/checkpoint-4"), 4, 1, True, {}, {})
    zero = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match="got 1 processes, expected 2, which wrote run/checkpoint-4"):
        require_same_shards(config_with(deepspeed=zero), of_two)
    require_same_shards(config_with(deepspeed=zero), of_one)
    require_same_shards(config_with(), of_two)
