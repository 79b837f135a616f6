"""Values and gradients from elsewhere: our own naive NumPy (make_golden.py), and the reference implementation's.

The reference's file lies outside the repository, so those tests are skipped where it is not there.
"""

import json
from pathlib import Path

import pytest
import torch

from codiemb.losses import info_nce, mid_nce, pearson, pro, rank_kl

OURS = json.loads(Path(__file__).with_name("golden.json").read_text())
REFERENCE_FILE = Path(__file__).parents[3] / "shared" / "golden" / "reference_losses.json"
REFERENCE = json.loads(REFERENCE_FILE.read_text()) if REFERENCE_FILE.is_file() else None
of_the_reference = pytest.mark.skipif(REFERENCE is None, reason=f"no {REFERENCE_FILE}")

ON_COSINES = {"pearson": pearson, "rank_kl": rank_kl, "pro": pro}


def assert_golden(loss, inputs, value, gradients):
    """`loss` of the float32 `inputs` has this value and, by each of them, these gradients."""
    leaves = [torch.tensor(one, requires_grad=True) for one in inputs]
    found = loss(*leaves)
    found_gradients = torch.autograd.grad(found, leaves)
    for one, other in zip((found.detach(), *found_gradients), (value, *gradients), strict=True):
        torch.testing.assert_close(one, torch.tensor(other), rtol=1e-4, atol=1e-5)


def cases(section):
    """The cases of a section of the reference's file, by number; one skipped test where the file is missing."""
    content = REFERENCE[section] if REFERENCE else [None]
    return pytest.mark.parametrize("case", content, ids=[str(number) for number in range(len(content))])


@pytest.mark.parametrize("name", ON_COSINES)
@pytest.mark.parametrize("case", OURS["similarity"], ids=["distinct", "graded", "binary"])
def test_losses_on_cosines(case, name):
    options = {} if name == "pearson" else {"temperature": case["temperature"]}
    target = torch.tensor(case["target"])
    assert_golden(
        lambda predicted: ON_COSINES[name](predicted, target, **options),
        [case["predicted"]],
        case[name]["loss"],
        [case[name]["grad"]],
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("case", OURS["retrieval"], ids=["all", "same_slot"])
def test_info_nce(case, chunk_size):
    owner, slot, ids = torch.tensor(case["listed"]).T
    assert_golden(
        lambda queries, documents: info_nce(
            queries,
            documents,
            owner=owner,
            positive=slot >= 0,
            slot=slot,
            document_ids=ids,
            relevant=torch.tensor(case["relevant"]),
            temperature=case["temperature"],
            candidates=case["candidates"],
            chunk_size=chunk_size,
        ),
        [case["queries"], case["documents"]],
        case["loss"],
        [case["grad_queries"], case["grad_documents"]],
    )


@pytest.mark.parametrize("case", OURS["mid_nce"], ids=["pairs"])
def test_mid_nce(case):
    target, options = torch.tensor(case["target"]), {name: case[name] for name in ("threshold", "temperature")}
    assert_golden(
        lambda left, right: mid_nce(left, right, target, **options),
        [case["left"], case["right"]],
        case["loss"],
        [case["grad_left"], case["grad_right"]],
    )


@of_the_reference
@pytest.mark.parametrize(
    ("name", "field"), [("pearson", "pearson"), ("rank_kl", "rank_kl_t0.05_batchmean"), ("pro", "pro_t0.05")]
)
@cases("similarity")
def test_losses_on_cosines_of_the_reference(case, name, field):
    target = torch.tensor(case["target"])
    expected = case[field]
    assert_golden(
        lambda predicted: ON_COSINES[name](predicted, target),  # the defaults are the reference's
        [case["predicted"]],
        expected["loss"],
        [expected["grad"]],
    )


@of_the_reference
@pytest.mark.parametrize("chunk_size", [None, 3])
@cases("retrieval")
def test_info_nce_of_the_reference(case, chunk_size):
    """Documents of query i are rows i * (P + N) ..: P positives, then N negatives."""
    positives, listed = case["positives_per_query"], case["positives_per_query"] + case["negatives_per_query"]
    queries = len(case["queries"])
    slot = torch.arange(listed).where(torch.arange(listed) < positives, -1).repeat(queries)
    assert_golden(
        lambda q, d: info_nce(
            q,
            d,
            owner=torch.arange(queries).repeat_interleave(listed),
            positive=slot >= 0,
            slot=slot,
            temperature=case["temperature"],
            candidates=case["candidates"],
            chunk_size=chunk_size,
        ),
        [case["queries"], case["documents"]],
        case["loss"],
        [case["grad_queries"], case["grad_documents"]],
    )


@of_the_reference
@cases("mid_layer_info_nce")
def test_mid_nce_of_the_reference(case):
    target, options = torch.tensor(case["target"]), {name: case[name] for name in ("threshold", "temperature")}
    assert_golden(
        lambda left, right: mid_nce(left, right, target, **options),
        [case["left"], case["right"]],
        case["loss"],
        [case["grad_left"], case["grad_right"]],
    )
