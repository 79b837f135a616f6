"""Several processes share the cores of one machine."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_run import small_run

ROOT = Path(__file__).parents[2]
STILL = "model.dropout={hidden: 0, attention: 0}"
DROPOUT = "model.dropout={hidden: 0.1, attention: 0.1}"


@pytest.fixture(scope="package", autouse=True)
def one_thread_each():
    """For the processes that tests start. Threads of many that spin for work made steps fifty times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def eight_steps(tmp_path, tiny_model_folder):
    """8 steps; with batches of 5 the two ranks hold different numbers of rows."""
    return small_run(
        tmp_path,
        tiny_model_folder,
        batching={"retrieval": {"batch_size": 5}, "similarity": {"batch_size": 5}},
        train={"max_steps": 8, "save_steps": 4, "learning_rate": 1e-3},
        evaluation={"suite": None},
    )


def on_two_processes(program, *arguments):
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        timeout=500,  # DeepSpeed compiles at its first start
    )


def on_ranks(ranks, act, *arguments):
    """`act(rank, *arguments)` in a process for each rank, forked from one that has imported the libraries."""
    multiprocessing.set_forkserver_preload(["codiemb.training.run"])
    everything = (dict(os.environ), act, *arguments)
    torch.multiprocessing.start_processes(_in_environment, everything, nprocs=ranks, start_method="forkserver")


def _in_environment(rank, environment, act, *arguments):
    os.environ.update(environment)
    act(rank, *arguments)
