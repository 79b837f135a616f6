"""What the run was: its configuration, complete, and the machine and versions it ran on."""

from __future__ import annotations

from typing import Any

from codiemb.figures.markup import Markup, element, fold, section, table
from codiemb.report.run_folder import Run


def settings_section(run: Run) -> Markup | None:
    """The resolved configuration and the environment."""
    if not run.config and not run.environment:
        return None
    rows = [[key, value] for key, value in _flat(run.environment)]
    return section(
        "settings",
        "Configuration and environment",
        "Every setting as it was resolved; this text is a configuration file that can be run again.",
        fold("config.yaml", element("pre", run.config, tabindex="0")) if run.config else None,
        fold("Environment", table(["", "value"], rows, "Environment")) if rows else None,
    )


def _flat(value: dict[str, Any], path: str = "") -> list[tuple[str, str]]:
    found = []
    for key, inner in value.items():
        place = f"{path}.{key}" if path else str(key)
        found += _flat(inner, place) if isinstance(inner, dict) else [(place, str(inner))]
    return found
