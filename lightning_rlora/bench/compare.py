"""`rlora compare`: what is left of a plan is run, then everything that is there is put into tables and a report."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_rlora.bench.pilot import chooses_by_task, count_runs, kept_runs, pilot_plan, pilot_sweeps
from lightning_rlora.bench.plan import MEAN_OF_TASKS, PILOT, Plan, Run
from lightning_rlora.bench.pool import TimeLimit, run_all
from lightning_rlora.bench.results import Result, read_result
from lightning_rlora.bench.worker import Fit, Job
from lightning_rlora.errors import UserError
from lightning_rlora.files import write_atomically
from lightning_rlora.fragments import fill


def run_plan(
    plan: Plan,
    output: Path,
    fit: Fit,
    *,
    devices: Sequence[str],
    jobs: int = 1,
    only: Sequence[str] = (),
    limit_minutes: float | None = None,
    keep_adapters: bool = False,
) -> None:
    """Do the runs of a plan that have no result yet, side by side, telling of each as it ends; a pilot's come first.

    Args:
        plan: The plan.
        output: Folder of the comparison; finished runs in it, from whatever machine, are not repeated.
        fit: Trains as a configuration file says.
        devices: For CUDA_VISIBLE_DEVICES of a worker, or `cpu`.
        jobs: Workers on each device.
        only: Methods to run, tasks to run them on, or both; by default all.
        limit_minutes: Begin no run that would end later than this.
        keep_adapters: Keep every run's trained adapter; without, only its size is kept.

    Raises:
        UserError: If another comparison is at work in the folder, a variable has no value, or the folder holds results
            with another one.
    """
    for name in only:
        if name not in [*plan.methods, *plan.tasks]:
            raise UserError(
                f"--only names {name!r}, which is none of the methods: {', '.join(plan.methods)}; nor of the tasks: "
                f"{', '.join(plan.tasks)}"
            )
    methods, tasks = ([name for name in only if name in there] or there for there in (plan.methods, plan.tasks))
    possible = plan.runs()
    needed: set[Path] = set()  # on whatever task: the pilot's, where it chooses one rate for all tasks
    if plan.pilot is not None and not chooses_by_task(plan):
        needed = {run.folder for run in pilot_plan(plan).runs()}
    planned = {
        run.folder: Job(run, plan.filled(run), output.absolute(), jobs, keep_adapters)
        for run in possible
        if run.method in methods and (run.task in tasks or run.folder in needed)
    }
    workers = [device for _ in range(jobs) for device in devices]
    threads = max(1, (os.cpu_count() or 1) // len(workers))
    limit = TimeLimit(None if limit_minutes is None else 60 * limit_minutes)
    with _alone_in(output):
        _results(possible, output)  # also what only a later stage asks for must be of the same base model and data
        for stage, runs in _stages(plan, output):
            asked = [planned[run.folder] for run in runs if run.folder in planned]
            done = {run.folder for run, result in _results(runs, output) if result.status != "failed"}
            todo = [job for job in asked if job.run.folder not in done]
            count = f"{len(asked)} runs, {len(asked) - len(todo)} of them done"
            print(f"{stage and stage + ': '}{count}; {jobs} at a time on {', '.join(devices)}", flush=True)
            progress = _Progress(stage, todo, len(asked))
            ended = run_all(todo, workers, threads, fit, progress.report, limit)
            if ended < len(todo):
                left = f"{len(todo) - ended} runs{stage and f' of the {stage}'} left"
                print(f"time is up with {left}: start again to go on", flush=True)
                return


def _stages(plan: Plan, output: Path) -> Iterator[tuple[str, list[Run]]]:
    """The stages of a plan by name, each with its runs; what the last one has depends on the results of a pilot."""
    if plan.pilot is None:
        yield "", plan.runs()
    else:
        pilot = pilot_plan(plan).runs()
        yield "pilot", pilot
        sweeps = pilot_sweeps(plan, [result for _, result in _results(pilot, output)])
        yield "kept rates", kept_runs(plan, sweeps)


def write_outputs(plan: Plan, output: Path) -> list[Result]:
    """Put all results of a plan into table.md, table.csv, table.json, method_comparison/, report.html and pictures.

    Returns:
        The results, failed ones too.

    Raises:
        UserError: If the folder holds results with other values of the plan's variables.
    """
    from lightning_rlora.bench.outputs import as_csv, as_json, markdown, peft_layout
    from lightning_rlora.bench.report import write_report
    from lightning_rlora.bench.table import mean_of_tasks, table

    runs = {run.folder: run for _, stage in _stages(plan, output) for run in stage}
    results = [result for _, result in _results(runs.values(), output)]
    _check_scores(plan, results)
    sweeps = pilot_sweeps(plan, results)
    means, tables = [], {}
    if plan.mean_of_tasks:
        means = mean_of_tasks(results, plan)
        tables[MEAN_OF_TASKS] = table(means, MEAN_OF_TASKS, plan, sweeps)
        if plan.pilot is not None and len(plan.pilot.tasks) < len(plan.tasks):
            pilot = pilot_plan(plan)
            means += mean_of_tasks(results, pilot, PILOT)
            tables[PILOT] = table(means, PILOT, pilot)
    tables |= {task: table(results, task, plan, sweeps) for task in plan.tasks}
    best = {(row.task, row.method, row.steps, row.rate) for rows in tables.values() for row in rows}
    written = set()
    for result in results:
        if result.status == "finished" and (result.task, result.method, result.steps, result.rate) in best:
            content = peft_layout(replace(result, config=fill(result.config, result.variables, partly=True)))
            name = content["run_info"]["experiment_name"].replace("/", "--")
            path = output / "method_comparison" / f"{name}.json"
            write_atomically(path, json.dumps(content, indent=2).encode())
            written.add(path)
    for path in set((output / "method_comparison").glob("*.json")) - written:
        path.unlink()  # of a rate that was the best one before
    write_atomically(output / "table.md", markdown(tables, results, plan).encode())
    write_atomically(output / "table.csv", as_csv(tables).encode())
    write_atomically(output / "table.json", as_json(tables).encode())
    write_report(output, plan, results, means, tables, count_runs(plan))
    return results


def _check_scores(plan: Plan, results: Sequence[Result]) -> None:
    """Warn of scores that no validation logged."""
    logged = {name for result in results for name, curve in result.scores.items() if curve}
    missing = [name for name in plan.scores if name not in logged]
    if logged and missing:
        warnings.warn(
            f"scores: no validation logged {', '.join(missing)}; there is {', '.join(sorted(logged))}", stacklevel=3
        )


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; `cpu` where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()] or ["cpu"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] or ["cpu"]


def _results(runs: Iterable[Run], output: Path) -> list[tuple[Run, Result]]:
    """The results of runs that are there, of one and the same base model and data."""
    found = [(run, result) for run in runs if (result := read_result(output, run)) is not None]
    for run, result in found:
        for name, value in run.variables.items():
            before = result.variables.get(name, value)
            if result.status != "failed" and not _same_place(before, value):
                raise UserError(
                    f"{output} holds results with {name} = {before}, and now {name} = {value}: give another --output, "
                    f"or the {name} of before with --set"
                )
    return found


def _same_place(one: str, other: str) -> bool:
    """Whether two values can mean the same: a model's id and a folder that is called like its last part do."""
    pairs = zip(reversed(Path(one).parts), reversed(Path(other).parts), strict=False)
    return all(left == right for left, right in pairs)


class _Progress:
    """Tells of every run that ended, and when all will have."""

    def __init__(self, stage: str, todo: Sequence[Job], planned: int) -> None:
        self.stage = stage
        self.steps_left = sum(job.run.steps for job in todo)
        self.ended, self.planned = planned - len(todo), planned
        self.steps_done = 0
        self.began = time.monotonic()

    def report(self, job: Job, result: Result) -> None:
        self.ended += 1
        self.steps_left -= job.run.steps
        self.steps_done += job.run.steps
        minutes = (time.monotonic() - self.began) / 60 * self.steps_left / self.steps_done
        what = f"loss {result.loss:.4f}" if result.status == "finished" else f"{result.status}: {result.note}"
        seconds = f" in {result.meta['total_seconds']:.0f} s" if result.meta else ""
        left = f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
        run = job.run
        stage = self.stage and self.stage + " "
        print(
            f"[{stage}{self.ended}/{self.planned}] {run.task} {run.method} rate {run.rate:g} seed {run.seed} "
            f"{run.steps} steps: {what}{seconds}" + (f"; {left}" if self.steps_left else ""),
            flush=True,
        )


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep a second comparison out of the folder; the lock ends with this process, however it ends."""
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another comparison is at work in {output}: wait for it or end it") from error
        yield
