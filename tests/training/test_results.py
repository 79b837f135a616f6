"""What a run tells at its end: the table and the report."""

from pathlib import Path

import pytest

from codiemb.config import Source
from codiemb.training import results
from codiemb.training.results import TrainResult, results_table
from tests.report import runs


def test_a_report_that_cannot_be_made_does_not_undo_a_training(tmp_path, monkeypatch):
    """After days of training a damaged file must not end the run with an error."""
    told = []
    monkeypatch.setattr(results.logger, "warning", told.append)
    (tmp_path / "comparison.json").write_text("{")
    results.report_run(tmp_path)
    (line,) = told
    assert line.startswith(f"no report: file {tmp_path / 'comparison.json'}: got")


def test_a_run_without_a_suite_has_a_report(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(results.logger, "info", told.append)
    runs.write_steps(tmp_path, [runs.step_line(1)])
    results.report_run(tmp_path)
    assert told == [f"report {tmp_path / 'report.html'}"]
    assert (tmp_path / "report.html").is_file()


def test_a_report_that_breaks_does_not_undo_a_training(tmp_path, monkeypatch, caplog):
    """An error that nobody foresaw must not either: a warning, and the traceback for who asks for it."""

    def broken(run):
        raise IndexError("list index out of range")

    monkeypatch.setattr(results, "write_report", broken)
    caplog.set_level("DEBUG", results.logger.name)
    monkeypatch.setattr(results.logger, "propagate", True)
    results.report_run(tmp_path)
    warned, debugged = caplog.records
    assert warned.getMessage() == "no report: list index out of range"
    assert warned.exc_info is None
    assert debugged.levelname == "DEBUG"
    assert debugged.exc_info[0] is IndexError


@pytest.mark.parametrize("left_out", [False, True])
def test_an_interval_stands_beside_its_own_difference_only(left_out):
    """A comparison that left a data set out has the mean of the others; its interval is not that of the whole suite."""
    sets = {"a": (0.5, 0.6), "b": (0.2, 0.4)}
    suite = [Source(name=name, task="retrieval", path="x") for name in sets]

    def line(name, task, before, after):
        bounds = [after - before - 0.02, after - before + 0.02]
        return {
            "name": name, "task": task, "reference": before, "model": after, "interval": bounds, "verdict": "better"
        }  # fmt: skip

    mean = sets["a"] if left_out else (0.35, 0.5)
    compared = [line(name, "retrieval", *values) for name, values in sets.items() if not (left_out and name == "b")]
    comparison = {"reference": "base", "comparisons": [
        {"model": "model", "data_sets": compared, "means": [line("mean", "retrieval", *mean)]}
    ]}  # fmt: skip
    base, trained = ({name: {"ndcg_at_10": values[side]} for name, values in sets.items()} for side in (0, 1))
    table = results_table(TrainResult(Path("model"), base, trained, suite, {}, comparison)).splitlines()
    rows = {row[0]: row[-2:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)}
    assert rows["a"] == ["+8.00 to +12.00", "better"]
    assert rows["b"] == (["", ""] if left_out else ["+18.00 to +22.00", "better"])
    assert rows["**mean retrieval**"] == (["", ""] if left_out else ["+13.00 to +17.00", "better"])


def test_a_comparison_of_older_scores_marks_no_data_set():
    comparison = {"reference": "base", "comparisons": [{"model": "model", "means": [], "data_sets": [
        {"name": "a", "task": "retrieval", "reference": 0.5, "model": 0.7, "interval": [0.1, 0.3], "verdict": "better"}
    ]}]}  # fmt: skip
    suite = [Source(name="a", task="retrieval", path="x")]
    base, trained = {"a": {"ndcg_at_10": 0.5}}, {"a": {"ndcg_at_10": 0.6}}
    assert "better" not in results_table(TrainResult(Path("model"), base, trained, suite, {}, comparison))
