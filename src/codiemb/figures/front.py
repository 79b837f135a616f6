"""The front between two tasks: which models no other beats in both, its knee, and their marks in a figure."""

from __future__ import annotations

from collections.abc import Sequence

from codiemb.figures.scatter import Point


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


def marks(
    points: Sequence[tuple[float, float]], names: Sequence[str], best: Sequence[int], at_knee: int | None
) -> list[Point]:
    """Points of a scatter, in points of 0 to 100: on the front or behind it, the knee by its name."""
    kinds = ["knee" if place == at_knee else "onfront" if place in best else "behind" for place in range(len(points))]
    return [
        Point("knee" if kind == "knee" else name, 100 * x, 100 * y, kind, named=kind == "knee")
        for name, (x, y), kind in zip(names, points, kinds, strict=True)
    ]
