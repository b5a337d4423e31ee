"""Where names stand beside points so that they do not cover each other. Pure; imports no torch."""

from collections.abc import Sequence
from typing import Literal

Side = Literal["top", "bottom", "right", "left"]
SIDES: tuple[Side, ...] = ("top", "bottom", "right", "left")

LETTER_PX, LINE_PX, GAP_PX = 6.0, 13.0, 9.0
"""Width of a letter, height of a line, and distance of a label from its point, in pixels."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def sides(
    points: Sequence[tuple[float, float]], names: Sequence[str], width_px: float, height_px: float
) -> list[Side | None]:
    """A side for the name of each point (x, y) in a plot of this size; None where every side is taken.

    Earlier points choose first. No name covers another one, or a point.
    """
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    placed = [
        ((x - low_x) / ((high_x - low_x) or 1) * width_px, (y - low_y) / ((high_y - low_y) or 1) * height_px)
        for x, y in points
    ]
    half = GAP_PX - 2
    taken: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in placed]
    chosen: list[Side | None] = []
    for number, ((x, y), name) in enumerate(zip(placed, names, strict=True)):
        others = [*taken[:number], *taken[number + 1 :]]
        free: list[tuple[Side, Box]] = [
            (side, box) for side in SIDES if not _covers(box := _box(side, x, y, name), others)
        ]
        chosen.append(free[0][0] if free else None)
        taken += [box for _, box in free[:1]]
    return chosen


def _box(side: Side, x: float, y: float, name: str) -> Box:
    width = LETTER_PX * len(name)
    if side in ("top", "bottom"):
        low = y + GAP_PX if side == "top" else y - GAP_PX - LINE_PX
        return (x - width / 2, low, x + width / 2, low + LINE_PX)
    left = x + GAP_PX if side == "right" else x - GAP_PX - width
    return (left, y - LINE_PX / 2, left + width, y + LINE_PX / 2)


def _covers(box: Box, others: Sequence[Box]) -> bool:
    left, bottom, right, top = box
    return any(left < o[2] and o[0] < right and bottom < o[3] and o[1] < top for o in others)
