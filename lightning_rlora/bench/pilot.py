"""The pilot of a plan: all rates are tried on a few of its tasks and seeds, and only the best ones on all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_rlora.bench.plan import MEAN_OF_TASKS, PILOT, Plan, Run
from lightning_rlora.bench.rates import best_rate, mean_losses
from lightning_rlora.bench.results import Result
from lightning_rlora.bench.table import Sweep, Sweeps, mean_of_tasks


def pilot_plan(plan: Plan) -> Plan:
    """The pilot as a plan of its own; its runs are runs of the whole plan, too."""
    assert plan.pilot is not None
    tasks = {name: plan.tasks[name] for name in plan.pilot.tasks}
    return replace(plan, tasks=tasks, seeds=plan.pilot.seeds, pilot=None)


def count_runs(plan: Plan) -> int:
    """How many runs the plan asks for, whichever rates its pilot will keep."""
    if plan.pilot is None:
        return len(plan.runs())
    pilot = pilot_plan(plan)
    kept = sum(min(plan.pilot.keep, len(method.rates)) * len(method.steps) for method in plan.methods.values())
    beyond = len(plan.tasks) * len(plan.seeds) - len(pilot.tasks) * len(pilot.seeds)
    return len(pilot.runs()) + kept * beyond


def kept_runs(plan: Plan, sweeps: Sweeps) -> list[Run]:
    """The runs of all tasks and seeds at the rates that the pilot kept."""
    return [run for run in plan.runs() if run.rate in sweeps[run.task, run.method, run.steps].kept]


def pilot_sweeps(plan: Plan, results: Iterable[Result]) -> Sweeps:
    """What the pilot says of every method and budget on every task and on their mean; nothing if there is no pilot.

    A pilot of all tasks chooses rates for each task, unless the mean over tasks is wanted; otherwise there is one
    choice for all tasks, by the mean over the pilot's. A rate that diverged on one of them, or with one seed, diverged.

    Args:
        plan: The plan.
        results: Of any of its runs; those of the pilot are picked.
    """
    if plan.pilot is None:
        return {}
    pilot = pilot_plan(plan)
    mean = MEAN_OF_TASKS if len(pilot.tasks) == len(plan.tasks) else PILOT
    results = [r for r in results if r.status != "failed" and r.task in pilot.tasks and r.seed in pilot.seeds]
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in [*results, *mean_of_tasks(results, pilot, mean)]:
        groups[result.task, result.method, result.steps].append(result)
    sweeps = {}
    for method in plan.methods.values():
        for steps in method.steps:
            for task in (*plan.tasks, MEAN_OF_TASKS):
                chosen_by = task if chooses_by_task(plan) else mean  # a mean is there where all tasks are
                done = len(groups[chosen_by, method.name, steps]) == len(method.rates) * len(pilot.seeds)
                kept = around_best(mean_losses(groups[chosen_by, method.name, steps]), plan.pilot.keep) if done else ()
                losses = mean_losses(groups[task, method.name, steps]) if done else {}
                sweeps[task, method.name, steps] = Sweep(kept, losses)
    return sweeps


def explain_choice(plan: Plan) -> str:
    """How a plan's pilot chose the rates, in half a sentence."""
    pilot = plan.pilot
    assert pilot is not None
    best = "the best" if pilot.keep == 1 else f"the {pilot.keep} around the best"
    by = "of each task" if chooses_by_task(plan) else "by the mean over these tasks"
    rest = "" if pilot.keep == 1 else ", among which that very mean decides"
    return (
        f"it tried all rates on {', '.join(pilot.tasks)} with seed {', '.join(map(str, pilot.seeds))}, and {best} "
        f"{by} went on to all tasks and seeds{rest}"
    )


def around_best(by_rate: Mapping[float, float], keep: int) -> tuple[float, ...]:
    """The best rate and those next to it in their order, `keep` in all; of two as near the one of the lower loss."""
    rates = sorted(by_rate)
    place = rates.index(best_rate(by_rate))
    nearest = sorted(rates, key=lambda rate: (abs(rates.index(rate) - place), by_rate[rate], rate))
    return tuple(sorted(nearest[:keep]))


def chooses_by_task(plan: Plan) -> bool:
    """Whether each task has its own best rates."""
    return plan.pilot is not None and len(plan.pilot.tasks) == len(plan.tasks) and not plan.mean_of_tasks
