"""Many texts through the encoder: micro-batches in, embeddings in the order asked for out.

`codiemb.encoder.tokens` makes the micro-batches, `embed` runs them, on a processor side by side
(`codiemb.encoder.threads`). Both training and evaluation go this way.

Cached gradients (GradCache, Gao et al., 2021): a loss needs all embeddings of a step at once, but the activations of a
micro-batch only while the gradient passes through it. So `embed` can run micro-batches that keep nothing but their
input, and run them again, with the same dropout, when the backward pass comes to them. It comes to the last one first
and leaves it before it enters the one before. To autograd, and so to DDP, it is one forward and one backward pass.

`encode` is for one process. Under torchrun, `encode_share` and `encode_on_all_ranks` are called by every rank with the
same texts, and each encodes its share.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from codiemb.distributed import joined, rank, world_size
from codiemb.encoder.elsewhere import OtherEncoder, embed_elsewhere
from codiemb.encoder.gpu import packs
from codiemb.encoder.model import hidden_states, require_one_way
from codiemb.encoder.threads import pays, side_by_side
from codiemb.encoder.tokens import PIECE, Features, Text, tokenize
from codiemb.errors import EvaluationError
from codiemb.files import told_of_full_disk

_LARGEST_IN_MEMORY = 2**30  # bytes of embeddings


class Embeddings(NamedTuple):
    """Embeddings of the texts asked for; `middle` is the pooled hidden state of the middle layer, or None."""

    final: Float[Tensor, "text dim"]
    middle: Float[Tensor, "text hidden"] | None


def embed(
    encoder: SentenceTransformer,
    micro_batches: list[Features],
    place: Tensor,
    middle: bool = False,
    recomputed: int = 0,
) -> Embeddings:
    """Embeddings of tokenised texts, in the order asked for, float32; with gradient where it is enabled.

    Args:
        middle: also pool hidden_states[len // 2] of the same forward pass.
        recomputed: so many micro-batches, from the first, keep no activations and run again in the backward pass. The
            gradients are the same to the last bit.
    """

    def run(features: Features) -> tuple[Tensor, ...]:
        output = encoder(dict(features))
        final = output["sentence_embedding"].float()
        return (final, pool_middle(encoder, output).float()) if middle else (final,)

    # Dropout of a micro-batch does not depend on what runs beside it. Evaluation draws nothing.
    seeds = torch.randint(2**62, (len(micro_batches),)).tolist() if encoder.training else [0] * len(micro_batches)
    inside = partial(hidden_states, encoder, middle)
    if pays(encoder, micro_batches):
        columns = side_by_side(encoder, run, micro_batches, seeds, recomputed, inside)
    else:

        def alone(seed: int, features: Features) -> tuple[Tensor, ...]:
            with inside(), torch.random.fork_rng(devices=[]):
                # torch's own generator, because layers that run again (gradient checkpointing) replay that.
                torch.default_generator.manual_seed(seed)
                return run(features)

        rows = []
        # Without early stop: no exception passes through the model's hooks, and after pooling nothing is to be saved.
        with set_checkpoint_early_stop(False):
            for number, one in enumerate(zip(seeds, micro_batches, strict=True)):
                rows.append(checkpoint(alone, *one, use_reentrant=False) if number < recomputed else alone(*one))
        columns = tuple(torch.cat(column) for column in zip(*rows, strict=True))
    final, *others = (column[place] for column in columns)
    return Embeddings(final, others[0] if middle else None)


@torch.inference_mode()
def encode(
    encoder: SentenceTransformer | OtherEncoder,
    texts: Sequence[Text],
    *,
    bf16: bool = False,
    normalize: bool = True,
    progress: Any = None,
) -> Float[Tensor, "text dim"]:
    """L2-normalised embeddings of `texts` on the encoder's device, without gradient or dropout.

    On processors, more than 1 GB of them are in a file without a name, mapped into memory; it goes when they go.

    Args:
        encoder: one that tokenises for itself (`codiemb.encoder.elsewhere`) knows no `bf16`.
        normalize: false: of the length that the model gives them.
    """
    require_one_way(encoder)
    if not (isinstance(encoder, SentenceTransformer) and isinstance(encoder[0], Transformer)):
        return _placed(texts, partial(embed_elsewhere, encoder), normalize, progress)
    was_training = encoder.training
    encoder.eval()
    device = encoder.device

    def embed_piece(piece: Sequence[Text]) -> Tensor:
        tokens = tokenize(encoder, piece, packed=packs(encoder, bf16))
        moved = [{key: _to(value, device) for key, value in batch.items()} for batch in tokens.micro_batches]
        return embed(encoder, moved, tokens.place.to(device)).final[:, : encoder.truncate_dim]

    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        embeddings = _placed(texts, embed_piece, normalize, progress)
    encoder.train(was_training)
    return embeddings


def _placed(
    texts: Sequence[Text], embed_piece: Callable[[Sequence[Text]], Tensor], normalize: bool, progress: Any
) -> Float[Tensor, "text dim"]:
    """The embedding of each text at its place; each distinct one is made once, in pieces from the longest down."""
    places: dict[Text, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    distinct = sorted(places, key=lambda text: len(text.text), reverse=True)
    embeddings = torch.empty(0)
    for start in range(0, len(distinct), PIECE):
        piece = distinct[start : start + PIECE]
        found = embed_piece(piece)
        if normalize:
            found = torch.nn.functional.normalize(found, dim=-1)
        if not bool(torch.isfinite(found).all()):
            raise EvaluationError(
                "embeddings", got="nan or inf", expected="finite numbers", fix="the weights are damaged"
            )
        if not start:
            embeddings = room(len(texts), found)
        counts = torch.tensor([len(places[text]) for text in piece], device=found.device)
        embeddings[list(chain(*(places[text] for text in piece)))] = found.repeat_interleave(counts, dim=0)
        if progress is not None:
            progress.update(len(piece))
    return embeddings


def room(rows: int, like: Float[Tensor, "row dim"]) -> Float[Tensor, "text dim"]:
    """Room for embeddings, in a file where it is large."""
    size = (rows, like.shape[1])
    if like.device.type != "cpu" or rows * like.shape[1] * like.element_size() <= _LARGEST_IN_MEMORY:
        return like.new_empty(size)
    folder = Path(tempfile.gettempdir())
    with told_of_full_disk(folder, "free some disk or set TMPDIR"), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a disk that fills kills the process at the first page without room
            os.posix_fallocate(file.fileno(), 0, math.prod(size) * like.element_size())
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=size))


def shares(texts: Sequence[Text], ranks: int) -> list[list[int]]:
    """By rank, the places of the texts it encodes, ascending; equal texts are with one rank.

    Dealt in turn from the longest down, so that all ranks finish at about the same time. With more ranks than distinct
    texts, some get none.
    """
    distinct = sorted(dict.fromkeys(texts), key=lambda text: len(text.text), reverse=True)
    owner = {text: number % ranks for number, text in enumerate(distinct)}
    places: list[list[int]] = [[] for _ in range(ranks)]
    for place, text in enumerate(texts):
        places[owner[text]].append(place)
    return places


def encode_share(
    encoder: SentenceTransformer | OtherEncoder, texts: Sequence[Text], **settings: Any
) -> tuple[Float[Tensor, "own dim"], list[list[int]]]:
    """The embeddings of this rank's share of `texts`, and `shares`; `settings` are those of `encode`."""
    places = shares(texts, world_size())
    own = [texts[place] for place in places[rank()]]
    # A rank without texts encodes one, so that its share of no rows has the width of the others.
    return encode(encoder, own or texts[:1], **settings)[: len(own)], places


def encode_on_all_ranks(
    encoder: SentenceTransformer | OtherEncoder, texts: Sequence[Text], **settings: Any
) -> Float[Tensor, "text dim"]:
    """What `encode` gives, on every rank; each has encoded its share."""
    own, places = encode_share(encoder, texts, **settings)
    rows = joined(own)[0]
    embeddings = torch.empty_like(rows)
    embeddings[torch.tensor(list(chain(*places)), device=rows.device)] = rows
    return embeddings


def pool_middle(encoder: SentenceTransformer, output: Features) -> Float[Tensor, "text hidden"]:
    """The pooled middle layer, from the output of a forward pass inside `hidden_states`."""
    layers = output["all_layer_embeddings"]
    return pool_layer(encoder, output, layers[len(layers) // 2])


def pool_layer(
    encoder: SentenceTransformer, output: Features, layer: Float[Tensor, "text token hidden"]
) -> Float[Tensor, "text hidden"]:
    """A layer pooled as the encoder pools its last one."""
    for module in encoder:
        if isinstance(module, Pooling):
            return module({**output, "token_embeddings": layer})["sentence_embedding"]
    raise TypeError("the encoder has no Pooling module, so a layer cannot be pooled")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
