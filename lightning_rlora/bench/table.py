"""From results to the numbers of the table: pure functions."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from lightning_rlora.bench.plan import MEAN_OF_TASKS, Plan
from lightning_rlora.bench.results import Curve, Result


@dataclass(frozen=True)
class RateWindow:
    """The rates around the best one whose loss is within a share of the best.

    Attributes:
        low: Lower end, interpolated in the rate's logarithm.
        high: Upper end.
        open_low: Whether the window reaches down to the lowest rate tried, so that it may be wider.
        open_high: The same above.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def ratio(self) -> float:
        """How many times the lowest rate the highest one is."""
        return self.high / self.low


class Sweep(NamedTuple):
    """What a plan's pilot says of a method with a budget on a task.

    Attributes:
        kept: The rates that go on to all tasks and seeds; none while the pilot lacks a run.
        losses: Mean loss by rate over the pilot's seeds; empty for a task that is none of the pilot's, too.
    """

    kept: tuple[float, ...]
    losses: dict[float, float]


Sweeps = Mapping[tuple[str, str, int], Sweep]
"""By task, method and budget."""


class Score(NamedTuple):
    """Mean of a score at the end over seeds, and its standard deviation; None with a single seed."""

    mean: float
    spread: float | None


@dataclass(frozen=True)
class Row:
    """A method with a budget on a task, at its best rate.

    Attributes:
        task: The task.
        method: The method.
        steps: Budget in optimizer steps.
        rate: The best of the rates tried, by the mean over seeds of the validation loss at the end; among the rates
            that have as many seeds as any, and that the pilot kept.
        edge: Whether none of these, or of those that the pilot tried, lies below, or none above: the best may lie
            outside.
        loss: That mean.
        spread: Standard deviation over seeds (n - 1 in the denominator); None with a single seed.
        scores: The plan's scores at the end, by name, at the rate that the loss chose; None where not measured.
        seeds: How many seeds finished at the best rate.
        complete: Whether every rate of the plan has as many, or diverged; with a pilot, whether every rate that it
            kept has all seeds, or diverged.
        by_rate: Mean loss by rate, over the seeds that there are, or the pilot's on its tasks; infinite where a run
            diverged.
        window: Rates within 1 % of the best, among those with as many seeds; with a pilot, by its losses, and None
            where it was not or is not done.
        steps_to_reference: Step at which the mean curve reaches the reference's tuned final loss; None if it does not.
        seconds_to_reference: Seconds of training up to there.
        seconds_per_step: Median over the runs at the best rate.
        peak_memory: In bytes, the largest of the runs at the best rate.
        parameters: That train.
        adapter_bytes: Of the exported adapter's weights.
        diverged: Runs that diverged, of all rates and seeds.
        runs: Runs that ended, diverged ones included.
    """

    task: str
    method: str
    steps: int
    rate: float
    edge: bool
    loss: float
    spread: float | None
    scores: dict[str, Score | None]
    seeds: int
    complete: bool
    by_rate: dict[float, float]
    window: RateWindow | None
    steps_to_reference: float | None
    seconds_to_reference: float | None
    seconds_per_step: float | None
    peak_memory: int | None
    parameters: int | None
    adapter_bytes: int | None
    diverged: int
    runs: int


def table(results: Iterable[Result], task: str, plan: Plan, sweeps: Sweeps | None = None) -> list[Row]:
    """The rows of a task, lowest loss first; methods all of whose runs diverged stand at the end.

    Args:
        results: Of any tasks; failed ones are left out.
        task: The task.
        plan: Names the reference and its budget, and the rates to expect.
        sweeps: What the plan's pilot says, if it has one.
    """
    sweeps = sweeps or {}
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in results:
        if result.task == task and result.status != "failed":
            groups[result.method, result.steps].append(result)
    reference = plan.reference, plan.steps[0]
    goal = math.inf
    if reference in groups:
        goal = min(comparable(_candidates(groups[reference], sweeps.get((task, *reference)))).values())
    rows = [
        _row(group, goal if math.isfinite(goal) else None, plan, sweeps.get((task, *key)))
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: (row.loss, row.method, row.steps))


def mean_of_tasks(results: Iterable[Result], plan: Plan, name: str = MEAN_OF_TASKS) -> list[Result]:
    """What the plan's runs of one method, budget, rate and seed have in common over all its tasks, as of one more task.

    Curves and seconds are means over the tasks, memory is the most of any; a rate that diverged on one of them
    diverged. Left out are runs that not every task has yet.
    """
    groups: dict[tuple[str, int, float, int], list[Result]] = defaultdict(list)
    for result in results:
        if result.status != "failed" and result.task in plan.tasks and result.seed in plan.seeds:
            groups[result.method, result.steps, result.rate, result.seed].append(result)
    means = []
    for group in groups.values():
        if len(group) == len(plan.tasks):
            diverged = [result for result in group if result.status == "diverged"]
            names = set.intersection(*(set(result.scores) for result in group))
            mean = replace(
                group[0],
                task=name,
                status="diverged" if diverged else "finished",
                note=diverged[0].note if diverged else "",
                validation=mean_curve([result.validation for result in group]),
                train=[],
                scores={name: mean_curve([result.scores[name] for result in group]) for name in names},
                cost=_mean_cost([result.cost for result in group]),
            )
            means.append(mean)
    return means


def _mean_cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not all(costs):
        return {}
    seconds = mean_curve([cost["seconds"] for cost in costs])
    return {**costs[0], "seconds": seconds, "peak_memory": max(cost["peak_memory"] or 0 for cost in costs)}


def _candidates(group: Sequence[Result], sweep: Sweep | None) -> Sequence[Result]:
    """The runs among whose rates the best is sought: after a pilot, only those at the rates that it kept."""
    return [result for result in group if result.rate in sweep.kept] if sweep and sweep.kept else group


def _row(group: Sequence[Result], goal: float | None, plan: Plan, sweep: Sweep | None) -> Row:
    rates = plan.methods[group[0].method].rates
    candidates = _candidates(group, sweep)
    compared = comparable(candidates)
    rate = best_rate(compared)
    loss = compared[rate]
    best = [result for result in candidates if result.rate == rate]
    window: RateWindow | None
    if sweep is None:
        tried, window = list(compared), rate_window(compared)
        complete = all(rate in compared for rate in rates)
    else:
        tried = list(rates if sweep.kept else compared)
        window = rate_window(sweep.losses) if sweep.losses else None
        every_seed = math.isinf(loss) or len(best) == len(plan.seeds)
        complete = bool(sweep.kept) and every_seed and all(rate in compared for rate in sweep.kept)
    losses = [result.loss for result in best]
    curve = mean_curve([result.validation for result in best]) if math.isfinite(loss) else []
    reached = first_reach(curve, goal) if goal is not None else None
    seconds = mean_curve([_seconds(result) for result in best]) if curve else []
    paces = [pace for result in best if (pace := result.seconds_per_step) is not None]
    memory = [result.cost["peak_memory"] for result in best if result.cost.get("peak_memory")]
    return Row(
        task=group[0].task,
        method=group[0].method,
        steps=group[0].steps,
        rate=rate,
        edge=rate in (min(tried), max(tried)),
        loss=loss,
        spread=statistics.stdev(losses) if len(losses) > 1 and curve else None,
        scores={name: _score(best, name) if curve else None for name in plan.scores},
        seeds=len(best),
        complete=complete,
        by_rate=sweep.losses if sweep and sweep.losses else mean_losses(group),
        window=window,
        steps_to_reference=reached,
        seconds_to_reference=interpolate(seconds, reached) if reached is not None and seconds else None,
        seconds_per_step=statistics.median(paces) if paces else None,
        peak_memory=max(memory, default=None),
        parameters=max((result.cost.get("trainable_parameters", 0) for result in best), default=0) or None,
        adapter_bytes=max((result.adapter.get("bytes", 0) for result in best), default=0) or None,
        diverged=sum(result.status == "diverged" for result in group),
        runs=len(group),
    )


def _score(best: Iterable[Result], name: str) -> Score | None:
    values = [at_end for result in best if (at_end := dict(result.scores.get(name, [])).get(result.steps)) is not None]
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None


def mean_losses(group: Iterable[Result]) -> dict[float, float]:
    """Mean final loss over seeds by rate, in the order of the rates; infinite where a seed diverged."""
    losses = defaultdict(list)
    for result in group:
        losses[result.rate].append(result.loss)
    return {rate: statistics.fmean(losses[rate]) for rate in sorted(losses)}


def comparable(group: Sequence[Result]) -> dict[float, float]:
    """The mean losses of the rates that have the most seeds, and of those that diverged, which no seed can mend.

    A rate with a single lucky seed must not win over one with three.
    """
    by_rate = mean_losses(group)
    seeds = Counter(result.rate for result in group)
    most = max((seeds[rate] for rate, loss in by_rate.items() if math.isfinite(loss)), default=0)
    return {rate: loss for rate, loss in by_rate.items() if seeds[rate] >= most or math.isinf(loss)}


def best_rate(by_rate: Mapping[float, float]) -> float:
    """The rate of the lowest loss; the lower one of two."""
    return min(by_rate, key=lambda rate: (by_rate[rate], rate))


def rate_window(by_rate: Mapping[float, float], share: float = 0.01) -> RateWindow:
    """The rates next to the best one and to each other whose loss is at most (1 + share) times the best loss.

    Between two rates the loss is taken as linear in the rate's logarithm; towards a rate that diverged nothing is
    known, and the window ends at the last rate that did not.
    """
    rates = sorted(by_rate)
    best = best_rate(by_rate)
    if math.isinf(by_rate[best]):
        return RateWindow(best, best, False, False)
    limit = (1 + share) * by_rate[best]

    def end(outwards: Sequence[float]) -> tuple[float, bool]:
        inside = best
        for rate in outwards:
            if by_rate[rate] > limit:
                if math.isinf(by_rate[rate]):
                    return inside, False
                part = (limit - by_rate[inside]) / (by_rate[rate] - by_rate[inside])
                return math.exp(math.log(inside) + part * (math.log(rate) - math.log(inside))), False
            inside = rate
        return inside, True

    place = rates.index(best)
    low, open_low = end(rates[:place][::-1])
    high, open_high = end(rates[place + 1 :])
    return RateWindow(low, high, open_low, open_high)


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


def _seconds(result: Result) -> Curve:
    return [(0, 0.0), *((step, seconds) for step, seconds in result.cost.get("seconds", []))]
