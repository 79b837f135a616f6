"""Losses as pure functions of embeddings: no model, no config, no I/O."""

from codiemb.losses.listwise import (
    angle,
    cosent,
    cosine_mse,
    lambda_rank,
    list_mle,
    list_net,
    rank_net,
    soft_spearman,
)
from codiemb.losses.retrieval import info_nce, list_softmax, triplet
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl

__all__ = [
    "angle",
    "cosent",
    "cosine_mse",
    "info_nce",
    "lambda_rank",
    "list_mle",
    "list_net",
    "list_softmax",
    "mid_nce",
    "pearson",
    "pro",
    "rank_kl",
    "rank_net",
    "soft_spearman",
    "triplet",
]
