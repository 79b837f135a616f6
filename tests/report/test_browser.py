"""The page in a real browser: it asks for nothing, complains of nothing, runs nothing, and fits a phone."""

from pathlib import Path

import pytest

from codiemb.report.page import write_report
from tests.report import runs
from tests.report.chromium import FOUND, browser
from tests.report.test_escaping import HOSTILE, hostile_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOUND is None, reason="no Chromium on this machine")]
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def test_a_whole_run(page, tmp_path):
    path = write_report(runs.whole_run(tmp_path / "joint"))
    assert page.open(path) < 1
    light = page.value(BACKGROUND)
    page.open(path, dark=True)
    dark = page.value(BACKGROUND)
    assert light != dark  # the style was applied, in both schemes
    page.settle()
    assert page.messages == []
    assert {*page.requests} == {path.resolve().as_uri()}
    for width in (320, 390, 768, 1200):
        page.open(path, width=width)
        assert page.value(WIDER) == 0, width
    assert page.value(
        "[...document.querySelectorAll('svg.plot')].every(one => one.getBoundingClientRect().width > 200)"
    )


def test_a_complaint_would_be_seen(page, tmp_path):
    """The test above hears nothing because there is nothing, not because it does not listen."""
    path = tmp_path / "loud.html"
    path.write_text("<img src='missing.png'><script>console.log('here')</script>")
    page.open(path)
    page.settle()
    assert (tmp_path / "missing.png").as_uri() in page.requests
    assert page.messages
    page.requests.clear()
    page.messages.clear()


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts(page, tmp_path, hostile):
    path = write_report(hostile_run(tmp_path / "run", hostile))
    page.requests.clear()
    page.open(path, width=390)
    page.settle(0.1)
    assert page.messages == []
    assert {*page.requests} == {path.resolve().as_uri()}
    assert page.value("document.querySelectorAll('script, img, iframe, [onmouseover], [onerror]').length") == 0
    assert page.value(WIDER) == 0


def test_a_page_of_paper(page, tmp_path):
    page.open(write_report(runs.whole_run(tmp_path / "joint")))
    page.pdf(tmp_path / "report.pdf")
    assert Path(tmp_path / "report.pdf").stat().st_size > 20_000
