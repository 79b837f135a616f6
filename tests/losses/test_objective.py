"""The table from task to objective: weights, parts, and that what is not asked for is not computed."""

from dataclasses import replace

import pytest
import torch

from codiemb.config import Losses
from codiemb.losses import info_nce, mid_nce, objective, pearson, pro, rank_kl
from codiemb.losses.objective import OBJECTIVES, RetrievalEmbeddings, SimilarityEmbeddings

PARTS = ("pearson", "rank_kl", "pro", "mid_nce")


def normal(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(embeddings):
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


@pytest.fixture
def pairs():
    return SimilarityEmbeddings(
        left=normal(6, 8, seed=1),
        right=normal(6, 8, seed=2),
        target=torch.tensor([0.0, 0.2, 0.6, 0.6, 1.0, 1.0]),
        left_ids=torch.tensor([11, 12, 13, 14, 15, 16]),
        right_ids=torch.tensor([1, 2, 3, 4, 5, 2]),
        left_middle=normal(6, 4, seed=3),
        right_middle=normal(6, 4, seed=4),
    )


@pytest.fixture
def queries_and_documents():
    slot = torch.tensor([0, 1, -1, 0, 0, -1])
    return RetrievalEmbeddings(
        queries=normal(3, 8, seed=1),
        documents=normal(6, 8, seed=2),
        owner=torch.tensor([0, 0, 0, 1, 2, 2]),
        positive=slot >= 0,
        slot=slot,
        document_ids=torch.tensor([1, 2, 3, 4, 5, 1]),
        relevant=torch.tensor([[1, 3]]),
    )


def similarity_settings(**changes):
    return Losses(similarity=changes).model_dump()["similarity"]


def retrieval_settings(**changes):
    return Losses(retrieval=changes).model_dump()["retrieval"]


def test_similarity_parts_are_the_losses_of_normalised_embeddings(pairs):
    settings = similarity_settings(
        temperature=0.3, reduction="sum", mid_nce_temperature=0.4, mid_nce_threshold=0.6, pearson=1
    )
    parts = OBJECTIVES["similarity"](pairs, settings).parts
    cosine = torch.cosine_similarity(pairs.left, pairs.right)
    expected = {
        "pearson": pearson(cosine, pairs.target),
        "rank_kl": rank_kl(cosine, pairs.target, temperature=0.3, reduction="sum"),
        "pro": pro(cosine, pairs.target, temperature=0.3),
        "mid_nce": mid_nce(
            unit(pairs.left_middle),
            unit(pairs.right_middle),
            pairs.target,
            left_ids=pairs.left_ids,
            right_ids=pairs.right_ids,
            threshold=0.6,
            temperature=0.4,
        ),
    }
    torch.testing.assert_close(parts, expected)


def test_similarity_loss_is_the_weighted_sum_of_its_parts(pairs):
    settings = similarity_settings(weight=0.25, pearson=2, rank_kl=5, pro=0.5, mid_nce=3)
    found = OBJECTIVES["similarity"](pairs, settings)
    parts = {name: value.item() for name, value in found.parts.items()}
    assert all(parts[name] > 0.01 for name in PARTS)
    expected = 0.25 * (2 * parts["pearson"] + 5 * parts["rank_kl"] + 0.5 * parts["pro"] + 3 * parts["mid_nce"])
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.candidates is None


@pytest.mark.parametrize("off", PARTS)
def test_a_part_of_weight_zero_is_not_computed(pairs, off, monkeypatch):
    def computed(*_, **__):
        raise AssertionError(f"{off} was computed")

    settings = similarity_settings(**{off: 0})
    monkeypatch.setattr(objective, off, computed)
    assert set(OBJECTIVES["similarity"](pairs, settings).parts) == {*PARTS} - {off}
    with pytest.raises(AssertionError, match="was computed"):  # the trap works
        OBJECTIVES["similarity"](pairs, similarity_settings())


def test_the_middle_layer_is_not_needed_without_mid_nce(pairs):
    without = replace(pairs, left_middle=None, right_middle=None)
    found = OBJECTIVES["similarity"](without, similarity_settings(mid_nce=0))
    assert found.loss == OBJECTIVES["similarity"](pairs, similarity_settings(mid_nce=0)).loss


@pytest.mark.parametrize("candidates", ["all", "same_slot"])
def test_retrieval_is_weighted_info_nce_of_normalised_embeddings(queries_and_documents, candidates):
    batch = queries_and_documents
    found = OBJECTIVES["retrieval"](batch, retrieval_settings(weight=0.5, temperature=0.3, candidates=candidates))
    fields = {name: value for name, value in vars(batch).items() if name not in ("queries", "documents")}
    expected = info_nce(unit(batch.queries), unit(batch.documents), temperature=0.3, candidates=candidates, **fields)
    assert expected > 0.1
    torch.testing.assert_close(found.parts, {"info_nce": expected})
    torch.testing.assert_close(found.loss, 0.5 * expected)


def test_candidates_are_counted(queries_and_documents):
    """Ids: query 0 has 1 and 2; query 1 has 4 and, by `relevant`, 3; query 2 has 5.

    all: both positives of query 0 against ids 3, 4, 5 (3 each); query 1 against 1, 2, 5, 1 (4); query 2 against 1, 2,
    3, 4, 1 (5): 15 / 4. same_slot: of the positives only those in slot 0 (or 1 for the second of query 0):
    3 and 1, 3, 4: 11 / 4.
    """
    counts = [
        OBJECTIVES["retrieval"](queries_and_documents, retrieval_settings(candidates=candidates)).candidates
        for candidates in ("all", "same_slot")
    ]
    assert counts == [15 / 4, 11 / 4]
