"""The file of a plan, and its checks.

steps: 200                    # or a list of budgets; a method may name its own
validate_every: 25
seeds: [0, 1, 2]
reference: lora               # the method whose tuned final loss the others are to reach
scores: [accuracy]            # what else the tables show of what is logged as val/...
mean_of_tasks: false          # whether there is a table of the mean over tasks, too
pilot: {tasks: [gsm8k], seeds: [0], keep: 1}  # compare all rates there first, go on with the best ones; by default: all
                              # tasks, the first seed, one rate (of each task, if all are there and no mean is wanted)
variables: {data: data}       # `--set data=...` fills ${data} in; ${seed} is the run's seed
callbacks: [...]              # that every run gets beside its own, such as one that measures a score
common: {...}                 # a configuration of `rlora fit`, or a part of one
tasks: {gsm8k: {...}}         # laid over it: the data
methods:                      # laid over that: adapter, optimizer, callbacks, in a file or inline
  lora: {overlay: lora.yaml, rates: [0.001, 0.003, 0.01]}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_rlora.bench.plan import MEAN_OF_TASKS, PILOT, Method, Pilot, Plan, whole_number
from lightning_rlora.bench.table import Row
from lightning_rlora.errors import UserError
from lightning_rlora.fragments import Config, as_config, merge, read_mapping

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_PLAN_KEYS = {
    *(
        "description",
        "sources",
        "variables",
        "steps",
        "validate_every",
        "seeds",
        "reference",
        "scores",
        "mean_of_tasks",
    ),
    *("pilot", "callbacks", "common", "tasks", "methods"),
}
_PILOT_KEYS = {"tasks", "seeds", "keep"}
_METHOD_KEYS = {"overlay", "rates", "steps"}


def read_plan(path: Path, settings: Mapping[str, str] | None = None) -> Plan:
    """Read and check a plan.

    Args:
        path: YAML file; paths of overlays in it are relative to its folder.
        settings: Values for the plan's variables.

    Raises:
        UserError: If the plan, or an overlay that it names, is wrong.
    """
    content = read_mapping(path)
    _check_keys(content, _PLAN_KEYS, required={"steps", "seeds", "reference", "tasks", "methods"}, where=f"{path}")
    variables = _mapping(content, "variables", path)
    for name in settings or {}:
        if name not in variables:
            known = ", ".join(variables) or "none"
            raise UserError(f"{path} has no variable {name!r} to set; its variables: {known}")
    if "seed" in variables:
        raise UserError(f"{path}: variables: ${{seed}} is the run's seed; give the variable another name")
    steps = _steps(content["steps"], f"{path}: steps")
    methods = {
        name: _method(name, entry, steps, path)
        for name, entry in _mapping(content, "methods", path, named=True).items()
    }
    tasks = _mapping(content, "tasks", path, named=True)
    seeds = _seeds(content["seeds"], f"{path}: seeds")
    plan = Plan(
        name=path.stem,
        description=str(content.get("description") or ""),
        sources={name: str(text) for name, text in _mapping(content, "sources", path).items()},
        variables={name: None if value is None else str(value) for name, value in variables.items()}
        | dict(settings or {}),
        steps=steps,
        validate_every=whole_number(content.get("validate_every", 25), f"{path}: validate_every"),
        seeds=seeds,
        reference=str(content["reference"]),
        scores=_scores(content.get("scores", ["accuracy"]), f"{path}: scores"),
        mean_of_tasks=_truth(content.get("mean_of_tasks", False), f"{path}: mean_of_tasks"),
        pilot=None if content.get("pilot") is None else _pilot(content["pilot"], tuple(tasks), seeds, f"{path}: pilot"),
        callbacks=_callbacks(content.get("callbacks", []), f"{path}: callbacks"),
        common=_mapping(content, "common", path),
        tasks={name: as_config(task, f"{path}: task {name!r}") for name, task in tasks.items()},
        methods=methods,
    )
    for name, meaning in {MEAN_OF_TASKS: "all", PILOT: "the pilot's"}.items():
        if name in plan.tasks:
            raise UserError(f"{path}: tasks: {name!r} stands for the mean of {meaning}: give the task another name")
    if plan.reference not in methods:
        raise UserError(f"{path}: reference {plan.reference!r} is none of the methods: {', '.join(methods)}")
    if plan.steps[0] not in methods[plan.reference].steps:
        raise UserError(
            f"{path}: the reference {plan.reference!r} must have the plan's budget of {plan.steps[0]} steps"
        )
    for budget in {budget for method in methods.values() for budget in method.steps}:
        if budget % plan.validate_every:
            raise UserError(
                f"{path}: {budget} steps do not end with a validation: let validate_every = {plan.validate_every}"
                " divide every budget"
            )
    return plan


def _method(name: str, entry: Any, steps: tuple[int, ...], path: Path) -> Method:
    where = f"{path}: method {name!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected overlay and rates")
    _check_keys(entry, _METHOD_KEYS, required={"rates"}, where=where)
    config: Config = {}
    overlays = entry.get("overlay") or []
    for overlay in overlays if isinstance(overlays, list) else [overlays]:
        if isinstance(overlay, str):
            overlay = read_mapping(path.parent / overlay)
        config = merge(config, as_config(overlay, where))
    rates = tuple(_rate(rate, where) for rate in _list(entry["rates"], f"{where}: rates"))
    budgets = _steps(entry["steps"], f"{where}: steps") if "steps" in entry else steps
    return Method(name, config, tuple(sorted(rates)), budgets)


def _pilot(entry: Any, tasks: tuple[str, ...], seeds: tuple[int, ...], where: str) -> Pilot:
    entry = as_config(entry, where)
    _check_keys(entry, _PILOT_KEYS, required=set(), where=where)
    pilot = Pilot(
        tasks=tuple(map(str, _list(entry.get("tasks", list(tasks)), f"{where}: tasks"))),
        seeds=_seeds(entry.get("seeds", seeds[0]), f"{where}: seeds"),
        keep=whole_number(entry.get("keep", 1), f"{where}: keep"),
    )
    for kind, own, known in (("task", pilot.tasks, tasks), ("seed", pilot.seeds, seeds)):
        for value in own:
            if value not in known:
                raise UserError(f"{where}: {kind} {value!r} is none of the {kind}s: {', '.join(map(str, known))}")
    return pilot


def _mapping(content: Config, key: str, path: Path, named: bool = False) -> Config:
    value = as_config(content.get(key), f"{path}: {key}")
    if named and not value:
        raise UserError(f"{path}: {key} is empty")
    for name in value if named else ():
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}: {key}: {name!r} is no name for a folder: use letters, digits, _ . + -")
    return value


def _check_keys(content: Config, known: set[str], required: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: there are {', '.join(sorted(known))}")
    for key in sorted(required):
        if content.get(key) is None:
            raise UserError(f"{where}: {key} is missing")


def _list(value: Any, where: str) -> Sequence[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{where}: the list is empty")
    if len(set(map(str, values))) < len(values):
        raise UserError(f"{where}: a value stands there twice")
    return values


def _scores(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: expected a list of names such as accuracy, not {value!r}")
    for name in value:
        if name in {field.name for field in fields(Row)}:
            raise UserError(f"{where}: {name!r} is a column of every table: name what else validations log")
    return tuple(name.removeprefix("val/") for name in value)


def _callbacks(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "class_path" in entry for entry in value):
        raise UserError(f"{where}: expected a list of entries with a class_path, not {value!r:.60}")
    return tuple(value)


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where}: expected true or false, not {value!r}")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    return tuple(whole_number(seed, where, least=0) for seed in _list(value, where))


def _steps(value: Any, where: str) -> tuple[int, ...]:
    return tuple(whole_number(steps, where) for steps in _list(value, where))


def _rate(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: expected positive learning rates, not {value!r}")
    return float(value)
