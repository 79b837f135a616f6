"""Losses as pure functions of embeddings: no model, no config, no I/O."""

from codiemb.losses.retrieval import info_nce
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl

__all__ = ["info_nce", "mid_nce", "pearson", "pro", "rank_kl"]
