"""The table from task to objective: weights, parts, and that what is not asked for is not computed."""

from dataclasses import replace

import pytest
import torch

from codiemb import losses
from codiemb.config import Losses
from codiemb.losses import info_nce, list_softmax, mid_nce, objective, pearson, pro, rank_kl, retrieval, triplet
from codiemb.losses.objective import LIST_LOSSES, PAIR_LOSSES, SHAPES, Lists, Objective, Pairs, RunningScale, matryoshka

PARTS = ("pearson", "rank_kl", "pro", "mid_nce")


def normal(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(embeddings):
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


@pytest.fixture
def pairs():
    return Pairs(
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
    return Lists(
        queries=normal(3, 8, seed=1),
        documents=normal(6, 8, seed=2),
        owner=torch.tensor([0, 0, 0, 1, 2, 2]),
        positive=slot >= 0,
        slot=slot,
        document_ids=torch.tensor([1, 2, 3, 4, 5, 1]),
        scores=torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 0.5]),
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
    parts = SHAPES["pairs"](pairs, settings).parts
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
    found = SHAPES["pairs"](pairs, settings)
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
    assert set(SHAPES["pairs"](pairs, settings).parts) == {*PARTS} - {off}
    with pytest.raises(AssertionError, match="was computed"):  # the trap works
        SHAPES["pairs"](pairs, similarity_settings())


def test_the_middle_layer_is_not_needed_without_mid_nce(pairs):
    without = replace(pairs, left_middle=None, right_middle=None)
    found = SHAPES["pairs"](without, similarity_settings(mid_nce=0))
    assert found.loss == SHAPES["pairs"](pairs, similarity_settings(mid_nce=0)).loss


@pytest.mark.parametrize("candidates", ["all", "same_slot"])
def test_retrieval_is_weighted_info_nce_of_normalised_embeddings(queries_and_documents, candidates):
    batch = queries_and_documents
    found = SHAPES["lists"](batch, retrieval_settings(weight=0.5, temperature=0.3, candidates=candidates))
    fields = {name: value for name, value in vars(batch).items() if name not in ("queries", "documents", "scores")}
    expected = info_nce(unit(batch.queries), unit(batch.documents), temperature=0.3, candidates=candidates, **fields)
    assert expected > 0.1
    torch.testing.assert_close(found.parts, {"info_nce": expected})
    torch.testing.assert_close(found.loss, 0.5 * expected)


def test_candidates_are_counted(queries_and_documents):
    """Ids: query 0 has 1 and 2; query 1 has 4 and, by `relevant`, 3; query 2 has 5.

    all: both positives of query 0 against ids 3, 4, 5 (3 each); query 1 against 1, 2, 5, 1 (4); query 2 against 1, 2,
    3, 4, 1 (5): the mean over the queries is 12 / 3. same_slot: of the positives only those in slot 0 (or 1 for the
    second of query 0): 3 and 1, so 2 for query 0, then 3 and 4: 9 / 3.
    """
    counts = [
        SHAPES["lists"](queries_and_documents, retrieval_settings(candidates=candidates)).candidates
        for candidates in ("all", "same_slot")
    ]
    assert counts == [4, 3]


def test_candidates_are_counted_in_tiles_too(queries_and_documents, monkeypatch):
    """Of 6 documents at most 2 are looked at together; triplets have the candidates `all`."""
    seen = []
    relevance = retrieval._relevance
    monkeypatch.setattr(retrieval, "_relevance", lambda *a: seen.append(len(a[2])) or relevance(*a))
    for candidates, expected in (("all", 4), ("same_slot", 3)):
        settings = retrieval_settings(candidates=candidates, chunk_size=2)
        assert SHAPES["lists"](queries_and_documents, settings).candidates == expected
    assert max(seen) == 2
    assert SHAPES["lists"](queries_and_documents, retrieval_settings(type="triplet")).candidates == 4


@pytest.mark.parametrize("name", ["info_nce", "triplet", "list_softmax"])
def test_a_batch_without_documents_is_zero(queries_and_documents, name):
    """As where each query has a label of its own and no negatives are drawn; `relevant` names ids all the same."""
    fields = ("documents", "owner", "positive", "slot", "document_ids", "scores")
    batch = replace(queries_and_documents, **{field: getattr(queries_and_documents, field)[:0] for field in fields})
    assert SHAPES["lists"](batch, retrieval_settings(type=name)).loss == 0


def test_settings_and_tables_name_the_same_losses():
    from codiemb.tasks.task import PAIR_LOSSES as NAMES
    from codiemb.tasks.task import ListLosses

    assert (*PAIR_LOSSES,) == NAMES
    assert {*PAIR_LOSSES} <= Losses().similarity.model_fields.keys()
    assert {*LIST_LOSSES} == {*ListLosses.model_fields["type"].annotation.__args__}


@pytest.mark.parametrize("name", sorted({*PAIR_LOSSES} - {*PARTS, "angle", "info_nce"}))
def test_a_named_loss_stands_alone_and_is_that_function(pairs, name):
    found = SHAPES["pairs"](pairs, similarity_settings(**{name: 3}, temperature=0.3))
    cosine = torch.cosine_similarity(pairs.left, pairs.right)
    temperature = {} if name == "cosine_mse" else {"temperature": 0.3}
    expected = getattr(losses, name)(cosine, pairs.target, **temperature)
    assert found.parts.keys() == {name}
    torch.testing.assert_close(found.loss, 3 * expected)


def test_angle_and_info_nce_take_the_embeddings(pairs):
    found = SHAPES["pairs"](pairs, similarity_settings(angle=1, info_nce=1, mid_nce_threshold=0.6, temperature=0.3))
    left, right = unit(pairs.left), unit(pairs.right)
    ids = {"left_ids": pairs.left_ids, "right_ids": pairs.right_ids}
    expected = {
        "angle": losses.angle(left, right, pairs.target, temperature=0.3),
        "info_nce": mid_nce(left, right, pairs.target, threshold=0.6, **ids),
    }
    torch.testing.assert_close(found.parts, expected)
    assert all(part > 0.01 for part in expected.values())


def test_other_list_losses(queries_and_documents):
    batch = queries_and_documents
    fields = {name: getattr(batch, name) for name in ("owner", "positive", "document_ids", "relevant")}
    queries, documents = unit(batch.queries), unit(batch.documents)
    found = SHAPES["lists"](batch, retrieval_settings(type="triplet", margin=0.5))
    torch.testing.assert_close(found.parts, {"triplet": triplet(queries, documents, margin=0.5, **fields)})
    found = SHAPES["lists"](batch, retrieval_settings(type="list_softmax", temperature=0.3))
    expected = list_softmax(queries, documents, owner=batch.owner, scores=batch.scores, temperature=0.3)
    torch.testing.assert_close(found.parts, {"list_softmax": expected})
    assert found.candidates is None


def test_matryoshka_is_the_weighted_sum_over_prefixes(pairs, queries_and_documents):
    """Each prefix is normalised anew; the middle layer, which has no prefix, is used once."""
    settings = similarity_settings(weight=0.5)
    found = matryoshka(SHAPES["pairs"], pairs, settings, dims=[8, 3], weights=[1.0, 0.25])
    short = replace(pairs, left=pairs.left[:, :3], right=pairs.right[:, :3])
    whole, cut = (SHAPES["pairs"](batch, settings) for batch in (pairs, short))
    expected = {name if name == "mid_nce" else f"{name}@8": part for name, part in whole.parts.items()}
    expected |= {f"{name}@3": part for name, part in cut.parts.items() if name != "mid_nce"}
    torch.testing.assert_close(found.parts, expected)
    assert abs(cut.loss - whole.loss) > 0.01
    torch.testing.assert_close(found.loss, whole.loss + 0.25 * (cut.loss - 0.5 * cut.parts["mid_nce"]))

    found = matryoshka(SHAPES["lists"], queries_and_documents, retrieval_settings(), dims=[2], weights=[1.0])
    expected = replace(
        queries_and_documents,
        queries=queries_and_documents.queries[:, :2],
        documents=queries_and_documents.documents[:, :2],
    )
    torch.testing.assert_close(found.loss, SHAPES["lists"](expected, retrieval_settings()).loss)


def test_running_scale_divides_by_the_running_mean_of_the_size():
    """Sizes 4 and 2: means 4 and 3, so the parts become 4/4 and -2/3; then with momentum .5 a size of 7 makes 5.

    A size of 0 does not count.
    """
    scale = RunningScale(momentum=0.5)

    def scaled(value):
        part = torch.tensor(value, requires_grad=True)
        found = scale("task", Objective({"a": part}, {"a": 10.0}))
        (gradient,) = torch.autograd.grad(found.loss, part)
        return found.parts["a"].item(), gradient.item()

    assert scaled(0.0) == (0, 10)
    assert scaled(4.0) == (1, 2.5)
    assert scaled(0.0) == (0, 2.5)
    assert scaled(-2.0) == pytest.approx((-2 / 3, 10 / 3))
    assert scaled(7.0) == pytest.approx((7 / 5, 2))
    other = scale("another task", Objective({"a": torch.tensor(8.0)}, {"a": 1.0}))
    assert other.loss == 1
