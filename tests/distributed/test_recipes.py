"""The scripts and commands for clusters: they parse, and what they call exists.

The programs of the cluster are replaced by small ones, so that the scripts run here to the torchrun they start.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from codiemb.arguments import command_line
from codiemb.config import load_config
from codiemb.training.run_folder import FINISHED

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "recipes" / "cluster"
PROGRAMS = {
    "torchrun": 'printf "%s\\0" "$@" >> "$CALLS"; printf "\\0" >> "$CALLS"',
    "scontrol": '[ "$*" = \'show hostnames node[7-8]\' ] && printf \'node7\\nnode8\\n\' || echo "$*" >> "$CALLS"',
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift; for n in 0 1; do SLURM_NODEID=$n "$@" || exit; done',
}


@pytest.fixture
def cluster(tmp_path):
    """Runs a script among the programs above; the commands that torchrun got."""
    write_programs(tmp_path, PROGRAMS)

    def run(*command, **environment):
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        subprocess.run(command, check=True, env={"PATH": path, "CALLS": str(tmp_path / "calls"), **environment})
        calls = (tmp_path / "calls").read_text().removesuffix("\0\0")
        return [call.split("\0") for call in calls.split("\0\0")] if calls else []

    return run


def write_programs(folder, programs):
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


def parsed(command):
    """The torchrun and the codiemb command line; each is refused here if a flag, a verb or a setting is not known."""
    torchrun = get_args_parser().parse_args(command)
    assert torchrun.module
    assert torchrun.training_script == "codiemb"
    ours = command_line().parse_args(torchrun.training_script_args)
    for override in getattr(ours, "overrides", []):
        load_config(ROOT / "recipes" / "joint.yaml", [override])
    return torchrun, ours


def manifest():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return service, job, job["spec"]["template"]["spec"]


def run_slurm(cluster, out):
    names = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    return cluster("bash", str(CLUSTER / "slurm.sh"), "joint.yaml", str(out), **names)


def run_kubernetes(cluster, out):
    container = manifest()[2]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]} | {"OUTPUT_DIR": str(out)}
    calls = []
    for index in ("0", "1"):
        calls += cluster(*container["command"], *container["args"], **environment, JOB_COMPLETION_INDEX=index)
    return calls


SCRIPTS = {"slurm": (run_slurm, "node7"), "kubernetes": (run_kubernetes, "codiemb-0.codiemb")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_one_torchrun_a_machine(name, cluster, tmp_path):
    run, first = SCRIPTS[name]
    calls = [parsed(call) for call in run(cluster, tmp_path / "a run")]
    assert [torchrun.node_rank for torchrun, _ in calls] == [0, 1]
    for torchrun, ours in calls:
        assert (torchrun.nnodes, torchrun.nproc_per_node) == ("2", "gpu")
        assert (torchrun.master_addr, torchrun.master_port) == (first, 29500)
        assert (ours.verb, ours.resume) == ("train", False)
        assert load_config(ROOT / "recipes" / "joint.yaml", ours.overrides).output_dir == str(tmp_path / "a run")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_resumes_where_there_is_a_checkpoint(name, cluster, tmp_path):
    (tmp_path / "run" / "checkpoint-200").mkdir(parents=True)
    calls = [parsed(call) for call in SCRIPTS[name][0](cluster, tmp_path / "run")]
    assert [ours.resume for _, ours in calls] == [True, True]


STEP = """[ "$1" = --kill-on-bad-exit=1 ] && shift
"$@" &
trap 'kill -9 $!; exit 137' TERM
wait $!"""
TORCHRUN = """trap '%s >> "$CALLS"; exit 1' TERM
echo $$ > "$CALLS.task"
for tenth in $(seq 300); do sleep 0.1; done"""
WRITES = "echo a checkpoint"
ENDS = 'mkdir -p "$OUTPUT_DIR" && touch "$OUTPUT_DIR/.finished" && echo the report'


@pytest.fixture
def slurm_job(tmp_path):
    """Runs the script as a job until its torchrun has started, and sends it a signal; its exit code and the calls.

    The programs do as those of SLURM: srun kills its tasks when it gets SIGTERM, scancel signals the tasks alone.
    """

    def run(number, at_sigterm):
        scancel = 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$CALLS.task")"'
        programs = {"srun": STEP, "torchrun": TORCHRUN % at_sigterm, "scancel": scancel}
        write_programs(tmp_path, PROGRAMS | programs)
        calls = tmp_path / "calls"
        names = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "31"}
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), **names}
        script = ["bash", str(CLUSTER / "slurm.sh"), "joint.yaml", str(tmp_path / "run")]
        with subprocess.Popen(script, env=environment, start_new_session=True) as job:
            try:
                wait_for(tmp_path / "calls.task")
                job.send_signal(number)
                code = job.wait(20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
        return code, calls.read_text().splitlines() if calls.exists() else []

    return run


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_slurm_stops_the_run_before_its_time_is_over_and_queues_it_again(slurm_job):
    _, calls = slurm_job(signal.SIGUSR1, WRITES)
    assert calls == ["scancel --signal=TERM 31", "a checkpoint", "requeue 31"]


def test_slurm_does_not_queue_a_finished_run_again(slurm_job):
    _, calls = slurm_job(signal.SIGUSR1, ENDS)
    assert calls == ["scancel --signal=TERM 31", "the report"]


def test_slurm_does_not_queue_a_cancelled_job_again(slurm_job):
    assert slurm_job(signal.SIGTERM, WRITES) == (-signal.SIGTERM, [])


def test_slurm_sends_the_script_the_signal_that_it_takes():
    script = (CLUSTER / "slurm.sh").read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@300\b", script, re.MULTILINE)
    assert re.search(r"^trap .* USR1$", script, re.MULTILINE)


@pytest.mark.parametrize("left", [["model", "checkpoint-8", FINISHED], ["model"]])
def test_a_pod_that_comes_back_after_the_end_has_nothing_to_do(cluster, tmp_path, left):
    """Nor where a run that keeps no checkpoints has ended its training: there is nothing to go on from."""
    for name in left:
        (tmp_path / "run" / name).mkdir(parents=True)
    assert run_kubernetes(cluster, tmp_path / "run") == []


def test_a_pod_goes_on_with_a_run_that_was_ended_in_its_merges(cluster, tmp_path):
    for name in ("model", "checkpoint-8"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert [parsed(call)[1].resume for call in run_kubernetes(cluster, tmp_path / "run")] == [True, True]


def test_the_manifest_is_consistent():
    service, job, pod = manifest()
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None", "headless"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert job["spec"]["podFailurePolicy"] == {"rules": [evicted]}
    assert pod["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    container = pod["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(environment[name].startswith(paths[0]) for name in ("CONFIG", "OUTPUT_DIR", "CODIEMB_CACHE"))
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_commands_of_the_page_exist():
    page = (ROOT / "docs" / "distributed.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(torchrun .*)$", page, re.MULTILINE)]
    verbs = [parsed(command)[1].verb for command in commands]
    assert verbs.count("train") >= 3
    assert "evaluate" in verbs


@pytest.mark.parametrize("wrong", ["--nodes 2 -m codiemb train c.yaml", "-m codiemb trian c.yaml"])
def test_the_check_of_commands_can_fail(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(shlex.split(wrong))
    assert "error" in capsys.readouterr().err
