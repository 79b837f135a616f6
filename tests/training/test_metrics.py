"""Files with a line a step are cut where a run goes on."""

import pytest

from codiemb.errors import CheckpointError
from codiemb.training.metrics import written_until


@pytest.mark.parametrize("line", ['{"step": 4, "cos', "[]", '{"cosine": {}}', '{"step": null}', "[" * 100_000])
def test_a_damaged_line_is_told_when_a_run_resumes(tmp_path, line):
    """In one line, with what to do: a traceback would not say that the run itself can go on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 2}\n')
    assert written_until(path, 1) == ['{"step": 0}']
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2.*remove the line, or the file"):
        written_until(path, 4)


def test_lines_are_counted_by_their_step_and_a_torn_one_is_dropped(tmp_path):
    """The file begins at step 3 (the run was carried to another folder), and its process died while it wrote step 6."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 4}\n{"step": 5}\n{"ste')
    assert written_until(path, 4) == ['{"step": 3}', '{"step": 4}']
    assert len(written_until(path, 9)) == 3
