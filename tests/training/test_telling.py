"""What a run tells at its end: the report, and the card once there are tests."""

from codiemb.training import run
from tests.report import runs
from tests.training.test_card import BASE, COMPARISON, TRAINED, prepared


def test_the_card_is_written_again_with_the_tests(tmp_path):
    """The comparison is made when the model stands already with its card."""
    (tmp_path / "model").mkdir()
    runs.write_json(tmp_path / "comparison.json", COMPARISON)
    run._tell(tmp_path, prepared(), BASE, TRAINED)
    assert "[+3.10, +9.40] | better |" in (tmp_path / "model" / "README.md").read_text()


def test_a_report_that_cannot_be_made_does_not_undo_a_training(tmp_path, monkeypatch):
    """After days of training a damaged file must not end the run with an error."""
    told = []
    monkeypatch.setattr(run.logger, "warning", told.append)
    (tmp_path / "comparison.json").write_text("{")
    run._tell(tmp_path, prepared(), BASE, TRAINED)
    (line,) = told
    assert line.startswith(f"no report: file {tmp_path / 'comparison.json'}: got")


def test_a_run_without_a_suite_has_a_report(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(run.logger, "info", told.append)
    runs.write_steps(tmp_path, [runs.step_line(1)])
    run._tell(tmp_path, prepared(), {}, {})
    assert told == [f"report {tmp_path / 'report.html'}"]
    assert (tmp_path / "report.html").is_file()
