"""From results to the numbers of the table: pure functions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_rlora.bench.curves import first_reach, interpolate, mean_curve
from lightning_rlora.bench.plan import MEAN_OF_TASKS, Plan
from lightning_rlora.bench.rates import RateWindow, best_rate, comparable, mean_losses, rate_window
from lightning_rlora.bench.results import Curve, Result


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


def _seconds(result: Result) -> Curve:
    return [(0, 0.0), *((step, seconds) for step, seconds in result.cost.get("seconds", []))]
