"""The command line: help at once, exit codes, one line for every mistake; and which module may import which."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import codiemb
from codiemb import cli
from codiemb.errors import ConfigError, Stopped

SRC = Path(codiemb.__file__).parent
HEAVY = ("torch", "transformers", "sentence_transformers", "datasets", "pyarrow", "scipy")
LIGHT = {
    "help": "import runpy, sys; sys.argv = ['codiemb', '--help']\n"
    "try: runpy.run_module('codiemb', run_name='__main__')\nexcept SystemExit as stop: assert stop.code == 0",
    "codiemb": "import codiemb; assert codiemb.__version__",
    "config": "import codiemb.config",
    "errors": "import codiemb.errors",
    "cli": "import codiemb.cli",
    "fusion": "import codiemb.fusion.fuse, codiemb.fusion.inspect",
}


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after `code`."""
    ask = f"{code}\nimport sys; print('loaded', *(name for name in {HEAVY!r} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SRC.parent)}
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=environment)
    return set(shown.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("case", LIGHT)
def test_nothing_heavy_is_imported(case):
    assert loaded_by(LIGHT[case]) == set()


def test_the_test_above_can_fail():
    assert "pyarrow" in loaded_by("import codiemb.data.store")


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def imports_of_folder(name: str) -> set[str]:
    files = sorted((SRC / name).rglob("*.py"))
    assert files
    return set().union(*(imports_of(file) for file in files))


def of_ours(imports: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in imports if name.split(".")[0] == "codiemb"}


def test_losses_know_no_model_no_config_no_data():
    assert of_ours(imports_of_folder("losses")) <= {"codiemb.losses"}


def test_arrows_go_one_way():
    order = ["data", "batching", "encoder", "losses", "training", "integrations"]
    allowed = {"batching": {"codiemb.encoder"}}  # the loader tokenises
    for place, stage in enumerate(order):
        later = {f"codiemb.{name}" for name in order[place + 1 :]}
        assert of_ours(imports_of_folder(stage)) & later <= allowed.get(stage, set()), stage


def test_evaluation_knows_no_training():
    assert not of_ours(imports_of_folder("evaluation")) & {"codiemb.training", "codiemb.losses", "codiemb.batching"}


def test_the_report_reads_files_and_nothing_else():
    """What it shows was computed by others: it has nothing of them but their files."""
    imports = imports_of_folder("report")
    assert of_ours(imports) <= {"codiemb.report", "codiemb.figures", "codiemb.errors", "codiemb.files", "codiemb.tasks"}
    assert of_ours(imports_of_folder("figures")) == {"codiemb.figures"}
    assert not {name.split(".")[0] for name in imports} & {*HEAVY} - {"pyarrow"}


def test_only_one_file_calls_torch_distributed():
    users = [
        file.relative_to(SRC).as_posix()
        for file in sorted(SRC.rglob("*.py"))
        if any(name.startswith("torch.distributed") for name in imports_of(file))
        or "torch.distributed." in file.read_text(encoding="utf-8")
    ]
    assert users == ["distributed.py"]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["train"], "CONFIG"),
        (["check", "config.yaml", "--overwrite"], "--overwrite"),
        (["evaluate", "model", "--out", "x"], "--suite"),
        (["analyze", "model", "--out", "x"], "--texts"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, arguments, words):
    shown = refused(capsys, *arguments)
    assert words in shown
    assert "--help" in shown


def test_a_mistake_ends_with_2_and_one_line(capsys):
    shown = refused(capsys, "check", "no-such-file.yaml")
    assert shown == "error: file no-such-file.yaml: got nothing there, expected a YAML file, check the path\n"


def test_debug_raises(capsys):
    with pytest.raises(ConfigError):
        cli.main(["check", "no-such-file.yaml", "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (Stopped(signal.SIGINT, "go on with --resume"), 130, "\nstopped by SIGINT: go on with --resume\n"),
        (Stopped(signal.SIGTERM, "go on with --resume"), 143, "\nstopped by SIGTERM: go on with --resume\n"),
    ],
)
def test_signals_end_with_the_codes_of_a_shell(capsys, monkeypatch, error, code, shown):
    def interrupted(*_):
        raise error

    monkeypatch.setattr("codiemb.config.load_config", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "config.yaml"])
    assert stop.value.code == code
    assert capsys.readouterr().err == shown


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    """It keeps its traceback, and Python exits with 1."""

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("codiemb.config.load_config", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["check", "config.yaml"])


@pytest.mark.parametrize("path", ["a" * 300, "\udcff" * 300])
def test_what_the_system_refuses_is_one_line(path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", path])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_writes_nothing_but_the_cache(tmp_path, monkeypatch, capsys):
    from codiemb.training import run

    (tmp_path / "config.yaml").write_text(
        "output_dir: run\nmodel: {base: m}\ndata: [{name: a, task: retrieval, path: a.jsonl}]\n"
    )
    monkeypatch.chdir(tmp_path)

    class Prepared:
        class report:
            @staticmethod
            def text():
                return "the plan"

    monkeypatch.setattr(run, "prepare", lambda config, device=None: Prepared)
    cli.main(["check", "config.yaml"])
    assert capsys.readouterr().out == "the plan\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
