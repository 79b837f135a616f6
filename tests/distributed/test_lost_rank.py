"""A rank that is silent ends the others in time, with one line; other errors pass. This file is also the script."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from codiemb import distributed
from codiemb.errors import DistributedError

TIMEOUT = 20  # seconds; the ranks must also meet in it, on busy cores
SILENCE = 500


@pytest.mark.slow
def test_the_wait_for_a_silent_rank_ends_after_the_timeout():
    """transformers leaves gloo at half an hour whatever `ddp_timeout` says."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__],
        capture_output=True,
        text=True,
        timeout=SILENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode != 0
    said = [line for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("told: rank 0 of 2 on ")
    assert "--resume" in said[0]
    assert time.monotonic() - began < SILENCE - 100


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistNetworkError("Connection closed by peer\nand a stack of C++"), "Connection closed by peer"),
        (
            RuntimeError("[/third_party/gloo/gloo/tcp/pair.cc:537] Read error [10.0.0.1]:49364: reset. Good luck!"),
            "Read error [10.0.0.1]:49364: reset",
        ),
        # seen instead, about once in ten cut links
        (RuntimeError("Application timeout caused pair closure"), "Application timeout caused pair closure"),
    ],
)
def test_errors_of_the_exchange_are_told(error, said):
    said = re.escape(said)
    with pytest.raises(DistributedError, match=f"got {said}, expected"), distributed.told_of_lost_ranks():
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), distributed.told_of_lost_ranks():
        raise RuntimeError("shapes do not fit")


if __name__ == "__main__":
    distributed.start(TIMEOUT)
    if distributed.rank() == 1:
        time.sleep(SILENCE)
    try:
        with distributed.told_of_lost_ranks():
            distributed.barrier()
    except DistributedError as error:
        print(f"told: {error}", flush=True)
        sys.exit(2)
