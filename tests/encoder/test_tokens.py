"""Micro-batches are cut where it costs least; what is in them is tested with the engine."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codiemb.encoder.tokens import cheapest_cuts


@pytest.mark.parametrize(
    ("widths", "budget", "own", "expected"),
    [
        ([64, 64, 8, 8], 1000, 10, [(0, 2), (2, 4)]),  # two cost 128 + 16 + 20, one 256 + 10
        ([16, 16, 8, 8], 1000, 20, [(0, 4)]),  # two cost 32 + 16 + 40, one 64 + 20
        ([16, 16, 16], 32, 0, [(0, 1), (1, 3)]),  # three do not fit
        ([64, 8], 32, 0, [(0, 1), (1, 2)]),  # a row longer than the budget stands alone
        ([], 32, 5, []),
    ],
)
def test_cuts_worked_out_by_hand(widths, budget, own, expected):
    assert cheapest_cuts(np.array(widths, dtype=np.int64), budget, own) == expected


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=9).map(lambda widths: sorted(widths, reverse=True)),
    st.integers(1, 60),
    st.integers(0, 40),
)
def test_no_way_to_cut_costs_less(widths, budget, own):
    """All 2^(n - 1) of them are tried."""

    def cost(ranges):
        sizes = [(stop - start, (stop - start) * widths[start]) for start, stop in ranges]
        fit = all(rows == 1 or tokens <= budget for rows, tokens in sizes)
        return sum(tokens + own for _, tokens in sizes) if fit else float("inf")

    found = cheapest_cuts(np.array(widths), budget, own)
    assert [place for start, stop in found for place in range(start, stop)] == list(range(len(widths)))
    everything = []
    for cuts in product([False, True], repeat=len(widths) - 1):
        edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(widths)]
        everything.append(cost(list(pairwise(edges))))
    assert cost(found) == min(everything)
