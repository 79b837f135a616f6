"""A comparison for people: aligned text for the terminal, Markdown, or LaTeX; scores in points of 0 to 100."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]  # the first row is the header


def comparison_text(comparison: dict[str, Any], form: str = "table") -> str:
    """A table for each model, with what it says in words.

    Args:
        comparison: from `compare`, or read from `comparison.json`.
        form: a key of `FORMS`.
    """
    reference, settings = comparison["reference"], comparison["settings"]
    parts = []
    for one in comparison["comparisons"]:
        parts += [FORMS[form](_cells(one, reference, settings["confidence"])), _in_words(one, reference)]
    parts += [
        f"p: {settings['test']}. An interval and p are of one row alone; p (Holm) and the verdict are corrected for "
        "the number of data sets and models, those of means for the number of means."
    ]
    if settings["resamples"]:
        parts += ["One evaluation a model: another seed of the training may give another result."]
    if settings["left_out"]:
        names = ", ".join(settings["left_out"])
        parts += [f"Left out, because not every evaluation has items that make up their score: {names}."]
    comment = "% " if form == "latex" else ""
    return "\n\n".join(part if "\n" in part else comment + part for part in parts)


def _cells(one: dict[str, Any], reference: str, confidence: float) -> Cells:
    header = ["data set", "metric", "n", reference, one["model"], "difference", f"{100 * confidence:g} % interval"]
    header += ["p", "p (Holm)", "effect size", "verdict"]
    sets = Counter(row["task"] for row in one["data_sets"])
    sets["all"] = len(one["data_sets"])
    means = [
        {**row, "name": "mean of all" if row["task"] == "all" else f"mean {row['task']}"}
        for row in one["means"]
        if sets[row["task"]] > 1 and not (row["task"] == "all" and len(sets) == 2)  # else it repeats another row
    ]
    return [header, *(_line(row) for row in (*one["data_sets"], *means))]


def _line(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [
        row["name"],
        row["metric"],
        str(row["n"]),
        _score(row["reference"], row["reference_spread"]),
        _score(row["model"], row["model_spread"]),
        f"{100 * row['difference']:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        _p(row["p"]),
        _p(row["p_holm"]),
        "-" if row["effect_size"] is None else f"{row['effect_size']:+.2f}",
        row["verdict"],
    ]


def _score(score: float, spread: float | None) -> str:
    return f"{100 * score:.2f}" if spread is None else f"{100 * score:.2f} ± {100 * spread:.2f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _in_words(one: dict[str, Any], reference: str) -> str:
    rows = one["data_sets"]
    count = Counter(row["verdict"] for row in rows)
    verdicts = [verdict for verdict in ("better", "worse", "no difference shown") if count[verdict]]
    said = ", ".join(f"{verdict} on {count[verdict]}" for verdict in verdicts)
    if verdicts == ["no difference shown"]:
        said = "no difference shown on any"
    return f"{one['model']} against {reference}, {len(rows)} data set{'s' * (len(rows) > 1)}: {said}."


def _aligned(cells: Cells) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if _is_number(column, len(row)) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _markdown(cells: Cells) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---:" if _is_number(column, len(cells[0])) else "---" for column in range(len(cells[0]))]
    return "\n".join(
        [f"| {' | '.join(escaped[0])} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in escaped[1:])]
    )


def _latex(cells: Cells) -> str:
    """With the rules of the package booktabs."""
    columns = "".join("r" if _is_number(column, len(cells[0])) else "l" for column in range(len(cells[0])))
    lines = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in cells]
    body = [lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", r"\toprule", *body])


_LATEX = {"±": r"$\pm$", "<": "$<$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "_%&#${}"}


def _escaped(cell: str) -> str:
    if cell[1:2].isdigit() and cell[0] in "+-":  # a signed number: a true minus sign
        return " to ".join(f"${number}$" for number in cell.split(" to "))
    return "".join(_LATEX.get(character, character) for character in cell)


def _is_number(column: int, columns: int) -> bool:
    """Words stand at the front (data set, metric) and the end (verdict)."""
    return 2 <= column < columns - 1


FORMS: dict[str, Callable[[Cells], str]] = {"table": _aligned, "markdown": _markdown, "latex": _latex}
