"""Names of lines beside their ends, none on top of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes


def label_ends(axes: Axes, names: Sequence[str]) -> None:
    """Write the named lines' names right of the axes, at the height of their ends as far as there is room."""
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if line.get_label() in names]
    ends = [min(max(float(np.asarray(line.get_ydata())[-1]), low), high) for line in lines]
    gap = (high - low) * 0.165 / (0.8 * axes.figure.get_figheight())  # type: ignore[union-attr]  # a line of text
    for line, end, place in zip(lines, ends, spread_out(ends, gap, high), strict=True):
        axes.annotate(
            str(line.get_label()),
            xy=(float(np.asarray(line.get_xdata())[-1]), end),
            xytext=(1.04 * axes.get_xlim()[1], place),
            va="center",
            fontsize=9,
            color=line.get_color(),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1},
        )


def spread_out(wanted: Sequence[float], gap: float, highest: float) -> list[float]:
    """Places as near as possible to the wanted ones, in their order, at least `gap` apart and not above `highest`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # [sum of (wanted - offset in the stack), size]: neighbours that touch move as one
    for offset, i in enumerate(order):
        blocks.append([wanted[i] - offset * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + size]
    bases = [total / size for total, size in blocks for _ in range(int(size))]
    places = [0.0] * len(wanted)
    for offset, (i, base) in enumerate(zip(order, bases, strict=True)):
        places[i] = min(base, highest - (len(order) - 1) * gap) + offset * gap
    return places
