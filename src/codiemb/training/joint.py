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
from codiemb.losses.objective import OBJECTIVES, Objective, RetrievalEmbeddings, SimilarityEmbeddings
from codiemb.training.distributed import joined, scale_gradient, world_size


class JointModel(nn.Module):
    """Encoder and objectives.

    Args:
        encoder: the model being trained.
        losses: the `losses` section.
    """

    def __init__(self, encoder: SentenceTransformer, losses: Losses) -> None:
        super().__init__()
        self.encoder = encoder
        self.losses = losses.model_dump()

    def forward(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """The loss of a step (the sum over its batches), and the objective of each batch, detached."""
        objectives = [self._objective(batch) for batch in batches]
        loss = torch.stack([objective.loss for objective in objectives]).sum()
        return {
            "loss": scale_gradient(loss, world_size()),
            "objectives": [
                {
                    "loss": objective.loss.detach(),
                    "parts": {name: part.detach() for name, part in objective.parts.items()},
                    "candidates": objective.candidates,
                }
                for objective in objectives
            ],
        }

    def _objective(self, batch: dict[str, Any]) -> Objective:
        task = batch["task"]
        settings = self.losses[task]
        middle = task == "similarity" and settings["mid_nce"] > 0
        final, hidden = embed(self.encoder, batch["micro_batches"], batch["place"], middle)
        with torch.autocast(final.device.type, enabled=False):
            embeddings = _retrieval(final, batch) if task == "retrieval" else _similarity(final, hidden, batch)
            return OBJECTIVES[task](embeddings, settings)


def _retrieval(final: Tensor, batch: dict[str, Any]) -> RetrievalEmbeddings:
    """The batch of all ranks, with queries numbered over all of them."""
    queries, first_query = joined(final[: batch["rows"]])
    documents, _ = joined(final[batch["rows"] :])
    owner, _ = joined(batch["owner"] + first_query)
    relevant = batch["relevant"].clone()
    relevant[:, 0] += first_query
    positive, slot, document_ids = (joined(batch[name])[0] for name in ("positive", "slot", "document_ids"))
    return RetrievalEmbeddings(queries, documents, owner, positive, slot, document_ids, joined(relevant)[0])


def _similarity(final: Tensor, hidden: Tensor | None, batch: dict[str, Any]) -> SimilarityEmbeddings:
    """The pairs of all ranks."""
    n = batch["rows"]
    sides = [final[:n], final[n:]]
    if hidden is not None:
        sides += [hidden[:n], hidden[n:]]
    left, right, *middle = (joined(side)[0] for side in sides)
    target, left_ids, right_ids = (joined(batch[name])[0] for name in ("target", "left_ids", "right_ids"))
    return SimilarityEmbeddings(left, right, target, left_ids, right_ids, *middle)
