"""The module that is trained: the encoder with its objectives, one forward call an optimizer step.

Everything of a step passes through one `forward`, so DDP sees an ordinary module however many texts, roles
and tasks a step holds.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from codiemb.config import Losses
from codiemb.encoder.engine import embed
from codiemb.losses.objective import SHAPES, Lists, Objective, Pairs, RunningScale, matryoshka
from codiemb.tasks import TASKS
from codiemb.training.distributed import joined, scale_gradient, world_size


class JointModel(nn.Module):
    """Encoder and objectives.

    Args:
        encoder: the model being trained.
        losses: the `losses` section.

    Attributes:
        balance: running sizes of the loss parts, with `balance: magnitude`; part of a checkpoint.
    """

    def __init__(self, encoder: SentenceTransformer, losses: Losses) -> None:
        super().__init__()
        self.encoder = encoder
        self.losses = losses.model_dump()
        self.emphasis = {"lists": 2 * losses.emphasis, "pairs": 2 * (1 - losses.emphasis)}
        self.balance = RunningScale() if losses.balance == "magnitude" else None

    def forward(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """The loss of a step (the sum over its batches), and the objective of each batch, detached."""
        scaled, seen = [], []
        for batch in batches:
            objective = self._objective(batch)
            loss = (self.balance(batch["task"], objective) if self.balance else objective).loss
            scaled.append(loss * self.emphasis[TASKS[batch["task"]].shape])
            seen.append(
                {
                    "loss": scaled[-1].detach(),
                    "parts": {name: part.detach() for name, part in objective.parts.items()},
                    "candidates": objective.candidates,
                }
            )
        return {"loss": scale_gradient(torch.stack(scaled).sum(), world_size()), "objectives": seen}

    def _objective(self, batch: dict[str, Any]) -> Objective:
        shape, settings = TASKS[batch["task"]].shape, self.losses[batch["task"]]
        middle = shape == "pairs" and settings["mid_nce"] > 0
        final, hidden = embed(self.encoder, batch["micro_batches"], batch["place"], middle)
        with torch.autocast(final.device.type, enabled=False):
            embeddings = _lists(final, batch) if shape == "lists" else _pairs(final, hidden, batch)
            if prefixes := self.losses["matryoshka"]:
                weights = prefixes["weights"] or [1.0] * len(prefixes["dims"])
                return matryoshka(SHAPES[shape], embeddings, settings, prefixes["dims"], weights)
            return SHAPES[shape](embeddings, settings)


def _lists(final: Tensor, batch: dict[str, Any]) -> Lists:
    """The batch of all ranks, with queries numbered over all of them."""
    queries, first_query = joined(final[: batch["rows"]])
    owner = batch["owner"] + first_query
    relevant = batch["relevant"].clone()
    relevant[:, 0] += first_query
    positive, slot, document_ids, scores = (
        joined(batch[name])[0] for name in ("positive", "slot", "document_ids", "scores")
    )
    documents, owner, relevant = (joined(tensor)[0] for tensor in (final[batch["rows"] :], owner, relevant))
    return Lists(queries, documents, owner, positive, slot, document_ids, scores, relevant)


def _pairs(final: Tensor, hidden: Tensor | None, batch: dict[str, Any]) -> Pairs:
    """The pairs of all ranks."""
    n = batch["rows"]
    sides = [final[:n], final[n:]]
    if hidden is not None:
        sides += [hidden[:n], hidden[n:]]
    left, right, *middle = (joined(side)[0] for side in sides)
    target, left_ids, right_ids = (joined(batch[name])[0] for name in ("target", "left_ids", "right_ids"))
    return Pairs(left, right, target, left_ids, right_ids, *middle)
