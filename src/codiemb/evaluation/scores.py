"""What an evaluation of a task brings, and how its texts are put to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from codiemb.distributed import rank, world_size
from codiemb.encoder.elsewhere import OtherEncoder
from codiemb.encoder.engine import encode_on_all_ranks
from codiemb.encoder.model import instructed, max_length, prompt
from codiemb.encoder.tokens import Text
from codiemb.section import Role
from codiemb.suites.suite import DataSet

Encoder = SentenceTransformer | OtherEncoder
Instructions = Sequence[str | None] | None


@dataclass(frozen=True)
class Scores:
    """Scores of one data set: means (fractions) by metric, and by item in `items` (columns of equal length)."""

    metrics: dict[str, float]
    n: int
    items: dict[str, list[Any]]
    facts: dict[str, Any] = field(default_factory=dict)


class Evaluation(NamedTuple):
    """How a task is evaluated.

    Attributes:
        load: reads a data set, or raises what is wrong with it; the data have a `digest()`, equal for equal content.
        evaluate: scores an encoder on what `load` gave; None but on the first rank.
    """

    load: Callable[[DataSet], Any]
    evaluate: Callable[[Encoder, DataSet, Any, bool], Scores | None]


def role_of(encoder: Encoder, role: Role) -> tuple[str, int | None]:
    """Prompt and length of a role; an object that is no SentenceTransformer sees to them itself."""
    if isinstance(encoder, SentenceTransformer):
        return prompt(encoder, role), max_length(encoder, role)
    return "", None


def texts_of(encoder: Encoder, texts: Sequence[str], role: Role, instructions: Instructions = None) -> list[Text]:
    """The texts in a role; an instruction stands in the place of the role's prompt."""
    before, length = role_of(encoder, role)
    given = instructions or [None] * len(texts)
    return [
        Text(text, instructed(instruction) if instruction else before, length)
        for text, instruction in zip(texts, given, strict=True)
    ]


def embed_all(
    encoder: Encoder, name: str, texts: Sequence[Text], bf16: bool, normalize: bool = True
) -> Float[Tensor, "text dim"]:
    """Embeddings of the texts, on every rank, with a progress bar."""
    with progress(name, set(texts)) as bar:
        return encode_on_all_ranks(encoder, texts, bf16=bf16, normalize=normalize, progress=bar)


def progress(name: str, texts: set[Text]) -> tqdm:
    """Of the first rank's share."""
    own = -(-len(texts) // world_size())
    return tqdm(total=own, desc=f"encode {name}", unit="text", leave=False, disable=rank() > 0)


def digest(parts: Any) -> str:
    """Equal for equal content: of nested lists and dictionaries of texts and numbers."""
    found = blake2b(digest_size=16)

    def take(part: Any) -> None:
        if isinstance(part, dict):
            part = list(part.items())
        if isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for one in part:
                take(one)
        else:
            text = repr(part) if not isinstance(part, str) else part
            content = text.encode("utf-8", "surrogatepass")
            found.update(f"{type(part).__name__}{len(content)}:".encode() + content)

    take(parts)
    return found.hexdigest()
