"""What the command line takes: the verbs of `cli`, with their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

Verb = Callable[[str, str], argparse.ArgumentParser]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other mistake."""
        self.exit(2, f"error: command line: {message}, see {self.prog} --help\n")


def command_line() -> argparse.ArgumentParser:
    """The parser; what it gives names its verb in `verb`."""
    parser = _Parser(
        prog="codiemb", description="Fine-tune one text-embedding model for retrieval and similarity, and prove it."
    )
    verbs = parser.add_subparsers(title="commands", dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    _runs(verb)
    _evaluations(verb)
    _fusion(verb)
    return parser


def _runs(verb: Verb) -> None:
    """demo, check, train, report."""
    shown = verb(
        "demo",
        "check, train, fuse, evaluate and report on the shipped data with the bundled encoder (minutes, no network)",
    )
    shown.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    shown.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    shown.add_argument("--overwrite", action="store_true", help="remove an earlier run in DIR first")

    checked = verb("check", "resolve a config, read its data and print the plan; trains nothing")
    trained = verb("train", "train as configured, evaluate before and after")
    for added in (checked, trained):
        added.add_argument("config", metavar="CONFIG", help="a YAML file")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    trained.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    trained.add_argument("--overwrite", action="store_true", help="remove an earlier run in output_dir first")

    reported = verb("report", "tell a run on one HTML page, from its files")
    reported.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a training")


def _evaluations(verb: Verb) -> None:
    """evaluate, encode, compare, analyze."""
    evaluated = verb("evaluate", "score models on a suite of data sets")
    evaluated.add_argument("models", nargs="+", metavar="MODEL", help="a folder, a hub id, or bundled:NAME")
    evaluated.add_argument(
        "--suite", required=True, metavar="SUITE", help="a YAML list of data sets, or a ready suite's name"
    )
    evaluated.add_argument("--out", required=True, metavar="DIR", help="where <model>/<dataset>.json are written")
    evaluated.add_argument("--data-root", metavar="DIR", help="folder the suite's paths start from (default: its own)")
    evaluated.add_argument("--bf16", action="store_true", help="encode in bf16: faster, scores move a little")

    encoded = verb("encode", "embed the texts of a file, of any length, in the file's order")
    encoded.add_argument("model", metavar="MODEL", help="a folder, a hub id, or bundled:NAME")
    encoded.add_argument("--input", required=True, metavar="FILE", help="JSONL, Parquet, CSV; else a text a line")
    encoded.add_argument("--output", required=True, metavar="FILE", help="a .parquet or .npy file")
    encoded.add_argument(
        "--column", nargs="+", default=["text"], help="column(s) of the text, joined by a space (default: text)"
    )
    encoded.add_argument(
        "--role",
        choices=["query", "document", "similarity"],
        default="document",
        help="whose prompt and length are used (default: %(default)s)",
    )
    encoded.add_argument("--bf16", action="store_true", help="encode in bf16: faster, embeddings move a little")

    compared = verb("compare", "tell whether models differ by more than chance, from their evaluations")
    compared.add_argument(
        "evaluations",
        nargs="+",
        metavar="EVAL",
        help="a folder of <dataset>.json, the reference first; or a quoted pattern of folders, one a seed",
    )
    compared.add_argument("--json", metavar="FILE", help="write the comparison there too")
    forms = ["table", "markdown", "latex"]
    compared.add_argument("--format", choices=forms, default="table", help="of the printed table (default: table)")

    analyzed = verb("analyze", "measure how models fill their embedding space, by layer, and how alike they are")
    analyzed.add_argument(
        "models", nargs="+", metavar="MODEL", help="as for evaluate; others are set against the first"
    )
    texts = "texts: one a line (.txt), or JSONL of objects with `text` or of unified records (query, positives)"
    analyzed.add_argument("--texts", required=True, metavar="FILE", help=texts)
    analyzed.add_argument(
        "--out", required=True, metavar="DIR", help="where geometry.json and geometry.svg are written"
    )


def _fusion(verb: Verb) -> None:
    fused = verb("fuse", "merge checkpoints into one model")
    fused.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a model folder; at least two")
    fused.add_argument("--base", required=True, help="the folder (or bundled:NAME) that they were trained from")
    fused.add_argument("--out", required=True, metavar="DIR", help="the new model folder")
    for name, help in (
        (
            "--method",
            "delta (default), uniform, weighted, slerp, task_arithmetic, ties, dare, dare_ties, sce, model_stock; "
            "greedy is --search greedy",
        ),
        ("--granularity", "of delta: model, tensor (default), row, element"),
        ("--norm", "of delta: l1, l2 (default), mean_square"),
        ("--weighting", "of delta: proportional (default), inverse, softmax"),
    ):
        fused.add_argument(name, help=help)
    fused.add_argument("--temperature", type=float, help="of softmax (default: 1)")
    fused.add_argument("--scale", type=float, help="0 is the base, 1 (default) the merged weights")
    fused.add_argument("--weights", type=float, nargs="+", metavar="W", help="of weighted: one a checkpoint")
    fused.add_argument("--by-run", action="store_true", help="of delta: weights within each run, then across runs")
    fused.add_argument("--parameters", nargs="+", metavar="NAME=NUMBER", help="of mergekit's methods, as it names them")
    fused.add_argument("--force", action="store_true", help="merge checkpoints of other prompts, pooling or tokenizer")
    fused.add_argument("--suite", metavar="SUITE", help="a dev suite: scores the checkpoints and what is fused")
    fused.add_argument("--data-root", metavar="DIR", help="folder the suite's paths start from (default: its own)")
    ways = fused.add_mutually_exclusive_group()
    ways.add_argument("--search", choices=["greedy", "grid", "layers"], help="choose what scores best on --suite")
    fused.add_argument("--trials", type=int, metavar="N", help="of --search layers (default: 50)")
    ways.add_argument("--pareto", action="store_true", help="the way from one checkpoint to another, scored on --suite")
    ways.add_argument("--inspect", action="store_true", help="how far each moved, and where they pull apart")
