"""CoDiEmb's losses and batches for people who keep their own `SentenceTransformerTrainer` script.

    multi_dataset_batch_sampler=partial(SameDatasetBatchSampler, batch_sizes={"search": 64, "pairs": 32})
    loss={"search": InfoNCE(model), "pairs": CoDiEmbSimilarity(model)}

A loss that looks at the other devices waits for all of them. The samplers of sentence-transformers draw data sets batch
by batch and hand consecutive batches to consecutive devices, so one device may wait for the others in a loss that they
are not computing, for ever. Here every step holds rows of one data set on all devices: the sampler cuts the global
batches of `Plan` into one slice for each device, and yields the slices of a step one after the other.

Each device then encodes its own rows, receives the rest without gradient, and computes the loss of the global batch;
with DDP's mean, any number of devices gives the gradient of one that holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float, Int
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from codiemb.distributed import joined, scale_gradient, world_size
from codiemb.encoder.engine import pool_middle
from codiemb.encoder.model import hidden_states
from codiemb.encoder.tokens import Features
from codiemb.integrations.same_dataset import SameDatasetBatchSampler
from codiemb.losses.objective import Pairs, pairs
from codiemb.losses.retrieval import info_nce
from codiemb.tasks.similarity import SimilarityLosses

__all__ = ["CoDiEmbSimilarity", "InfoNCE", "PairLoss", "SameDatasetBatchSampler", "text_ids"]

CITATION = """
@article{codiemb2025,
    title   = {CoDiEmb: A Collaborative yet Distinct Framework for Unified Representation Learning in
               Information Retrieval and Semantic Textual Similarity},
    author  = {Zhang, Bowen and Song, Zixin and Chen, Chunquan and Zhang, Qian-Wen and Yin, Di and Sun, Xing},
    journal = {arXiv preprint arXiv:2508.11442},
    year    = {2025}
}
"""


class InfoNCE(nn.Module):
    """`codiemb.losses.info_nce` on the columns (query, positive, ..., negative, ...).

    Texts are compared by the tokens the model reads, never by their embeddings. A document is no negative of a query
    if it is a positive of that query in any row of the batch, or the query's own text.

    Args:
        model: the model being trained.
        temperature: above 0.
        candidates: `all`, or of the other queries' positives only those in the same column (`same_slot`).
        hardness: as in `codiemb.losses.info_nce`, and the next two.
        false_negative_margin: leave out candidates above the positive's score less this.
        symmetric: also tell the query from the other queries, given the positive.
        chunk_size: hold at most this many columns of logits at once; value and gradients are the same.
        gather_across_devices: whether the documents of the other devices are candidates too.
        positives: how many columns after the query are positives; the others are negatives.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = 0.02,
        candidates: Literal["all", "same_slot"] = "all",
        hardness: float = 0.0,
        false_negative_margin: float | None = None,
        symmetric: bool = False,
        chunk_size: int | None = None,
        gather_across_devices: bool = True,
        positives: int = 1,
    ) -> None:
        super().__init__()
        if positives < 1:
            raise ValueError(f"positives: got {positives}, expected at least 1")
        self.model = model
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "candidates": candidates,
            "hardness": hardness,
            "false_negative_margin": false_negative_margin,
            "symmetric": symmetric,
            "chunk_size": chunk_size,
        }
        self.gather_across_devices = gather_across_devices
        self.positives = positives

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Float[Tensor, ""]:
        features = list(sentence_features)
        if len(features) <= self.positives or labels is not None:
            raise ValueError(
                f"InfoNCE: got {_columns(features, labels)}, expected a query, {self.positives} positive(s) and any "
                "number of negatives, without labels; select these columns in this order"
            )
        gather = joined if self.gather_across_devices else _alone
        ids = [text_ids(column) for column in features]
        embeddings = embed_columns(self.model, features)

        rows, device = len(ids[0]), ids[0].device
        column = torch.arange(len(features) - 1, device=device).repeat_interleave(rows)
        query_ids, first = gather(ids[0])
        positive_ids, _ = gather(torch.stack(ids[1 : 1 + self.positives], dim=1))  # [query, positive]
        owner, _ = gather(torch.arange(rows, device=device).repeat(len(features) - 1) + first)
        document_ids, _ = gather(torch.cat(ids[1:]))
        slot, _ = gather(torch.where(column < self.positives, column, -1))
        with torch.autocast(device.type, enabled=False):
            loss = info_nce(
                gather(_unit(embeddings[0]))[0],
                gather(_unit(torch.cat(embeddings[1:])))[0],
                owner=owner,
                positive=slot >= 0,
                document_ids=document_ids,
                slot=slot,
                relevant=_relevant(query_ids, positive_ids),
                **self.settings,
            )
        return scale_gradient(loss, world_size()) if self.gather_across_devices else loss

    def get_config_dict(self) -> dict[str, Any]:
        return {**self.settings, "gather_across_devices": self.gather_across_devices, "positives": self.positives}

    @property
    def citation(self) -> str:
        return CITATION


class PairLoss(nn.Module):
    """A function of cosines and labels, over the pairs of all devices, on the columns (sentence1, sentence2, score).

    Args:
        model: the model being trained.
        loss: `([pair], [pair], **settings) -> scalar`, such as `codiemb.losses.pearson`, `rank_kl` or `pro`.
        settings: further arguments of `loss`.
    """

    def __init__(self, model: SentenceTransformer, loss: Callable[..., Tensor], **settings: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.settings = settings

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Float[Tensor, ""]:
        features, target = _pairs(self, sentence_features, labels)
        left, right = embed_columns(self.model, features)
        with torch.autocast(target.device.type, enabled=False):
            cosine = (_unit(left) * _unit(right)).sum(dim=-1)
            loss = self.loss(joined(cosine)[0], joined(target)[0], **self.settings)
        return scale_gradient(loss, world_size())

    def get_config_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.__name__, **self.settings}

    @property
    def citation(self) -> str:
        return CITATION


class CoDiEmbSimilarity(nn.Module):
    """Weighted sum of losses of graded pairs, on the columns (sentence1, sentence2, score).

    Args:
        model: the model being trained.
        settings: of the config section `losses.similarity`: weights `pearson=2`, `rank_kl=5`, `pro=0.5`, `mid_nce=1`
            or of any other loss of pairs (a part of weight 0 is not computed), `temperature`, `reduction`,
            `mid_nce_temperature`, `mid_nce_threshold`.

    Raises:
        ValueError: an unknown setting, or `mid_nce` on a model without a Pooling module.
    """

    def __init__(self, model: SentenceTransformer, **settings: Any) -> None:
        super().__init__()
        self.model = model
        self.settings = SimilarityLosses(**settings).model_dump()
        if self.settings["mid_nce"] and not any(isinstance(module, Pooling) for module in model):
            raise ValueError(
                "mid_nce: got a model without a Pooling module, expected 0 as there is no pooling to apply"
            )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Float[Tensor, ""]:
        features, target = _pairs(self, sentence_features, labels)
        left_ids, right_ids = (joined(text_ids(column))[0] for column in features)
        encoder = extract_model_from_parallel(self.model)  # the trainer puts a wrapped model in our place
        with hidden_states(encoder, self.settings["mid_nce"] > 0):
            outputs = [self.model(column) for column in features]
        sides = [output["sentence_embedding"] for output in outputs]
        if self.settings["mid_nce"]:
            sides += [pool_middle(encoder, output) for output in outputs]
        with torch.autocast(target.device.type, enabled=False):
            left, right, *middle = (side.float() for side in sides)
            batch = Pairs(
                left, right, joined(target)[0], left_ids, right_ids, *middle, gather=lambda rows: joined(rows)[0]
            )
            return scale_gradient(pairs(batch, self.settings).loss, world_size())

    def get_config_dict(self) -> dict[str, Any]:
        return self.settings

    @property
    def citation(self) -> str:
        return CITATION


def text_ids(features: Features) -> Int[Tensor, " text"]:
    """A number for each text of a column: equal for equal tokens, whatever the padding, the column or the device.

    Each token is mixed with its place by the finaliser of splitmix64 (Steele et al., 2014), and the text's are added.
    Prompts are tokens: a text under another prompt is another text. Texts that truncation makes equal are equal.

    Raises:
        ValueError: features that are no padded tokens.
    """
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    if tokens is None or mask is None or tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"features: got {', '.join(features)}, expected padded input_ids and attention_mask; with flash attention "
            "set model[0].unpad_inputs = False"
        )
    mask = mask.long()
    mixed = tokens.long() + (mask.cumsum(dim=1) << 32)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return ((mixed ^ (mixed >> 31)) * mask).sum(dim=1)


def _relevant(query_ids: Tensor, positive_ids: Tensor) -> Int[Tensor, "pair 2"]:
    """(query row, document id): the positives of every row with that query, and the query's own text."""
    row, same = (query_ids[:, None] == query_ids).nonzero().unbind(dim=1)
    listed = torch.stack([row.repeat_interleave(positive_ids.shape[1]), positive_ids[same].flatten()], dim=1)
    own = torch.stack([torch.arange(len(query_ids), device=query_ids.device), query_ids], dim=1)
    return torch.cat([listed, own])


def _pairs(
    loss: nn.Module, sentence_features: Iterable[Features], labels: Tensor | None
) -> tuple[list[Features], Float[Tensor, " pair"]]:
    """The two columns and the labels, checked."""
    features = list(sentence_features)
    name = type(loss).__name__
    if len(features) != 2 or labels is None:
        raise ValueError(
            f"{name}: got {_columns(features, labels)}, expected two text columns and one of scores, named `score` or "
            "`label`"
        )
    target = labels.flatten().float()
    if len(target) != len(labels) or not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError(
            f"{name}: got scores {target.tolist()[:5]}..., expected one number of 0 to 1 for each pair; divide the "
            "column by its highest possible score"
        )
    return features, target


def _columns(features: list[Features], labels: Tensor | None) -> str:
    return f"{len(features)} text column(s) {'without' if labels is None else 'and'} labels"


def _alone(tensor: Tensor) -> tuple[Tensor, int]:
    """What `joined` gives in one process."""
    return tensor, 0


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
