"""Models through the measures of `codiemb.evaluation.geometry`: by layer and for the final embedding.

A text passes a model once. Of its hidden states only what is measured stays: the measures of its tokens, and of every
layer one vector, pooled as the model pools its last layer. Those are kept for all texts (in a file of no name where
they are large), so measures over all texts and comparisons of models need no second pass, and one model is in memory at
a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from tqdm.auto import tqdm

from codiemb.encoder.engine import pool_layer, room
from codiemb.encoder.location import locate
from codiemb.encoder.model import hidden_states, open_model
from codiemb.encoder.threads import pays, side_by_side
from codiemb.encoder.tokens import Features, Text, tokenize
from codiemb.errors import EvaluationError
from codiemb.evaluation.figure import figure
from codiemb.evaluation.geometry import SPECTRAL, linear_cka, sentence_measures, token_measures
from codiemb.evaluation.texts import Texts, read_texts
from codiemb.figures.markup import clean
from codiemb.files import require_folder, write_json, write_whole

logger = logging.getLogger(__name__)

TOKEN_MEASURES = ("cosine", *SPECTRAL)
_TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class States:
    """What is kept of a model's states.

    Attributes:
        layers: of each layer, from the embeddings on, the pooled vectors of all texts.
        pooled: the final embeddings.
        tokens: by text and layer the `TOKEN_MEASURES`.
    """

    layers: list[Float[Tensor, "text hidden"]]
    pooled: Float[Tensor, "text dim"]
    tokens: Float[Tensor, "text layer measure"]


def analyze(models: Sequence[str | Path], texts: str | Path, out: str | Path) -> dict[str, Any]:
    """The geometry of models on the same texts; writes `<out>/geometry.json` and a
    figure of it, `geometry.svg`, and returns the content.

    Args:
        models: folders, hub ids or `bundled:` names. The others are compared with the first (CKA).
        texts: the file, see `read_texts`. Time grows with its texts, and for uniformity and hubness with their square.
        out: folder, made if missing.

    Raises:
        CodiembError: a model or the texts cannot be read; nothing is written.
    """
    out = Path(out)
    require_folder("--out", out)
    read = read_texts(Path(texts))
    located = [locate(str(model)) for model in models]
    names = [clean(str(model)) for model in models]  # a path may hold what no file in UTF-8 can
    content: dict[str, Any] = {"texts": len(read.entries), "models": [], "cka": {"reference": names[0], "models": []}}
    reference: States | None = None
    for name, path in zip(names, located, strict=True):
        logger.info(f"model {name}")
        states = states_of(open_model(path, dtype=torch.float32), read, name)
        content["models"].append({"model": name, **measured(states, read)})
        if reference is None:
            reference = states
        else:
            content["cka"]["models"].append({"model": name, **likeness(states, reference)})
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "geometry.json", content)
    write_whole(out / "geometry.svg", figure(content))
    return content


@torch.inference_mode()
def states_of(encoder: SentenceTransformer, texts: Texts, name: str) -> States:
    """One pass of all texts through an encoder, in evaluation mode.

    Raises:
        EvaluationError: it has no hidden states, no pooling, or gives nan.
    """
    if not isinstance(encoder[0], Transformer) or not any(isinstance(module, Pooling) for module in encoder):
        raise EvaluationError(
            f"model {name}",
            got=", ".join(type(module).__name__ for module in encoder),
            expected="a Transformer and a Pooling module, whose layers can be looked at",
        )
    encoder.eval()
    asked = [entry.for_encoder(encoder) for entry in texts.entries]
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].text), reverse=True)
    columns: list[Tensor] = []
    with tqdm(total=len(order), desc="analyze", unit="text", leave=False) as bar:
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            places = order[start : start + _TEXTS_AT_ONCE]
            found = _run(encoder, [asked[place] for place in places])
            if not columns:
                columns = [room(len(order), column.flatten(1)).unflatten(1, column.shape[1:]) for column in found]
            for column, part in zip(columns, found, strict=True):
                column[places] = part
            bar.update(len(places))
    pooled, layers, tokens = columns
    if not bool(torch.isfinite(pooled).all() and torch.isfinite(layers).all()):
        raise EvaluationError(f"model {name}", got="states that hold nan or inf", expected="finite ones")
    return States(list(layers.unbind(dim=1)), pooled, tokens)


def _run(encoder: SentenceTransformer, texts: list[Text]) -> list[Tensor]:
    """Final embeddings, pooled layers and token measures of texts, in their order."""
    tokens = tokenize(encoder, texts)
    device = encoder.device
    micro_batches = [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in tokens.micro_batches
    ]

    def run(features: Features) -> tuple[Tensor, ...]:
        output = encoder(dict(features))
        layers, mask = output["all_layer_embeddings"], features["attention_mask"].bool()
        measures = [token_measures(layer, mask) for layer in layers]
        of_tokens = [torch.stack([found[name] for name in TOKEN_MEASURES], dim=-1) for found in measures]
        pooled = [pool_layer(encoder, output, layer) for layer in layers]
        return output["sentence_embedding"].float(), torch.stack(pooled, dim=1).float(), torch.stack(of_tokens, dim=1)

    inside = partial(hidden_states, encoder, True)
    if pays(encoder, micro_batches):
        columns = side_by_side(encoder, run, micro_batches, [0] * len(micro_batches), 0, inside)
    else:
        with inside():
            rows = [run(features) for features in micro_batches]
        columns = tuple(torch.cat(column) for column in zip(*rows, strict=True))
    return [column[tokens.place.to(device)] for column in columns]


def measured(states: States, texts: Texts) -> dict[str, Any]:
    """Every measure by layer and for the final embedding. Those of tokens are means over texts (of the condition number
    the geometric mean), null where no text has two tokens."""
    of_tokens = states.tokens.clone()
    condition = TOKEN_MEASURES.index("condition_number")
    of_tokens[..., condition] = of_tokens[..., condition].log()
    means = of_tokens.nanmean(dim=0)
    means[:, condition] = means[:, condition].exp()
    layers = []
    for number, (vectors, row) in enumerate(zip(states.layers, means.tolist(), strict=True)):
        tokens = {f"token_{name}": _or_none(value) for name, value in zip(TOKEN_MEASURES, row, strict=True)}
        layers.append({"layer": number, **tokens, **_of_texts(vectors.contiguous(), texts)})
    return {"layers": layers, "pooled": _of_texts(states.pooled, texts)}


def _of_texts(vectors: Float[Tensor, "text dim"], texts: Texts) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in sentence_measures(vectors, texts.pairs).items()}


def likeness(states: States, reference: States) -> dict[str, Any]:
    """CKA with the reference: each layer with that at the same share of the depth, and the final embeddings; null
    where all texts have one vector."""
    deepest, deepest_of_reference = len(states.layers) - 1, len(reference.layers) - 1
    layers = []
    for number, vectors in enumerate(states.layers):
        other = round(number * deepest_of_reference / max(deepest, 1))
        cka = linear_cka(vectors, reference.layers[other])
        layers.append({"layer": number, "reference_layer": other, "cka": _or_none(cka)})
    return {"layers": layers, "pooled": _or_none(linear_cka(states.pooled, reference.pooled))}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(content: dict[str, Any]) -> str:
    """Two tables a model, a line a layer: means over the tokens of a text, and measures of the vectors of all texts."""
    parts = []
    for model, found in zip(content["models"], [None, *content["cka"]["models"]], strict=True):
        rows = [*model["layers"], {"layer": "pooled", **model["pooled"]}]
        of_tokens = [{name: row[name] for name in row if name.startswith(("layer", "token"))} for row in rows[:-1]]
        of_texts = [{name: row[name] for name in row if not name.startswith("token")} for row in rows]
        if found is not None:
            likenesses = [*(layer["cka"] for layer in found["layers"]), found["pooled"]]
            of_texts = [{**row, "cka": cka} for row, cka in zip(of_texts, likenesses, strict=True)]
        parts += [f"{model['model']}\n\n{_aligned(of_tokens)}", _aligned(of_texts)]
    return "\n\n".join(parts)


def _aligned(rows: list[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
    return "-" if value is None else str(value)
