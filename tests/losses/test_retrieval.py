"""InfoNCE against its definition, spelled out as loops, and at the edges of ragged batches."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from codiemb.losses import retrieval, tiles
from codiemb.losses.retrieval import Groups, count_candidates, count_queries, info_nce, list_softmax, triplet

CANDIDATES = ("all", "same_slot")


@dataclass(frozen=True)
class Listing:
    """Who listed which document, as `info_nce` takes it."""

    owner: torch.Tensor
    positive: torch.Tensor
    slot: torch.Tensor
    document_ids: torch.Tensor | None = None
    relevant: torch.Tensor | None = None


def listing(rows):
    """From (owner, slot, id) of each document; slot -1 means hard negative."""
    owner, slot, ids = torch.tensor(rows).T
    return Listing(owner, slot >= 0, slot, ids)


def ragged():
    """Five queries and two documents of another rank.

    Query 1 has no negative, query 3 no positive. Id 11 is a positive of query 0 and twice a hard negative elsewhere;
    id 20 is a positive of queries 1 and 2; by `relevant` id 21 belongs to query 4, and id 41 to query 0.
    """
    rows = [(0, 0, 10), (0, 1, 11), (0, -1, 40), (0, -1, 41), (1, 0, 20), (2, 0, 20), (2, 1, 21), (2, 2, 22)]
    rows += [(2, -1, 11), (3, -1, 42), (3, -1, 43), (4, 0, 30), (4, -1, 11), (-1, 0, 50), (-1, 1, 51), (-1, -1, 41)]
    return replace(listing(rows), relevant=torch.tensor([[4, 21], [0, 41], [4, 30]]))


def embeddings(documents, queries=5, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(rows, 6, generator=random, dtype=torch.float64) for rows in (queries, documents)]
    return [torch.nn.functional.normalize(part, dim=1).to(dtype).requires_grad_() for part in drawn]


def naive_candidates(i, p, docs, candidates):
    """C(i, p) of METHOD 2, one document after the other."""
    mine = [d for d in range(len(docs.owner)) if docs.owner[d] == i and docs.positive[d]]
    if docs.document_ids is None:
        relevant = set(mine)
    else:
        ids = docs.document_ids.tolist()
        known = {ids[d] for d in mine}
        if docs.relevant is not None:
            known |= {number for row, number in docs.relevant.tolist() if row == i}
        relevant = {d for d, number in enumerate(ids) if number in known}
    found = []
    for d in range(len(docs.owner)):
        another_slot = candidates == "same_slot" and docs.positive[d] and docs.slot[d] != docs.slot[p]
        if d not in relevant and not another_slot:
            found.append(d)
    return found


def naive_info_nce(queries, documents, docs, temperature, candidates, hardness=0.0, margin=None, symmetric=False):
    def score(i, d):
        return queries[i] @ documents[d]

    def cross_entropy(own, others):
        """Others above the margin are left out; those that stay count e^(hardness * s) times."""
        total = torch.exp(own / temperature)
        for other in others:
            if margin is None or other <= own - margin:
                total = total + torch.exp(other / temperature) * torch.exp(hardness * other.detach())
        return torch.log(total) - own / temperature

    of_queries = []
    for i in range(len(queries)):
        terms = []
        for p in range(len(documents)):
            if docs.owner[p] == i and docs.positive[p]:
                term = cross_entropy(score(i, p), [score(i, d) for d in naive_candidates(i, p, docs, candidates)])
                if symmetric:
                    strangers = [j for j in range(len(queries)) if p in naive_candidates(j, p, docs, "all")]
                    term = (term + cross_entropy(score(i, p), [score(j, p) for j in strangers])) / 2
                terms.append(term)
        if terms:
            of_queries.append(sum(terms) / len(terms))
    return sum(of_queries) / len(of_queries)


def with_gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_equal(found, expected, **tolerance):
    assert all(gradient.abs().max() > 1e-4 for gradient in expected[1:]), "the test would compare zeros"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, **tolerance)


def test_value_worked_out_by_hand():
    """t = 1; q0 = (1, 0) with positive p0 = (1, 0) and negative n0 = (0, 1); q1 = (0, 1) with positive p1 = (.6, .8).

    q0: own 1, against p1 .6 and n0 0:  ln(e + e^.6 + 1) - 1  = ln 5.540401 - 1  = 0.712067
    q1: own .8, against p0 0 and n0 1:  ln(e^.8 + 1 + e) - .8 = ln 5.943823 - .8 = 0.982353
    mean: 0.847210
    """
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    owner, positive = torch.tensor([0, 0, 1]), torch.tensor([True, False, True])
    loss = info_nce(queries, documents, owner=owner, positive=positive, temperature=1.0)
    assert loss.item() == pytest.approx(0.847210, abs=2e-6)


def test_mean_over_the_positives_of_a_query_not_over_all_positives():
    """t = 1; q0 = (1, 0) with positives (1, 0) and (0, 1); q1 = (0, 1) with positive (-1, 0).

    q0: ln(1 + e^(-1-1)) = 0.126928 and ln(1 + e^(-1-0)) = 0.313262, mean 0.220095 (no term has the other positive)
    q1: own 0, against 0 and 1: ln(1 + 1 + e) = 1.551445
    mean over the two queries: 0.885770 (over the three positives it would be 0.663878)
    """
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    owner, positive = torch.tensor([0, 0, 1]), torch.tensor([True, True, True])
    loss = info_nce(queries, documents, owner=owner, positive=positive, temperature=1.0)
    assert loss.item() == pytest.approx(0.885770, abs=2e-6)


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("known", ["nothing", "ids", "ids and relevant"])
def test_equals_the_definition(candidates, known):
    docs = ragged()
    if known != "ids and relevant":
        docs = replace(docs, relevant=None)
    if known == "nothing":
        docs = replace(docs, document_ids=None)
    inputs = embeddings(len(docs.owner))
    expected = naive_info_nce(*inputs, docs, 0.1, candidates)
    found = info_nce(*inputs, temperature=0.1, candidates=candidates, **vars(docs))
    assert_equal(with_gradients(found, *inputs), with_gradients(expected, *inputs))


OPTIONS = {
    "hardness": {"hardness": 2.0},
    "margin": {"margin": 0.1},
    "margin that nothing passes": {"margin": 9.0},
    "symmetric": {"symmetric": True},
    "all of them": {"hardness": 1.0, "margin": -0.3, "symmetric": True},
}


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_equal_their_definition(candidates, chunk_size, options):
    docs = ragged()
    inputs = embeddings(len(docs.owner))
    plain = naive_info_nce(*inputs, docs, 0.1, candidates)
    expected = naive_info_nce(*inputs, docs, 0.1, candidates, **options)
    assert abs(plain.item() - expected.item()) > 1e-3  # the option matters here
    options = {"false_negative_margin" if name == "margin" else name: value for name, value in options.items()}
    found = info_nce(*inputs, temperature=0.1, candidates=candidates, chunk_size=chunk_size, **options, **vars(docs))
    for one, other in zip(with_gradients(found, *inputs), with_gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it where it breaks the graph
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_compiled_gives_the_same(chunk_size):
    docs, inputs = ragged(), embeddings(16)
    options = {"temperature": 0.1, "chunk_size": chunk_size, **vars(docs)}
    compiled = torch.compile(info_nce, backend="aot_eager")
    found = with_gradients(compiled(*inputs, **options), *inputs)
    assert_equal(found, with_gradients(info_nce(*inputs, **options), *inputs))


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_of_the_queries_of_all_ranks_only_those_with_terms_are_scored(candidates, chunk_size, monkeypatch):
    """Queries 1 and 2 are this rank's and have four terms; in the other direction each term is scored by all five."""
    docs, inputs = ragged(), embeddings(16)
    docs = replace(docs, owner=torch.where((docs.owner == 1) | (docs.owner == 2), docs.owner, -1))
    seen = []
    monkeypatch.setattr(retrieval, "contrast", lambda *a: seen.append((len(a[0]), len(a[1]))) or tiles.contrast(*a))
    expected = naive_info_nce(*inputs, docs, 0.3, candidates, symmetric=True)
    settings = {"temperature": 0.3, "candidates": candidates, "symmetric": True, "chunk_size": chunk_size}
    found = info_nce(*inputs, **vars(docs), **settings)
    assert_equal(with_gradients(found, *inputs), with_gradients(expected, *inputs))
    assert seen == [(2 if candidates == "all" else 4, 16), (4, 5)]


@pytest.mark.parametrize("loss", ["plain", "chunks", "triplet", "list_softmax"])
def test_autocast_rounds_no_score(loss):
    """Scores in bf16 over t = 0.02 are wrong by 0.2; with chunks the backward pass would divide by another sum."""
    docs, inputs = ragged(), embeddings(16, dtype=torch.float32)

    def value():
        if loss == "triplet":
            return triplet(*inputs, **triplet_fields(docs))
        if loss == "list_softmax":
            return list_softmax(*inputs, owner=docs.owner, scores=docs.positive.float())
        return info_nce(*inputs, chunk_size=3 if loss == "chunks" else None, **vars(docs))

    expected = with_gradients(value(), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value()
    assert_equal(with_gradients(found, *inputs), expected)


def test_no_table_of_queries_by_documents_is_made_with_chunks(monkeypatch):
    """Every score and every mask goes through these two; with chunks of 3 none is wider."""
    seen = []
    logits, relevance = tiles.Contrast.logits, retrieval._relevance
    monkeypatch.setattr(tiles.Contrast, "logits", lambda *a: seen.append(a[1].shape[1]) or logits(*a))
    monkeypatch.setattr(retrieval, "_relevance", lambda *a: seen.append(len(a[2])) or relevance(*a))
    docs, inputs = ragged(), embeddings(16)
    info_nce(*inputs, chunk_size=3, **vars(docs)).backward()
    assert max(seen) == 3
    info_nce(*inputs, **vars(docs)).backward()
    assert max(seen) == 16


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_each_field_of_the_ragged_batch_matters(candidates):
    """Without this the test above could pass on a loss that ignores ids, `relevant` or slots."""
    docs, inputs = ragged(), embeddings(16)
    values = [
        naive_info_nce(*inputs, replace(docs, relevant=None, document_ids=None), 0.1, candidates),
        naive_info_nce(*inputs, replace(docs, relevant=None), 0.1, candidates),
        naive_info_nce(*inputs, docs, 0.1, candidates),
        naive_info_nce(*inputs, docs, 0.1, "all" if candidates == "same_slot" else "same_slot"),
    ]
    assert len({round(value.item(), 6) for value in values}) == 4


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_neither_value_nor_gradients(candidates, chunk_size):
    docs, inputs = ragged(), embeddings(16)
    options = {"temperature": 0.1, "candidates": candidates, **vars(docs)}
    plain = with_gradients(info_nce(*inputs, **options), *inputs)
    chunked = with_gradients(info_nce(*inputs, chunk_size=chunk_size, **options), *inputs)
    assert_equal(chunked, plain)


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_by_finite_differences(candidates, chunk_size):
    docs = ragged()

    def loss(queries, documents):
        return info_nce(queries, documents, temperature=0.5, candidates=candidates, chunk_size=chunk_size, **vars(docs))

    assert torch.autograd.gradcheck(loss, embeddings(16))


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_term_without_candidates_is_zero_with_a_finite_gradient(candidates, chunk_size):
    docs, inputs = listing([(0, 0, 1)]), embeddings(1, queries=1)
    loss, *gradients = with_gradients(
        info_nce(*inputs, candidates=candidates, chunk_size=chunk_size, **vars(docs)), *inputs
    )
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_one_query_without_candidates_leaves_the_others_gradient_alone(chunk_size):
    """To query 0 all documents are relevant; to query 1 only its own. The mean halves what query 1 gives."""
    docs = replace(listing([(0, 0, 1), (0, 1, 2), (1, 0, 2)]), relevant=None)
    inputs = embeddings(3, queries=2)
    found = info_nce(*inputs, temperature=0.5, chunk_size=chunk_size, **vars(docs))
    queries, documents = inputs
    own, other = queries[1] @ documents[2] / 0.5, queries[1] @ documents[0] / 0.5
    expected = -torch.log(own.exp() / (own.exp() + other.exp())) / 2
    assert_equal(with_gradients(found, *inputs), with_gradients(expected, *inputs))


@pytest.mark.parametrize(
    "docs",
    [listing([(0, -1, 1), (1, -1, 2)]), listing([(-1, 0, 1), (-1, -1, 2)])],
    ids=["only negatives", "another rank's"],
)
def test_no_positive_at_all_gives_zero_connected_to_the_graph(docs):
    inputs = embeddings(2, queries=2)
    loss, *gradients = with_gradients(info_nce(*inputs, **vars(docs)), *inputs)
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_a_query_without_negatives_gets_none_made_up():
    """Two queries, one positive each, no negatives (the reference would score the text "nothing").

    s(q0, p0) = 1, s(q0, p1) = .6, s(q1, p1) = .8, s(q1, p0) = 0, t = 1:
    (ln(1 + e^-.4) + ln(1 + e^-.8)) / 2 = (0.513015 + 0.371101) / 2 = 0.442058
    """
    docs = listing([(0, 0, 1), (1, 0, 2)])
    queries, documents = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert info_nce(queries, documents, temperature=1.0, **vars(docs)).item() == pytest.approx(0.442058, abs=2e-6)
    assert count_candidates(2, **vars(docs)) == 1


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_order_of_queries_and_documents_does_not_matter(candidates):
    docs, (queries, documents) = ragged(), embeddings(16)
    random = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(5, generator=random), torch.randperm(16, generator=random)
    new_row = torch.cat([rows.argsort(), torch.tensor([-1])])  # owner -1 stays -1
    moved = Listing(
        new_row[docs.owner[columns]],
        docs.positive[columns],
        docs.slot[columns],
        docs.document_ids[columns],
        torch.stack([new_row[docs.relevant[:, 0]], docs.relevant[:, 1]], dim=1).flip(0),
    )
    inputs, options = [queries, documents], {"temperature": 0.1, "candidates": candidates}
    before = with_gradients(info_nce(*inputs, **options, **vars(docs)), *inputs)
    after = with_gradients(info_nce(queries[rows], documents[columns], **options, **vars(moved)), *inputs)
    assert_equal(after, before)


def test_equal_vectors_give_the_log_of_their_number():
    """All similarities equal: each term is ln(1 + candidates); here 1 positive against 3."""
    docs = listing([(0, 0, 1), (0, -1, 2), (0, -1, 3), (0, -1, 4)])
    one = torch.tensor([[0.6, 0.8]])
    assert info_nce(one, one.expand(4, 2), **vars(docs)).item() == pytest.approx(math.log(4), abs=1e-6)


def test_zero_vectors_are_finite():
    docs, inputs = ragged(), [torch.zeros(5, 6, requires_grad=True), torch.zeros(16, 6, requires_grad=True)]
    assert all(value.isfinite().all() for value in with_gradients(info_nce(*inputs, **vars(docs)), *inputs))


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_float32_and_float64_agree(candidates):
    docs = ragged()
    single, double = (embeddings(16, dtype=dtype) for dtype in (torch.float32, torch.float64))
    found = with_gradients(info_nce(*single, temperature=0.1, candidates=candidates, **vars(docs)), *single)
    expected = with_gradients(info_nce(*double, temperature=0.1, candidates=candidates, **vars(docs)), *double)
    assert found[0].dtype == torch.float32
    assert expected[0].dtype == torch.float64
    assert_equal(found, expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_computed_in_float32():
    """Only the inputs are rounded: the value is that of the rounded inputs in float32, at the default temperature."""
    docs = ragged()
    half = embeddings(16, dtype=torch.bfloat16)
    rounded = [part.detach().float().requires_grad_() for part in half]
    found = with_gradients(info_nce(*half, **vars(docs)), *half)
    expected = with_gradients(info_nce(*rounded, **vars(docs)), *rounded)
    assert found[0].dtype == torch.float32
    assert all(value.isfinite().all() for value in found)
    torch.testing.assert_close(found[0], expected[0])
    assert_equal(found, expected, rtol=2e-2, atol=1e-3)  # gradients are rounded to bf16 on their way out


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_candidates_counted_one_by_one(candidates):
    docs = ragged()
    of_queries = [
        [len(naive_candidates(i, p, docs, candidates)) for p in range(16) if docs.positive[p] and docs.owner[p] == i]
        for i in range(5)
    ]
    means = [sum(counts) / len(counts) for counts in of_queries if counts]
    found = count_candidates(5, candidates=candidates, **vars(docs))
    assert found.item() == pytest.approx(sum(means) / len(means))
    assert count_queries(5, owner=docs.owner, positive=docs.positive) == len(means) == 4


@pytest.mark.parametrize("options", [{}, {"candidates": "same_slot"}, {"symmetric": True}, {"chunk_size": 3}])
def test_groups_are_batches_of_their_own(options):
    """Queries 0 and 1 are one group, 2 to 4 the other: the mean over both is that of two smaller batches."""
    docs, (queries, documents) = replace(ragged(), relevant=None), embeddings(16)
    first = (docs.owner >= 0) & (docs.owner < 2)
    groups = Groups(torch.tensor([0, 0, 1, 1, 1]), torch.where(first, 0, 1))
    whole = info_nce(queries, documents, groups=groups, temperature=0.1, **options, **vars(docs))

    def alone(rows, columns, offset):
        fields = {name: value[columns] for name, value in vars(docs).items() if value is not None}
        fields["owner"] = torch.where(fields["owner"] >= 0, fields["owner"] - offset, -1)
        return info_nce(queries[rows], documents[columns], temperature=0.1, **options, **fields)

    parts = 2 * alone(slice(0, 2), first, 0) + 2 * alone(slice(2, 5), ~first, 2)  # query 3 has no positive
    assert_equal(with_gradients(whole, queries, documents), with_gradients(parts / 4, queries, documents))
    assert abs(whole - info_nce(queries, documents, temperature=0.1, **options, **vars(docs))) > 1e-3
    fields = triplet_fields(docs)
    assert triplet(queries, documents, groups=groups, **fields) < triplet(queries, documents, **fields)
    assert count_candidates(5, groups=groups, **vars(docs)) < count_candidates(5, **vars(docs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"hardness": -1.0}, "hardness"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"candidates": "same_slot", "slot": None}, "slot"),
        ({"document_ids": None}, "document_ids"),
        ({"owner": torch.zeros(15, dtype=torch.int64)}, "owner"),
        ({"positive": torch.ones(17, dtype=torch.bool)}, "positive"),
        ({"slot": torch.zeros(16, 1, dtype=torch.int64)}, "slot"),
        ({"document_ids": torch.zeros(1, dtype=torch.int64)}, "document_ids"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}: got"):
        info_nce(*embeddings(16), **{**vars(ragged()), **change})


def test_triplet_worked_out_by_hand():
    """margin .2; q0 = (1, 0): positive (.6, .8) scores .6, hardest candidate (.8, .6) scores .8: .2 - .6 + .8 = .4;
    q1 = (0, 1): positive (.8, .6) scores .6, hardest candidate (.6, .8) scores .8: .4; with margin 0 both are .2.
    The hard negative (-1, 0) of q0 is never the hardest.
    """
    queries, documents = torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    fields = {"owner": torch.tensor([0, 1, 0]), "positive": torch.tensor([True, True, False])}
    assert triplet(queries, documents, margin=0.2, **fields).item() == pytest.approx(0.4)
    assert triplet(queries, documents, margin=0.0, **fields).item() == pytest.approx(0.2)


def naive_triplet(queries, documents, docs, margin):
    of_queries = []
    for i in range(len(queries)):
        terms = []
        for p in range(len(documents)):
            if docs.owner[p] == i and docs.positive[p]:
                others = [queries[i] @ documents[d] for d in naive_candidates(i, p, docs, "all")]
                terms.append(torch.relu(margin - queries[i] @ documents[p] + torch.stack(others).max()))
        if terms:
            of_queries.append(sum(terms) / len(terms))
    return sum(of_queries) / len(of_queries)


def triplet_fields(docs):
    return {name: value for name, value in vars(docs).items() if name != "slot"}


def test_triplet_equals_the_definition():
    docs, inputs = ragged(), embeddings(16)
    found, expected = triplet(*inputs, **triplet_fields(docs)), naive_triplet(*inputs, docs, 0.2)
    assert_equal(with_gradients(found, *inputs), with_gradients(expected, *inputs))
    assert torch.autograd.gradcheck(lambda *inputs: triplet(*inputs, **triplet_fields(docs)), inputs)


def test_triplet_without_candidates_or_positives_is_zero_with_a_finite_gradient():
    for docs in (listing([(0, 0, 1)]), listing([(0, -1, 1)]), listing([(-1, 0, 1)])):
        inputs = embeddings(1, queries=1)
        loss, *gradients = with_gradients(triplet(*inputs, **triplet_fields(docs)), *inputs)
        assert loss == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_triplet_is_finite_on_zero_vectors_and_bf16_and_refuses_a_negative_margin():
    docs = ragged()
    for inputs in (
        [torch.zeros(5, 6, requires_grad=True), torch.zeros(16, 6, requires_grad=True)],
        embeddings(16, dtype=torch.bfloat16),
    ):
        assert all(
            value.isfinite().all() for value in with_gradients(triplet(*inputs, **triplet_fields(docs)), *inputs)
        )
    with pytest.raises(ValueError, match=r"^margin: got"):
        triplet(*embeddings(16), margin=-0.1, **triplet_fields(docs))


def test_list_softmax_worked_out_by_hand():
    """t = 1, q0 = (1, 0), its list scores 1, .6, 0 with gains 2, 1, 0; the document of q1 does not count.

    log sum e^s = ln(e + e^.6 + 1) = 1.712067; -(2/3 (1 - 1.712067) + 1/3 (.6 - 1.712067)) = 0.845400
    q1 has only a gain of 0, so it has no term.
    """
    queries = torch.eye(2)
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    owner, scores = torch.tensor([0, 0, 0, 1]), torch.tensor([2.0, 1.0, 0.0, 0.0])
    assert list_softmax(queries, documents, owner=owner, scores=scores, temperature=1.0).item() == pytest.approx(
        0.845400, abs=2e-6
    )


def test_list_softmax_equals_the_definition():
    docs, inputs = ragged(), embeddings(16)
    scores = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores[docs.owner == 3] = 0
    terms = []
    for i in (0, 1, 2, 4):
        own = [d for d in range(16) if docs.owner[d] == i]
        exponentials = [torch.exp(inputs[0][i] @ inputs[1][d] / 0.3) for d in own]
        shares = [one / sum(exponentials) for one in exponentials]
        total = sum(scores[d] for d in own)
        terms.append(-sum(scores[d] / total * torch.log(share) for d, share in zip(own, shares, strict=True)))

    def loss(queries, documents):
        return list_softmax(queries, documents, owner=docs.owner, scores=scores, temperature=0.3)

    assert_equal(with_gradients(loss(*inputs), *inputs), with_gradients(sum(terms) / 4, *inputs))
    assert torch.autograd.gradcheck(loss, inputs)
    half = embeddings(16, dtype=torch.bfloat16)
    assert all(value.isfinite().all() for value in with_gradients(loss(*half), *half))


def test_list_softmax_without_any_gain_is_zero_with_a_finite_gradient():
    inputs = embeddings(2, queries=2)
    found = list_softmax(*inputs, owner=torch.tensor([0, -1]), scores=torch.tensor([0.0, 1.0]))
    loss, *gradients = with_gradients(found, *inputs)
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
