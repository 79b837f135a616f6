"""What a run tells at its end: the report."""

from codiemb.training import results
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
