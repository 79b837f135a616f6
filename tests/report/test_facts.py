"""Lines of metrics.jsonl, read."""

from codiemb.report.facts import Step
from codiemb.report.over_steps import cut_of, series
from tests.report import runs


def test_a_line_of_few_steps_is_the_steps():
    steps = [Step.model_validate(runs.step_line(n)) for n in (1, 2, 3)]
    line = series("loss", steps, lambda step: step.loss, cut_of(steps))
    assert line.points == [(1, 3), (2, 1.5), (3, 1)]
    assert not line.spread


def test_a_part_of_a_step_is_looked_up_by_name():
    """Of parts that hold a number; a dict of all parts for each part of each step took most of the page's time."""
    step = Step.model_validate(runs.step_line(1, **{"loss/text": "high", "loss/none": None, "loss/zero": 0}))
    assert step.parts("loss") == ["info_nce", "text", "none", "zero"]
    assert [step.part("loss", name) for name in (*step.parts("loss"), "absent")] == [3.0, None, None, 0, None]
    assert step.part("seconds", "forward") == 0.3
