"""The plan for any lengths and settings: every row once a pass, one source a batch, exact length, evenly dealt."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb.batching.plan import Plan, slice_of
from codiemb.config import Batching
from codiemb.errors import ConfigError

SCHEDULES = ("proportional", "balanced", "round_robin", "temperature", "weights", "staged", "paired")


@st.composite
def plans(draw, schedules=SCHEDULES):
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    names = [f"source{number}" for number in range(len(lengths))]
    tasks = {name: draw(st.sampled_from(["retrieval", "similarity"])) for name in names}
    batching = Batching(
        schedule=draw(st.sampled_from(schedules)),
        temperature=draw(st.floats(0.5, 5)),
        weights={name: draw(st.floats(0.2, 3)) for name in names},
        stages=[["retrieval"], ["similarity"]],
        retrieval={"batch_size": draw(st.integers(1, 9))},
        similarity={"batch_size": draw(st.integers(2, 9))},
    )
    return Plan(dict(zip(names, lengths, strict=True)), tasks, batching, seed=draw(st.integers(0, 99)))


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 3))
def test_every_row_exactly_once_a_pass_and_at_least_once_an_epoch(plan, epochs):
    seen = defaultdict(Counter)
    for epoch in range(epochs):
        in_epoch = defaultdict(set)
        for step in plan.steps(epoch):
            for batch in step.batches:
                seen[batch.source, batch.pass_number].update(batch.rows.tolist())
                in_epoch[batch.source].update(batch.rows.tolist())
        for name, length in plan.lengths.items():
            if epoch == 0 or plan.batches_per_epoch[name] % plan.batches_per_pass[name] == 0:
                assert in_epoch[name] == set(range(length))
    last = {name: max(number for source, number in seen if source == name) for name in plan.names}
    for (name, number), rows in seen.items():
        assert max(rows.values()) == 1
        if number < last[name]:
            assert set(rows) == set(range(plan.lengths[name]))
    for name in plan.names:
        assert sorted(number for source, number in seen if source == name) == list(range(last[name] + 1))


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(0, 2))
def test_length_is_exact_and_batches_hold_one_source_of_at_most_batch_size(plan, epoch):
    steps = list(plan.steps(epoch))
    assert len(steps) == len(plan)
    counts = Counter(batch.source for step in steps for batch in step.batches)
    assert dict(counts) == plan.batches_per_epoch
    for step in steps:
        for batch in step.batches:
            assert 1 <= len(batch.rows) <= plan.batch_sizes[batch.source]
            assert batch.rows.max() < plan.lengths[batch.source]


@settings(max_examples=100, deadline=None)
@given(plans(schedules=["paired"]))
def test_a_paired_step_holds_one_batch_of_each_task(plan):
    present = sorted(set(plan.tasks.values()))
    for step in plan.steps(0):
        assert sorted(plan.tasks[batch.source] for batch in step.batches) == present


@settings(max_examples=100, deadline=None)
@given(plans(schedules=["proportional", "temperature", "weights"]))
def test_batches_are_dealt_evenly(plan):
    """In every prefix of the epoch a source has its share of batches, to within the jitter of its neighbours."""
    order = [names[0] for names in plan.order(0)]
    for name, count in plan.batches_per_epoch.items():
        share = count / len(order)
        for prefix in range(1, len(order) + 1):
            assert abs(order[:prefix].count(name) - share * prefix) <= len(plan.names) + 1


@settings(max_examples=50, deadline=None)
@given(plans())
def test_the_plan_is_a_pure_function(plan):
    again = Plan(plan.lengths, plan.tasks, plan.settings, plan.seed)
    for one, other in zip(plan.steps(1), again.steps(1), strict=True):
        for left, right in zip(one.batches, other.batches, strict=True):
            assert left.source == right.source
            assert left.rows.tolist() == right.rows.tolist()


@given(st.integers(0, 40), st.integers(1, 9))
def test_ranks_take_disjoint_slices_that_make_the_whole(rows, world_size):
    whole = np.arange(rows)
    slices = [slice_of(whole, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(slices).tolist() == whole.tolist()
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def make(schedule, lengths, batch_size=10, **settings):
    tasks = {name: "similarity" if name.startswith("s") else "retrieval" for name in lengths}
    sizes = {"retrieval": {"batch_size": batch_size}, "similarity": {"batch_size": batch_size}}
    return Plan(lengths, tasks, Batching(schedule=schedule, **sizes, **settings), seed=7)


def test_counts_worked_out_by_hand():
    """r1 has 100 rows = 10 batches, r2 has 45 = 5, s has 30 = 3."""
    lengths = {"r1": 100, "r2": 45, "s": 30}
    assert make("proportional", lengths).batches_per_epoch == {"r1": 10, "r2": 5, "s": 3}
    assert make("balanced", lengths).batches_per_epoch == {"r1": 10, "r2": 5, "s": 15}
    assert len(make("balanced", lengths)) == 30
    assert make("paired", lengths).batches_per_epoch == {"r1": 10, "r2": 5, "s": 15}
    assert len(make("paired", lengths)) == 15
    assert make("round_robin", lengths).batches_per_epoch == {"r1": 10, "r2": 10, "s": 10}
    assert make("temperature", lengths, temperature=1).batches_per_epoch == {"r1": 10, "r2": 5, "s": 3}
    # T = 2: shares sqrt(10) : sqrt(5) : sqrt(3), scaled so that the largest source makes one pass
    assert make("temperature", lengths, temperature=2).batches_per_epoch == {"r1": 10, "r2": 7, "s": 5}
    # weights 2 : 1 : 1; r1 and r2 both need 5 a unit weight, so 10 : 5 : 5
    assert make("weights", lengths, weights={"r1": 2, "r2": 1, "s": 1}).batches_per_epoch == {"r1": 10, "r2": 5, "s": 5}
    staged = make("staged", lengths, stages=[["retrieval"], ["r1", "similarity"]])
    assert staged.batches_per_epoch == {"r1": 20, "r2": 5, "s": 3}
    assert {name for (name,) in staged.order(0)[:15]} == {"r1", "r2"}


def test_balanced_alternates_tasks_strictly():
    tasks = [name[0] for (name,) in make("balanced", {"r1": 100, "r2": 45, "s": 30}).order(0)]
    assert tasks == ["r", "s"] * 15


def test_drop_last_leaves_out_the_remainder_and_counts_it():
    plan = make("proportional", {"r1": 45}, drop_last=True)
    assert len(plan) == 4
    assert plan.rows_per_pass("r1") == 40
    assert sum(len(step.batches[0].rows) for step in plan.steps(0)) == 40
    with pytest.raises(ConfigError, match="9 rows, expected at least batch_size = 10"):
        make("proportional", {"r1": 9}, drop_last=True)


def test_seed_and_epoch_change_the_rows_but_a_new_source_does_not():
    def rows(plan, epoch):
        return [step.batches[0].rows.tolist() for step in plan.steps(epoch) if step.batches[0].source == "r1"]

    plan = make("proportional", {"r1": 100})
    assert rows(plan, 0) != rows(plan, 1)
    other_seed = Plan(plan.lengths, plan.tasks, plan.settings, seed=8)
    assert rows(plan, 0) != rows(other_seed, 0)
    assert rows(plan, 0) == rows(make("proportional", {"r1": 100, "s": 50}), 0)


def test_longest_run():
    assert make("staged", {"r1": 50, "s": 30}).longest_run() == 5
    assert make("round_robin", {"r1": 50, "s": 30}).longest_run() == 1


def test_no_row_is_left_alone():
    """65 rows in batches of 32 would leave one: it takes a companion from the batch before."""
    plan = make("proportional", {"s": 65}, batch_size=32)
    assert sorted(len(step.batches[0].rows) for step in plan.steps(0)) == [2, 31, 32]
