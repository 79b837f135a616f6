"""The model card tells the scores as the report does."""

from types import SimpleNamespace

import pytest

from codiemb.batching.plan_report import PlanReport
from codiemb.config import Config, Source
from codiemb.report.facts import Comparison
from codiemb.training.card import write_card

BASE = {"faq": {"ndcg_at_10": 0.68, "map": 0.5}, "sts": {"spearman": 0.5553}}
TRAINED = {"faq": {"ndcg_at_10": 0.7429, "map": 0.49}, "sts": {"spearman": 0.6721}}
LINE = {"task": "retrieval", "metric": "ndcg_at_10", "reference": 0.68, "model": 0.7429, "difference": 0.0629}
COMPARISON = {
    "reference": "base",
    "comparisons": [
        {"model": "model", "data_sets": [{**LINE, "name": "faq", "interval": [0.031, 0.094], "verdict": "better"}]}
    ],
}


SUITE = [Source(name="faq", task="retrieval", path="f"), Source(name="sts", task="similarity", path="s")]


def prepared():
    """What of a prepared run the card is made of."""
    sections = {"output_dir": "runs/joint", "model": {"base": "b"}}
    config = Config.model_validate({**sections, "data": [{"name": "faq", "task": "retrieval", "path": "f"}]})
    return SimpleNamespace(config=config, report=PlanReport({"sources": {}}, []), suite=SUITE)


@pytest.fixture
def card(tmp_path):
    def card(comparison=None):
        made_of = prepared()
        write_card(tmp_path, made_of.config, made_of.report, BASE, TRAINED, made_of.suite, comparison)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        return (tmp_path / "README.md").read_text()

    return card


def test_differences_without_tests_say_so(card):
    text = card()
    assert "| faq | retrieval | ndcg_at_10 | 68.00 | 74.29 | +6.29 | | |" in text
    assert "| faq | retrieval | map | 50.00 | 49.00 | -1.00 | | |" in text
    assert "The differences are not tested." in text


def test_intervals_and_marks_stand_beside_what_was_tested(card):
    text = card(Comparison.model_validate(COMPARISON))
    assert "| faq | retrieval | ndcg_at_10 | 68.00 | 74.29 | +6.29 | [+3.10, +9.40] | better |" in text
    assert "| faq | retrieval | map | 50.00 | 49.00 | -1.00 | | |" in text
    assert "| sts | similarity | spearman | 55.53 | 67.21 | +11.68 | | |" in text
    assert "not tested" not in text


MEANS = [
    {**LINE, "interval": [0.031, 0.094], "verdict": "better"},
    {**LINE, "task": "all", "metric": "mean", "reference": 0.61765, "model": 0.7075, "difference": 0.08985,
     "interval": [0.05, 0.12], "verdict": "better"},
]  # fmt: skip


def test_means_by_task_and_of_all_with_what_was_tested(card):
    """Retrieval is one data set; all are (68.00 + 55.53) / 2 and (74.29 + 67.21) / 2. Similarity was not compared."""
    (compared,) = COMPARISON["comparisons"]
    text = card(Comparison.model_validate({**COMPARISON, "comparisons": [{**compared, "means": MEANS}]}))
    assert "| **mean** | retrieval | ndcg_at_10 | 68.00 | 74.29 | +6.29 | [+3.10, +9.40] | better |" in text
    assert "| **mean** | similarity | spearman | 55.53 | 67.21 | +11.68 | | |" in text
    assert "| **mean** | all |  | 61.77 | 70.75 | +8.98 | [+5.00, +12.00] | better |" in text


def test_an_interval_stands_beside_its_own_difference_only(card):
    """A comparison that left data sets out has another mean, and one of older scores another difference."""
    (compared,) = COMPARISON["comparisons"]
    others = {
        "data_sets": [{**line, "model": 0.75} for line in compared["data_sets"]],
        "means": [{**line, "reference": 0.5} for line in MEANS],
    }
    text = card(Comparison.model_validate({**COMPARISON, "comparisons": [{**compared, **others}]}))
    assert "better" not in text
    assert "The differences are not tested." in text


def test_a_comparison_with_another_reference_is_not_before_and_after(card):
    text = card(Comparison.model_validate({**COMPARISON, "reference": "other"}))
    assert "better" not in text
