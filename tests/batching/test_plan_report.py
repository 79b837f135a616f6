"""The report counts what it says it counts, and warns of data that trains to wrong numbers."""

import json

import numpy as np
import pytest

from codiemb.batching.plan import Plan
from codiemb.batching.plan_report import plan_report
from codiemb.config import Config, Source
from codiemb.data.store import load_records

QUESTIONS = [{"query": "one two", "positives": [f"a b c d {n}"], "negatives": [f"x {n}"]} for n in range(8)]
PAIRS = [{"query": f"left {n}", "positives": [f"right {n}"], "positive_scores": [n / 4]} for n in range(5)]
LENGTHS = {"query": 8, "document": 5, "similarity": None}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_CACHE", str(tmp_path / "cache"))


def count_words(texts, role) -> np.ndarray:
    return np.array([len(text.split()) for text in texts])


@pytest.fixture
def report(tmp_path):
    def report(questions=QUESTIONS, pairs=PAIRS, suite=(), batching=None):
        data = []
        for name, task, rows in (("questions", "retrieval", questions), ("pairs", "similarity", pairs)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data.append({"name": name, "task": task, "path": str(path)})
        settings = {"output_dir": "x", "model": {"base": "x"}, "data": data, "train": {"num_train_epochs": 3}}
        settings["batching"] = batching or {"retrieval": {"batch_size": 3}, "similarity": {"batch_size": 2}}
        config = Config.model_validate(settings)
        records = {source.name: load_records(source) for source in config.data}
        sizes = {name: len(source) for name, source in records.items()}
        tasks = {name: source.source.task for name, source in records.items()}
        plan = Plan(sizes, tasks, config.batching, config.seed)
        return plan_report(config, records, plan, count_words, LENGTHS, list(suite))

    return report


def test_rows_batches_and_steps(report):
    """8 rows in threes and 5 in twos: 3 + 3 batches, in 3 epochs 18 steps."""
    content = report().content
    assert (content["steps_per_epoch"], content["steps"]) == (6, 18)
    questions, pairs = content["sources"]["questions"], content["sources"]["pairs"]
    assert (questions["rows"], questions["rows_used"], questions["batches"], questions["passes"]) == (8, 8, 3, 1)
    assert (pairs["rows"], pairs["rows_used"], pairs["batches"], pairs["passes"]) == (5, 5, 3, 1)
    assert content["share_of_steps_by_task"] == {"retrieval": 0.5, "similarity": 0.5}
    assert (questions["positives_per_query"], questions["negatives_per_query"]) == (1, 1)


def test_drop_last_is_counted(report):
    batching = {"drop_last": True, "retrieval": {"batch_size": 3}, "similarity": {"batch_size": 2}}
    sources = report(batching=batching).content["sources"]
    assert sources["questions"]["dropped"] == {"in the last batch of a pass, with drop_last": 2}
    assert (sources["questions"]["rows_used"], sources["pairs"]["rows_used"]) == (6, 4)


def test_dropped_rows_are_in_the_text(report):
    result = report(questions=[*QUESTIONS, {"query": "", "positives": ["a"]}, QUESTIONS[0]])
    facts = result.content["sources"]["questions"]
    assert (facts["rows"], facts["rows_used"]) == (10, 8)
    assert "questions: 1 empty query" in result.text()
    assert "questions: 1 duplicate of an earlier row" in result.text()


def test_truncated_tokens(report):
    """Half of the documents are positives of 5 words; two of them get a sixth, beyond the 5 kept: 2 of 16."""
    longer = [row | {"positives": [row["positives"][0] + " more"]} for row in QUESTIONS[:2]]
    tokens = report(questions=[*longer, *QUESTIONS[2:]]).content["sources"]["questions"]["tokens"]
    assert tokens["document"]["max"] == 6
    assert tokens["document"]["max_length"] == 5
    assert tokens["document"]["sampled_texts"] == 16
    assert tokens["document"]["truncated"] == 2 / 16
    assert tokens["query"]["truncated"] == 0


def test_histogram_of_lengths(report):
    """Stretches that are too wide hide the middle, and one very long text must not make them so.

    198 queries of 2 to 48 tokens and one of 1,000: the 99th percentile is 48, so stretches are 3 wide, of which 48 is
    in the last but one, number 16; the long one is in the last.
    """
    words = [*(2 + n % 47 for n in range(188)), *[48] * 10, 1000]
    rows = [{"query": f"{n} " + "w " * (count - 1), "positives": [f"a b c d {n}"]} for n, count in enumerate(words)]
    tokens = report(questions=rows).content["sources"]["questions"]["tokens"]["query"]
    assert (tokens["p99"], tokens["max"]) == (48, 1000)
    counts = tokens["histogram"]["counts"]
    assert tokens["histogram"]["width"] == 3
    assert counts == [sum(count // 3 == place for count in words) for place in range(17)] + [1]
    assert len(json.dumps(tokens["histogram"])) < 200


def test_no_limit_truncates_nothing(report):
    tokens = report().content["sources"]["pairs"]["tokens"]["similarity"]
    assert (tokens["max_length"], tokens["truncated"], tokens["p50"]) == (None, 0, 2)


def test_swapped_columns_are_warned_of(report):
    assert report().warnings == []
    swapped = [{"query": "w " * 20 + str(n), "positives": [f"short {n}"]} for n in range(8)]
    result = report(questions=swapped)
    assert len(result.warnings) == 1
    assert "questions: queries are longer than documents (21 against 2 tokens" in result.warnings[0]
    assert "warning: questions: queries are longer" in result.text()


def test_scores_of_the_wrong_range_are_warned_of(report):
    narrow = [row | {"positive_scores": [n / 40]} for n, row in enumerate(PAIRS)]
    warning, of_mid_nce = report(pairs=narrow).warnings
    assert "pairs: scores cover 0 to 0.1 of score_range 0 to 1" in warning
    assert "mid_nce learns nothing" in of_mid_nce
    (warning,) = report(pairs=[row | {"positive_scores": [1]} for row in PAIRS]).warnings
    assert "pairs: every score is 1" in warning


def test_histogram_of_scores(report):
    """0, 0.25, 0.5, 0.75 and 1 fall into tenths 0, 2, 5, 7 and, with the upper end, 9."""
    scores = report().content["sources"]["pairs"]["scores"]
    assert scores["histogram"] == [1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert (scores["lowest"], scores["highest"]) == (0, 1)


def test_many_passes_are_warned_of(report):
    batching = {"schedule": "round_robin", "retrieval": {"batch_size": 5}, "similarity": {"batch_size": 2}}
    few = [row | {"query": f"q {n}"} for n, row in enumerate(PAIRS * 5)]
    (warning,) = report(questions=QUESTIONS[:4], pairs=few, batching=batching).warnings
    assert "questions: read 13 times an epoch" in warning


def test_settings_of_another_schedule_are_warned_of(report):
    """Who forgets `schedule: weights` would train another mixture than the one that is written down."""
    (warning,) = report(batching={"weights": {"questions": 1, "pairs": 3}}).warnings
    assert "batching.weights is of the schedule weights; the schedule is proportional" in warning
    assert report(batching={"schedule": "weights", "weights": {"questions": 1, "pairs": 3}}).warnings == []


def test_evaluation_texts_that_are_trained_on(report, tmp_path):
    """Of three distinct evaluation queries one is a training query; of four texts of pairs two are trained on."""
    rows = [{"query": text, "positives": ["z"]} for text in ("one two", "new", "newer")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [PAIRS[0], {"query": "new", "positives": ["newer"], "positive_scores": [1]}]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    suite = [
        Source(name="test", task="retrieval", path=str(tmp_path / "test.jsonl")),
        Source(name="sts", task="similarity", path=str(tmp_path / "sts.jsonl")),
    ]
    result = report(suite=suite)
    found = {
        (entry["data_set"], entry["source"]): (entry["shared"], entry["texts"]) for entry in result.content["overlap"]
    }
    assert found == {
        ("test", "questions"): (1, 3),
        ("test", "pairs"): (0, 3),
        ("sts", "questions"): (0, 4),
        ("sts", "pairs"): (2, 4),
    }
    assert "sts: 2 of 4 evaluation texts are trained on, in pairs" in result.text()


def test_the_report_is_json(report):
    assert json.loads(json.dumps(report().content, allow_nan=False)) == report().content
