"""The command line: thin verbs over the library. Heavy imports happen inside them, so `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from codiemb.arguments import command_line
from codiemb.encoder.allocator import keep_memory
from codiemb.errors import CodiembError, ConfigError, DistributedError, EvaluationError, Stopped
from codiemb.files import require_folder

Run = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb. Exits 0 on success, 2 with one line on a user's mistake, 130 on Ctrl-C, 143 on SIGTERM."""
    # Threads of torch that wait should sleep: one busy neighbour makes spinning ones many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parsed = command_line().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    ours = logging.getLogger("codiemb")
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    ours.propagate = False
    ours.handlers = [logging.StreamHandler(sys.stdout)]
    try:
        VERBS[parsed.verb](parsed)
    except (CodiembError, OSError) as error:  # of the system: no right, no room, a name too long
        if parsed.debug:
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"error: {first if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        name = signal.Signals(stop.signal).name
        print(f"\nstopped by {name}: {stop.message}", file=sys.stderr)
        sys.exit(128 + stop.signal)  # as a shell says it, and schedulers read it
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _alone(run: Run) -> Run:
    """A verb of one process; those of torchrun would write the same files."""

    @wraps(run)
    def checked(arguments: argparse.Namespace) -> None:
        if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
            from codiemb.distributed import untold

            if not untold():
                raise DistributedError(
                    run.__name__, got=f"WORLD_SIZE={ranks}", expected="one process", fix="start it without torchrun"
                )
        run(arguments)

    return checked


def demo(arguments: argparse.Namespace) -> None:
    from codiemb.demo import CONFIG

    arguments.config, arguments.overrides = CONFIG, [f"output_dir={json.dumps(arguments.out)}"]
    train(arguments)


@_alone
def check(arguments: argparse.Namespace) -> None:
    from codiemb.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _ready_for_models()
    from codiemb.training.run import prepare

    print(prepare(config, device="cpu").report.text())


def train(arguments: argparse.Namespace) -> None:
    from codiemb.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _ready_for_models()
    from codiemb import distributed
    from codiemb.training import run
    from codiemb.training.results import results_table

    full = "set train.memory_budget to fewer GB, or free the GPU of other processes, then go on with --resume"
    with distributed.told_of_lost_ranks(), distributed.told_of_full_gpu(full):
        result = run.train(config, resume=arguments.resume, overwrite=arguments.overwrite)
        if distributed.rank() == 0:
            print(f"\n{results_table(result)}\n" if result.suite else "")
            print(f"model {result.model}")
        distributed.finish()


def evaluate(arguments: argparse.Namespace) -> None:
    from codiemb.suites.suite import load_suite

    suite = load_suite(arguments.suite, arguments.data_root)
    names = [Path(model.removeprefix("bundled:")).resolve().name for model in arguments.models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(
            "models",
            got=f"the folder name {twice[0]!r} twice",
            expected="different names, because the results of each are written under its name",
            fix="evaluate them into different --out folders",
        )
    require_folder("--out", Path(arguments.out))
    _ready_for_models()
    import torch

    from codiemb.encoder.location import locate
    from codiemb.encoder.model import open_model
    from codiemb.evaluation.suite import evaluate_suite, require_readable

    located = [locate(model) for model in arguments.models]
    require_readable(suite)
    with _on_all_ranks() as say:
        for name, model in zip(names, located, strict=True):
            say(f"model {model}")
            encoder = open_model(model, dtype=torch.float32)
            evaluate_suite(encoder, suite, Path(arguments.out) / name, bf16=arguments.bf16)
        say(f"results in {arguments.out}")


def encode(arguments: argparse.Namespace) -> None:
    from codiemb.encoder.location import locate

    model, input, output = locate(arguments.model), Path(arguments.input), Path(arguments.output)
    _ready_for_models()
    import torch

    from codiemb.distributed import on_first
    from codiemb.encoder.encode_file import encode_file, require_output
    from codiemb.encoder.model import open_model

    with _on_all_ranks() as say:
        on_first(lambda: require_output(output, input))
        encoder = open_model(model, dtype=torch.float32)
        count = encode_file(encoder, input, output, columns=arguments.column, role=arguments.role, bf16=arguments.bf16)
        say(f"{count} embeddings of {encoder.get_embedding_dimension()} dimensions in {output}")


@_alone
def compare(arguments: argparse.Namespace) -> None:
    from codiemb.evaluation.comparison import compare, write_comparison
    from codiemb.evaluation.scored import models_of
    from codiemb.evaluation.tables import comparison_text

    if len(arguments.evaluations) < 2:
        raise EvaluationError("compare", got="one evaluation", expected="the reference and at least one more")
    if arguments.json:
        if Path(arguments.json).exists() and not Path(arguments.json).is_file():
            raise ConfigError(f"--json {arguments.json}", got="a folder or device", expected="a file to write")
        require_folder("--json", Path(arguments.json).parent)
    found = compare(models_of(arguments.evaluations))
    if arguments.json:
        write_comparison(Path(arguments.json), found)
    print(comparison_text(found, arguments.format))


@_alone
def fuse(arguments: argparse.Namespace) -> None:
    from codiemb.encoder.location import folder_of

    checkpoints = [folder_of(checkpoint) for checkpoint in arguments.checkpoints]
    base, out = folder_of(arguments.base), Path(arguments.out)
    if arguments.method == "greedy":
        if way := next((way for way in ("search", "pareto", "inspect") if getattr(arguments, way)), None):
            raise ConfigError(f"--{way}", got="given", expected="none with --method greedy, which is a search")
        arguments.method, arguments.search = None, "greedy"
    names = ("method", "granularity", "norm", "weighting", "temperature", "scale", "weights", "by_run")
    given = {name: getattr(arguments, name) for name in names}
    settings = {name: value for name, value in given.items() if value is not None and value is not False}
    settings |= {"parameters": dict(map(_parameter, arguments.parameters))} if arguments.parameters else {}
    if settings and (arguments.pareto or arguments.inspect):
        option = f"--{next(iter(settings)).replace('_', '-')}"
        raise ConfigError(option, got="a setting of a fusion", expected="none with this option")
    if arguments.inspect and arguments.suite:
        raise ConfigError("--suite", got=arguments.suite, expected="none with --inspect, which scores nothing")
    if arguments.inspect and arguments.force:
        raise ConfigError("--force", got="given", expected="none with --inspect, which merges nothing")
    if arguments.data_root and not arguments.suite:
        raise ConfigError("--data-root", got=arguments.data_root, expected="none without --suite")
    if arguments.trials is not None and arguments.search != "layers":
        raise ConfigError("--trials", got=arguments.trials, expected="none without --search layers")
    if arguments.inspect:
        from codiemb.fusion.inspect import inspect

        print(inspect(checkpoints, base, out))
    elif arguments.suite or arguments.search or arguments.pareto:
        _search(arguments, checkpoints, base, out, settings)
    else:
        from codiemb.fusion.fuse import fuse

        result = fuse(checkpoints, base, out, **settings, force=arguments.force)
        print(f"model {result.path}, {result.facts['delta_length']:.4g} from the base (l2)")


@_alone
def analyze(arguments: argparse.Namespace) -> None:
    _ready_for_models()
    from codiemb.evaluation import analysis

    print(analysis.table(analysis.analyze(arguments.models, arguments.texts, arguments.out)))
    print(f"\nresults in {Path(arguments.out) / 'geometry.json'}")


def _search(
    arguments: argparse.Namespace, checkpoints: list[Path], base: Path, out: Path, settings: dict[str, Any]
) -> None:
    """Fusions scored on a dev suite."""
    from codiemb.suites.suite import load_suite

    if not arguments.suite:
        raise ConfigError("--suite", got="none", expected="a dev suite to choose on, with --search and --pareto")
    suite = load_suite(arguments.suite, arguments.data_root)
    _ready_for_models()
    from codiemb.evaluation.suite import require_readable, scores_of
    from codiemb.fusion import search

    require_readable(suite)
    trials = search.Search(checkpoints, base, out, lambda folder: scores_of(folder, suite), arguments.force)
    if arguments.pareto:
        print(search.pareto(trials, sorted({source.task for source in suite})))
    else:
        print(search.best(trials, arguments.search, settings, 50 if arguments.trials is None else arguments.trials))


@_alone
def report(arguments: argparse.Namespace) -> None:
    from codiemb.report.page import write_report

    print(f"report {write_report(Path(arguments.run_dir))}")


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--parameters {text}", got=repr(value), expected="name=number") from None


def _ready_for_models() -> None:
    """Freed memory is kept, and the libraries' own notes and bars are not part of our output."""
    keep_memory()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def _on_all_ranks() -> Iterator[Callable[[str], None]]:
    """Inside, the ranks that torchrun started are joined; gives what prints on the first."""
    from codiemb import distributed
    from codiemb.config import Train

    timeout = Train().ddp_timeout
    lost = "look for the first error on the other machines, then start all of them again"
    full = "free the GPU of other processes, or use processors with CUDA_VISIBLE_DEVICES="
    with distributed.told_of_lost_ranks(f"{timeout} s", lost), distributed.told_of_full_gpu(full):
        distributed.start(timeout)
        yield logging.getLogger("codiemb").info
        distributed.finish()


VERBS = {verb.__name__: verb for verb in (demo, check, train, evaluate, encode, compare, fuse, analyze, report)}
