"""`report.html`: the sections of a run on one page, which needs no other file and asks for none."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from codiemb.figures import picture
from codiemb.figures.markup import Markup, clean, duration, element, join, name, plural
from codiemb.files import require_folder, told_of_full_disk, write_whole
from codiemb.report.conflict import conflict_section
from codiemb.report.data import data_section
from codiemb.report.examples import examples_section
from codiemb.report.fusion import fusion_section
from codiemb.report.geometry import geometry_section
from codiemb.report.results import during_section, headline_section, results_section
from codiemb.report.run_folder import Run, read_run
from codiemb.report.settings import settings_section
from codiemb.report.training import cost_section, loss_section, schedule_section

STYLES = (picture.STYLE, Path(__file__).with_name("page.css"))
SECTIONS = {
    "results": ("Results", results_section),
    "during": ("During training", during_section),
    "loss": ("Losses", loss_section),
    "schedule": ("Schedule", schedule_section),
    "cost": ("Speed", cost_section),
    "data": ("Data", data_section),
    "geometry": ("Geometry", geometry_section),
    "conflict": ("Conflict", conflict_section),
    "fusion": ("Fusion", fusion_section),
    "examples": ("Examples", examples_section),
    "settings": ("Settings", settings_section),
}


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder; an earlier one stays until the new one is whole.

    Raises:
        CheckpointError: no run is there, a file of it is damaged, or there is no room on the disk.
        EvaluationError: scores or comparisons are damaged.
        ConfigError: the folder cannot be written.
    """
    content = page(read_run(folder))
    require_folder("run folder", folder)
    with told_of_full_disk(folder, "free some disk"):
        write_whole(folder / "report.html", content)
    return folder / "report.html"


def page(run: Run) -> str:
    """The page of a run; what it has no files for is left out."""
    drawn = {anchor: block for anchor, (_, draw) in SECTIONS.items() if (block := draw(run)) is not None}
    style = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{run.name} · CoDiEmb report"),
        element("style", Markup(style)),
    )
    links = [element("a", SECTIONS[anchor][0], href=f"#{anchor}") for anchor in drawn]
    body = element(
        "body",
        element(
            "header",
            element("p", "CoDiEmb report", class_="kicker"),
            element("h1", name(run.name)),
            element("p", *_lede(run), class_="lede"),
        ),
        element("nav", *links, aria_label="Sections") if len(links) > 1 else None,
        element("main", headline_section(run), *drawn.values()),
        element("footer", element("p", _made_by(run))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _lede(run: Run) -> list[Markup]:
    """The run in a sentence."""
    parts = []
    if run.steps:
        sources = {source for step in run.steps for source in step.source.split("+")}
        seconds = sum(step.seconds for step in run.steps)
        parts.append(f"{plural(len(run.steps), 'step')} on {plural(len(sources), 'source')} in {duration(seconds)}")
        if peak := max(step.peak_memory_bytes for step in run.steps):
            parts.append(f"{peak / 1e9:.1f} GB of memory at most")
    device = run.environment.get("device")
    if device:
        parts.append(
            " ".join(str(run.environment[key]) for key in ("device", "device_name") if run.environment.get(key))
        )
    if isinstance(processes := run.environment.get("world_size"), int):
        parts.append("1 process" if processes == 1 else f"{processes} processes")
    if run.environment.get("seed") is not None:
        parts.append(f"seed {run.environment['seed']}")
    if run.unfinished:
        parts.append("the last line of metrics.jsonl was never finished and is left out")
    shown = [element("span", clean(part)) for part in parts]
    return [join([*([Markup(" · ")] if place else []), one]) for place, one in enumerate(shown)]


def _made_by(run: Run) -> str:
    versions = run.environment.get("versions")
    version = versions.get("codiemb") if isinstance(versions, dict) else None
    trained = f", trained with codiemb {version}" if version else ""
    return f"Made by codiemb report from the files of the run{trained}. Nothing is loaded from elsewhere."
