"""Several processes share the cores of one machine."""

import multiprocessing
import os
import socket

import pytest
import torch

from codiemb import load_config, train
from codiemb.distributed import finish
from tests.small_run import small_run

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


def on_ranks(ranks, act, *arguments):
    """`act(rank, *arguments)` in a process for each rank, forked from one that has imported the libraries."""
    multiprocessing.set_forkserver_preload(["codiemb.training.run"])
    everything = (dict(os.environ), act, *arguments)
    torch.multiprocessing.start_processes(_in_environment, everything, nprocs=ranks, start_method="forkserver")


def _in_environment(rank, environment, act, *arguments):
    os.environ.update(environment)
    act(rank, *arguments)


def join(rank, ranks, port):
    """What torchrun tells a rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ.update({**address, **place, "CUDA_VISIBLE_DEVICES": ""})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_on_ranks(ranks, config_file, *overrides, resume=False, changed=None):
    """A run on several processes; `changed`, a function of a module, is called in each before it begins."""
    on_ranks(ranks, _train, ranks, free_port(), config_file, overrides, resume, changed)


def _train(rank, ranks, port, config_file, overrides, resume, changed):
    join(rank, ranks, port)
    torch.set_num_threads(1)
    if changed is not None:
        changed()
    train(load_config(config_file, overrides), resume=resume)
    finish()
