"""The data that was trained on: rows, lengths, scores, and what was found wrong with it."""

from __future__ import annotations

from codiemb.figures.charts import histogram
from codiemb.figures.markup import Markup, Number, element, fold, name, plural, section, table
from codiemb.report.facts import SourceFacts, Tokens
from codiemb.report.run_folder import Run
from codiemb.report.scores import colour


def data_section(run: Run) -> Markup | None:
    """Sources, warnings and histograms."""
    if not run.plan or not run.plan.sources:
        return None
    sources = run.plan.sources
    dropped = [
        [name(source), reason, count]
        for source, facts in sources.items()
        for reason, count in {**facts.dropped, **facts.texts_left_out}.items()
        if count
    ]
    shared = [[name(one.data_set), name(one.source), one.texts, one.shared] for one in run.plan.overlap if one.shared]
    figures = [chart for source, facts in sources.items() for chart in _figures(source, facts)]
    return section(
        "data",
        "Training data",
        "What an epoch does with the rows of each source. Lengths are of texts with their prompt, before they are cut.",
        element("ul", *(element("li", warning) for warning in run.plan.warnings), class_="warnings")
        if run.plan.warnings
        else None,
        table(
            ["source", "task", "rows", "used", "dropped", "batch size", "batches an epoch", "passes", "steps"],
            [_row(source, facts) for source, facts in sources.items()],
            "Sources",
        ),
        fold("What was left out", table(["source", "reason", "count"], dropped, "What was left out"))
        if dropped
        else None,
        fold(
            "Evaluation texts that are trained on", table(["data set", "source", "texts", "shared"], shared, "Overlap")
        )
        if shared
        else None,
        element("div", *figures, class_="figures small"),
    )


def _row(source: str, facts: SourceFacts) -> list[object]:
    return [
        name(source), facts.task.replace("_", " "), facts.rows, facts.rows_used, sum(facts.dropped.values()),
        facts.batch_size, facts.batches, Number(f"{facts.passes:.2f}"), Number(f"{100 * facts.share_of_steps:.1f} %"),
    ]  # fmt: skip


def _figures(source: str, facts: SourceFacts) -> list[Markup]:
    charts = [_lengths(source, facts.task, role, tokens) for role, tokens in facts.tokens.items() if tokens.histogram]
    if facts.scores and facts.scores.range[0] < facts.scores.range[1]:
        (low, high), counts = facts.scores.range, facts.scores.histogram
        edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
        charts.append(
            histogram(f"{source}: scores", edges, counts, "score", "pairs",
                      about=f"{facts.scores.lowest:g} to {facts.scores.highest:g}", colour=colour(facts.task))
        )  # fmt: skip
    return charts


def _lengths(source: str, task: str, role: str, tokens: Tokens) -> Markup:
    assert tokens.histogram is not None
    counts, width = tokens.histogram.counts, tokens.histogram.width
    edges = [float(place * width) for place in range(len(counts) + 1)]
    sample = f"of {plural(tokens.sampled_texts, 'sampled text')}, " if tokens.sampled_texts else ""
    about = f"{sample}half up to {tokens.p50:,} tokens, longest {tokens.max:,}"
    if tokens.max_length is not None:
        about += f"; {100 * tokens.truncated:.1f} % are cut at {tokens.max_length:,}"
    # roles of similarity are named like the task
    what = "" if role == task else f", {role}"
    return histogram(
        f"{source}: lengths{what}", edges, counts, "tokens", "texts", about=about, colour=colour(task),
        mark=None if tokens.max_length is None else (tokens.max_length, "cut"), open_end=tokens.max >= edges[-1],
    )  # fmt: skip
