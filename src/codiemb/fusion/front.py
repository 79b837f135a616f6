"""The front between two tasks: which models no other beats in both, its knee, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other is as good as in both and better in one, by their first value."""
    beaten = {
        place for place, (x, y) in enumerate(points) if any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    }
    return sorted(set(range(len(points))) - beaten, key=lambda place: points[place])


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Of a front, ordered, the point farthest above the line between its ends, both axes scaled to that line."""
    (left, top), (right, bottom) = points[0], points[-1]
    width, height = (right - left) or 1.0, (top - bottom) or 1.0
    return max(
        range(len(points)), key=lambda place: (points[place][0] - left) / width + (points[place][1] - bottom) / height
    )


def figure(tasks: Sequence[str], points: Sequence[tuple[float, float]], best_of_all: list[int], at_knee: int) -> str:
    """The front and all points as SVG, in points of 0 to 100."""
    xs, ys = ([100 * point[axis] for point in points] for axis in (0, 1))
    right, up = _scale(xs, 80, 480), _scale(ys, 330, 40)
    at = [(right(x), up(y)) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{at[place][0]:.1f},{at[place][1]:.1f}" for place in best_of_all)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if place == at_knee else 4}" '
        f'fill="{"#d55e00" if place == at_knee else "#0072b2" if place in best_of_all else "#999"}">'
        f"<title>{tasks[0]} {xs[place]:.2f}, {tasks[1]} {ys[place]:.2f}</title></circle>"
        for place, (x, y) in enumerate(at)
    )
    ticks = "".join(
        f'<path d="M{right(x):.1f} 345v5" stroke="#888"/>'
        f'<text x="{right(x):.1f}" y="364" text-anchor="middle">{x:.2f}</text>'
        for x in (min(xs), (min(xs) + max(xs)) / 2, max(xs))
    ) + "".join(
        f'<path d="M65 {up(y):.1f}h-5" stroke="#888"/><text x="57" y="{up(y) + 4:.1f}" text-anchor="end">{y:.2f}</text>'
        for y in (min(ys), (min(ys) + max(ys)) / 2, max(ys))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 400" font-family="sans-serif" font-size="12">'
        f'<path d="M65 25V345H500" fill="none" stroke="#888"/>{ticks}'
        f'<polyline points="{line}" fill="none" stroke="#0072b2"/>{dots}'
        f'<text x="280" y="388" text-anchor="middle">{tasks[0]}, mean in points</text>'
        f'<text x="14" y="185" text-anchor="middle" transform="rotate(-90 14 185)">{tasks[1]}, mean in points</text>'
        f'<text x="{at[at_knee][0] + 10:.1f}" y="{at[at_knee][1] - 8:.1f}">knee</text></svg>\n'
    )


def _scale(values: Sequence[float], begin: float, end: float) -> Callable[[float], float]:
    """Where a value stands between two places, the lowest at the first."""
    low, width = min(values), (max(values) - min(values)) or 1.0
    return lambda value: begin + (end - begin) * (value - low) / width
