"""The module that is trained: the encoder with its objectives, one forward call an optimizer step.

Everything of a step passes through one `forward`, so DDP sees an ordinary module however many texts, roles
and tasks a step holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from codiemb.config import Losses
from codiemb.distributed import gathered, joined, most, scale_gradient, summed, world_size
from codiemb.encoder.engine import embed
from codiemb.encoder.memory import Memory
from codiemb.encoder.tokens import Features
from codiemb.losses.objective import SHAPES, Lists, Objective, Pairs, RunningScale, matryoshka
from codiemb.losses.retrieval import Groups
from codiemb.tasks import TASKS

_MOST_SCORES = 2**22  # 80 MB of tables; in tiles that large InfoNCE takes no longer than with whole tables


class JointModel(nn.Module):
    """Encoder and objectives.

    Args:
        encoder: the model being trained.
        losses: the `losses` section.
        memory: what a step may hold; None for all that it takes.
        sharded: under FSDP or ZeRO the ranks exchange weights in every micro-batch, so each runs as many.
        mark: told when a phase of the forward pass has ended.

    Attributes:
        balance: running sizes of the loss parts, with `balance: magnitude`; part of a checkpoint.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        losses: Losses,
        memory: Memory | None = None,
        sharded: bool = False,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.memory = memory
        self.sharded = sharded
        self.mark = mark
        self.losses = losses.model_dump()
        self.emphasis = {"lists": 2 * losses.emphasis, "pairs": 2 * (1 - losses.emphasis)}
        self.balance = RunningScale() if losses.balance == "magnitude" else None

    def forward(self, batches: list[dict[str, Any]], micro_batches: list[Features]) -> dict[str, Any]:
        """The loss of a step (the sum over its batches), and the objective of each batch, detached.

        Args:
            batches: what each objective needs, with the `place` of its texts among the outputs of `micro_batches`.
            micro_batches: the tokens of all texts.
        """
        place = torch.cat([batch["place"] for batch in batches])
        if self.sharded:  # what is done again to keep step with other ranks stands behind, where no text has its place
            again = most(len(micro_batches)) - len(micro_batches)
            micro_batches = micro_batches + again * micro_batches[-1:]
        recomputed = 0 if self.memory is None else self.memory.recomputed(micro_batches)
        if self.sharded:
            recomputed = most(recomputed)  # what runs again exchanges weights again
        middle = any(self._takes_middle(batch["task"]) for batch in batches)
        final, hidden = embed(self.encoder, micro_batches, place, middle, recomputed)
        self.mark("forward")
        scaled, seen, start = [], [], 0
        for batch in batches:
            own = slice(start, start + len(batch["place"]))
            start = own.stop
            of_middle = hidden[own] if hidden is not None and self._takes_middle(batch["task"]) else None
            objective = _over_ranks(self._objective(batch, final[own], of_middle))
            loss = (self.balance(batch["task"], objective) if self.balance else objective).loss
            scaled.append(loss * self.emphasis[TASKS[batch["task"]].shape])
            seen.append(
                {
                    "loss": scaled[-1].detach(),
                    "parts": {name: part.detach() for name, part in objective.parts.items()},
                    "candidates": objective.candidates,
                }
            )
        loss = scale_gradient(torch.stack(scaled).sum(), world_size())
        self.mark("loss")
        return {"loss": loss, "objectives": seen}

    def _takes_middle(self, task: str) -> bool:
        return TASKS[task].shape == "pairs" and self.losses[task]["mid_nce"] > 0

    @property
    def _no_split_modules(self) -> list[str]:
        """Where Hugging Face looks for the classes of layers that FSDP shards one by one."""
        known = getattr(getattr(self.encoder[0], "model", None), "_no_split_modules", None) or []
        present = {type(module).__name__ for module in self.encoder.modules()}
        return sorted(present & set(known))

    def _objective(self, batch: dict[str, Any], final: Tensor, hidden: Tensor | None) -> Objective:
        shape, settings = TASKS[batch["task"]].shape, self.losses[batch["task"]]
        with torch.autocast(final.device.type, enabled=False):
            embeddings = _lists(final, batch, settings) if shape == "lists" else _pairs(final, hidden, batch)
            if isinstance(embeddings, Lists) and settings["type"] == "info_nce" and settings["chunk_size"] is None:
                settings = {**settings, "chunk_size": _columns(embeddings, max(batch["rows"], len(batch["owner"])))}
            if prefixes := self.losses["matryoshka"]:
                weights = prefixes["weights"] or [1.0] * len(prefixes["dims"])
                return matryoshka(SHAPES[shape], embeddings, settings, prefixes["dims"], weights)
            return SHAPES[shape](embeddings, settings)


def _columns(batch: Lists, rows: int) -> int | None:
    """Columns of scores held at once where all would be many; `rows` bounds this rank's queries and their terms."""
    return None if rows * len(batch.documents) <= _MOST_SCORES else max(1, _MOST_SCORES // max(rows, 1))


def _lists(final: Tensor, batch: dict[str, Any], settings: dict[str, Any]) -> Lists:
    """This rank's queries with the documents of all ranks; those of others have the owner -1."""
    rows, first, relevant = batch["rows"], batch["first_row"], batch["relevant"]
    queries, documents = final[:rows], final[rows:]
    if settings["type"] == "list_softmax":  # a list is scored by itself
        fields = ("owner", "positive", "slot", "document_ids", "scores", "relevant")
        return Lists(queries, documents, *(batch[name] for name in fields))
    listed = torch.stack([batch["owner"] + first, batch["positive"], batch["slot"], batch["document_ids"]], dim=1)
    row, positive, slot, document_ids = joined(listed)[0].unbind(dim=1)
    mine = (row >= first) & (row < first + rows)
    if settings["symmetric"]:  # a positive is set against the queries of all ranks
        relevant = joined(torch.stack([relevant[:, 0] + first, relevant[:, 1]], dim=1))[0]
        queries, first = gathered(queries), 0
    owner = torch.where(mine, row - first, -1)
    size = settings["group_size"]
    query_row = first + torch.arange(len(queries), device=row.device)
    groups = None if settings["cross_device"] else Groups(query_row // size, row // size)
    documents = gathered(documents)
    return Lists(queries, documents, owner, positive > 0, slot, document_ids, batch["scores"], relevant, groups)


def _pairs(final: Tensor, hidden: Tensor | None, batch: dict[str, Any]) -> Pairs:
    """This rank's pairs, with the labels of all ranks."""
    n = batch["rows"]
    target = batch["target"].view(
        torch.int32
    )  # its bits as a whole number, so that labels and ids travel in one exchange
    listed = torch.stack([target, batch["left_ids"], batch["right_ids"]], dim=1)
    target, left_ids, right_ids = joined(listed)[0].unbind(dim=1)
    target = target.int().view(torch.float32)
    left, right = (None, None) if hidden is None else (hidden[:n], hidden[n:])
    return Pairs(final[:n], final[n:], target, left_ids, right_ids, left, right, gather=lambda rows: joined(rows)[0])


def _over_ranks(objective: Objective) -> Objective:
    """The objective of the whole batch from that of this rank's rows: values of all, gradient of its own."""
    if objective.rows is None:
        return objective
    share = objective.rows / summed(objective.rows).clamp(min=1)
    candidates = torch.zeros_like(share) if objective.candidates is None else objective.candidates
    *values, counted = summed(torch.stack([*objective.parts.values(), candidates]) * share).unbind()
    parts = dict(zip(objective.parts, values, strict=True))
    return replace(objective, parts=parts, candidates=None if objective.candidates is None else counted.detach())
