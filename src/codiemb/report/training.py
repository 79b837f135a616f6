"""The steps of the training: losses, which source at which step, speed and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from codiemb.figures.bins import Stretches, drawable, stretches
from codiemb.figures.charts import COLOURS, Line
from codiemb.figures.markup import Markup, Number, element, join, name, number, plural, section, table
from codiemb.figures.strips import Row, level, shares, strip
from codiemb.report.facts import Step
from codiemb.report.over_steps import chart, cut_of, of_a_point, series
from codiemb.report.run_folder import Run
from codiemb.report.scores import colour

COLUMNS = 240  # of the schedule
PHASES = ("data", "forward", "loss", "backward", "optimizer", "communication")


def loss_section(run: Run) -> Markup | None:
    """The loss of each task, and its parts."""
    if not run.steps:
        return None
    cut = cut_of(run.steps)
    by_task: dict[str, list[Step]] = {}
    for step in run.steps:
        by_task.setdefault(step.task, []).append(step)
    blocks = []
    for task, steps in by_task.items():
        first = task.split("+")[0]
        title = _words(task)
        charts = [chart(f"Loss, {title}", _by_source(steps, cut, colour(first)), cut, "loss")]
        parts = list(dict.fromkeys(part for step in steps for part in step.parts("loss")))
        for place, part in enumerate(parts if len(parts) > 1 else []):
            line = series(part, steps, _part(part), cut, place)
            charts.append(chart(part, [line], cut, "loss, unweighted"))
        blocks += [element("h3", title), element("div", *charts, class_="figures")]
    lost = sum(not drawable(step.loss) for step in run.steps)
    about = f"The weighted sum that is minimised, and its parts before they are weighted. {of_a_point(cut)}"
    if lost:
        about += f" In {plural(lost, 'step')} the loss is no number that a figure can hold; they are left out."
    return section("loss", "Losses", about, *blocks)


def _by_source(steps: Sequence[Step], cut: Stretches, colour_of_task: int) -> list[Line]:
    """A line for each source of a task if they are few, else one."""
    sources = list(dict.fromkeys(step.source for step in steps))
    if not 1 < len(sources) <= COLOURS:
        return [series("loss", steps, _loss, cut, colour_of_task)]
    return [
        series(source, [step for step in steps if step.source == source], _loss, cut, place)
        for place, source in enumerate(sources)
    ]


def _part(name: str) -> Callable[[Step], float | None]:
    return lambda step: step.part("loss", name)


def _loss(step: Step) -> float | None:
    return step.loss


def _speed(step: Step) -> float | None:
    return step.tokens / step.seconds if step.seconds > 0 else None


def schedule_section(run: Run) -> Markup | None:
    """Which source at which step."""
    if not run.steps:
        return None
    cut = stretches([step.step for step in run.steps], COLUMNS)
    steps_in: Counter[int] = Counter()
    of_source: dict[str, Counter[int]] = {}
    tasks: dict[str, str] = {}
    for step in run.steps:
        place = cut.of(step.step)
        steps_in[place] += 1
        for source, task in zip(step.source.split("+"), step.task.split("+"), strict=False):
            of_source.setdefault(source, Counter())[place] += 1
            tasks[source] = task
    if run.plan:
        for source, facts in run.plan.sources.items():
            of_source.setdefault(source, Counter())
            tasks.setdefault(source, facts.task)
    order = sorted(of_source, key=lambda source: (colour(tasks[source]), source))
    shares = {
        source: {place: count / steps_in[place] for place, count in found.items()}
        for source, found in of_source.items()
    }
    most = max(share for found in shares.values() for share in found.values())
    rows = [
        Row(
            source,
            f"{100 * sum(of_source[source].values()) / len(run.steps):.1f} % of steps",
            {
                place: f"fill c{colour(tasks[source]) % COLOURS} o{level(share / most)}"
                for place, share in shares[source].items()
            },
        )
        for source in order
    ]
    about = "Which source each step trained on."
    if cut.count < len(cut.steps):
        about += " A column holds several steps; the darker, the more of them are of the source."
    if run.plan:
        about += (
            f" Schedule {run.plan.schedule}: {plural(run.plan.steps_per_epoch, 'step')} an epoch, "
            f"{run.plan.steps:,} planned, {len(run.steps):,} done; "
            f"longest run of one source {plural(run.plan.longest_run, 'step')}."
        )
    return section("schedule", "Schedule", about, strip(rows, cut, "Sources by step"))


def cost_section(run: Run) -> Markup | None:
    """Speed and memory, by task."""
    steps = run.steps
    if not steps:
        return None
    cut = cut_of(steps)
    tasks = list(dict.fromkeys(step.task for step in steps))
    speed = [
        series(_words(task), [step for step in steps if step.task == task], _speed, cut, colour(task.split("+")[0]))
        for task in tasks
    ]
    memory = series("peak", steps, lambda step: step.peak_memory_bytes / 1e9 or None, cut, 2)
    rate = series("rate", steps, lambda step: step.learning_rate, cut, 3)
    charts = [
        chart("Throughput", speed, cut, "tokens a second", zero=True),
        chart("Memory", [memory], cut, "peak so far, GB", zero=True),
        chart("Learning rate", [rate], cut, "Learning rate", zero=True),
    ]
    seconds = {phase: sum(step.part("seconds", phase) or 0.0 for step in steps) for phase in PHASES}
    whole = sum(seconds.values())
    where = [(phase, value / whole) for phase, value in seconds.items() if value > 0] if drawable(whole) else []
    return section(
        "cost",
        "Speed and memory",
        of_a_point(cut),
        element("div", *charts, class_="figures"),
        join([element("h3", "Where the time of a step goes"), shares(where, "Share of each phase")]) if where else None,
        table(
            [
                "batches of",
                "steps",
                "rows",
                "tokens",
                "padding",
                "seconds a step",
                "tokens a second",
                "candidates a query",
            ],
            [_cost(task, [step for step in steps if step.task == task]) for task in tasks],
            "Cost by task",
        ),
    )


def _cost(task: str, steps: Sequence[Step]) -> list[object]:
    tokens, padded = sum(step.tokens for step in steps), sum(step.padded_tokens for step in steps)
    seconds = sum(step.seconds for step in steps)
    candidates = [step.candidates_per_query for step in steps if step.candidates_per_query is not None]
    return [
        name(_words(task)),
        len(steps), sum(step.rows for step in steps), tokens,
        Number(f"{100 * (1 - tokens / padded):.1f} %") if padded else None,
        number(seconds / len(steps), 3), Number(f"{tokens / seconds:,.0f}") if seconds else None,
        number(sum(candidates) / len(candidates), 3) if candidates else None,
    ]  # fmt: skip


def _words(task: str) -> str:
    """The tasks of a step, of which `paired` has several."""
    return " and ".join(task.split("+")).replace("_", " ")
