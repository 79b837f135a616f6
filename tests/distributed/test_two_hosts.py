"""Two hosts on one machine: the link between them is cut, both end with one line, and the run goes on when it is back.

Each host is a network namespace with one end of a veth pair, so processes of one reach the other by that link alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.distributed.conftest import train_on_ranks
from tests.small_run import small_run

ADDRESSES = ("10.213.77.1", "10.213.77.2")
STEPS, SAVED = 120, 10
TIMEOUT = 20  # seconds of train.ddp_timeout; the hosts must also meet in it, on busy cores
FAILED_WITHIN = TIMEOUT + 90  # seconds; up to 28 after the time-out were seen on busy cores


class Host:
    """A namespace, and the torchrun in it."""

    def __init__(self, rank):
        self.rank = rank
        self.namespace = f"codiemb{os.getpid()}-{rank}"
        self.link = f"cd{os.getpid()}-{rank}"

    def start(self, said, *arguments):
        command = [
            *("ip", "netns", "exec", self.namespace, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--node-rank", str(self.rank), "--nproc-per-node", "1"),
            *("--master-addr", ADDRESSES[0], "--master-port", "29500", "-m", "codiemb", "train", *arguments),
        ]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": self.link}
        self.said = said
        with said.open("w") as file:
            self.torchrun = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})

    def end(self, deadline):
        """The exit code, and what was said."""
        try:
            code = self.torchrun.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"host {self.rank} still runs: {self.said.read_text()[-3000:]}")
        return code, self.said.read_text()

    def kill(self):
        if not hasattr(self, "torchrun"):
            return
        for pid in subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self.torchrun.wait()


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (iproute2)")
    pair = Host(0), Host(1)
    try:
        for host in pair:
            ip("netns", "add", host.namespace)
        ip("link", "add", pair[0].link, "type", "veth", "peer", "name", pair[1].link)
        for host in pair:
            ip("link", "set", host.link, "netns", host.namespace)
            ip("-n", host.namespace, "address", "add", f"{ADDRESSES[host.rank]}/24", "dev", host.link)
            for link in ("lo", host.link):
                ip("-n", host.namespace, "link", "set", link, "up")
        yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")
    finally:
        for host in pair:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


@pytest.fixture
def config_file(tmp_path, tiny_model_folder):
    return small_run(
        tmp_path, tiny_model_folder, train={"max_steps": STEPS, "save_steps": SAVED, "ddp_timeout": TIMEOUT}
    )


@pytest.mark.slow
def test_a_cut_link_ends_both_hosts_and_the_run_resumes(hosts, config_file, tmp_path):
    """The resumed run has the weights of one that was never cut, to the last bit."""
    for host in hosts:
        host.start(tmp_path / f"cut-{host.rank}.txt", str(config_file))
    began = time.monotonic()
    while not (tmp_path / "run" / f"checkpoint-{SAVED}").exists():
        assert all(host.torchrun.poll() is None for host in hosts), [host.said.read_text()[-3000:] for host in hosts]
        assert time.monotonic() < began + 240
        time.sleep(0.02)
    ip("-n", hosts[1].namespace, "link", "set", hosts[1].link, "down")
    cut = time.monotonic()
    for host in hosts:
        code, said = host.end(cut + FAILED_WITHIN)
        print(f"host {host.rank} ended {time.monotonic() - cut:.1f} s after the cut")
        assert code != 0
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert f"rank {host.rank} of 2" in errors[0]
        assert "start all of them again with --resume" in errors[0]
    assert not (tmp_path / "run" / "model").exists()

    ip("-n", hosts[1].namespace, "link", "set", hosts[1].link, "up")
    for host in hosts:
        host.start(tmp_path / f"resumed-{host.rank}.txt", str(config_file), "--resume")
    for host in hosts:
        code, said = host.end(time.monotonic() + 300)
        assert code == 0, said
        assert ("resuming from" in said) == (host.rank == 0), "the first rank speaks"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))

    train_on_ranks(2, config_file, f"output_dir={tmp_path / 'whole'}")
    resumed, whole = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(resumed[name].equal(whole[name]) for name in whole)
