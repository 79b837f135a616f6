"""Models that tokenise for themselves: any object with `encode`, and a SentenceTransformer that is no Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from torch import Tensor

from codiemb.encoder.tokens import Text
from codiemb.errors import EvaluationError, short


class OtherEncoder(Protocol):
    def encode(self, texts: list[str], /) -> Any:
        """Embeddings [text, dim], as an array or a tensor."""


def embed_elsewhere(encoder: SentenceTransformer | OtherEncoder, texts: Sequence[Text]) -> Float[Tensor, "text dim"]:
    """What the encoder's own `encode` gives for the texts, each with its prompt before it; float32.

    Raises:
        EvaluationError: it gives something else than a row of numbers for each text.
    """
    whole = [text.prompt + text.text for text in texts]
    # Without the empty prompt, a default prompt of the model would come before ours.
    given: dict[str, Any] = (
        {"prompt": "", "show_progress_bar": False} if isinstance(encoder, SentenceTransformer) else {}
    )
    found: Any = encoder.encode(whole, **given)
    try:
        rows = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.array(found, dtype=np.float32))
    except (TypeError, ValueError):
        raise EvaluationError("encode", got=short(found), expected="an array [text, dim] of numbers") from None
    if rows.ndim != 2 or len(rows) != len(whole):
        raise EvaluationError(
            "encode", got=f"an array {list(rows.shape)} for {len(whole)} texts", expected=f"[{len(whole)}, dim]"
        )
    return rows.float()
