"""Curves over the steps of a run: lists of (step, value)."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from lightning_rlora.bench.results import Curve


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, statistics.fmean(table[step] for table in tables)) for step in common]


def first_reach(curve: Curve, goal: float) -> float | None:
    """The first step, interpolated between validations, at which a curve is at or below a goal; None if never."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= goal:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - value)
        before = step, value
    return None


def interpolate(curve: Curve, step: float) -> float:
    """A curve's value at a step within its range, linear between its points."""
    for (left, low), (right, high) in pairwise(curve):
        if left <= step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return curve[-1][1]
