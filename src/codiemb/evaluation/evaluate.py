"""One model on one suite, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from codiemb.config import Source, Train
from codiemb.distributed import start
from codiemb.encoder.location import locate
from codiemb.encoder.model import open_model
from codiemb.errors import EvaluationError
from codiemb.evaluation.scores import Encoder
from codiemb.evaluation.suite import Results, evaluate_suite, require_readable
from codiemb.suites.suite import load_suite


def evaluate(
    model: str | Path | Encoder, suite: str | Path | Sequence[Source], out: str | Path | None = None
) -> Results:
    """Metrics by data set, as fractions; under torchrun every rank calls in, and all get them.

    Args:
        model: a folder, a hub id, `bundled:NAME`, a SentenceTransformer (its prompts and lengths are used), or any
            object whose `encode` takes a list of texts and gives an array [text, dim].
        suite: a YAML file, the name of a ready suite, or the data sets of `load_suite`.
        out: folder for `<dataset>.json` and its per-item scores; None: nothing is written there.

    Raises:
        CodiembError: a mistake in the suite, its data or the model.
    """
    start(Train().ddp_timeout)
    sources = load_suite(suite) if isinstance(suite, str | Path) else list(suite)
    if not isinstance(model, str | Path) and not callable(getattr(model, "encode", None)):
        raise EvaluationError("model", got=f"a {type(model).__name__}", expected="an object with `encode`")
    require_readable(sources)
    encoder = open_model(locate(str(model)), dtype=torch.float32) if isinstance(model, str | Path) else model
    return evaluate_suite(encoder, sources, Path(out) if out is not None else None)
