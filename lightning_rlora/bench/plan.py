"""The plan of a comparison: methods x learning rates x seeds x tasks, every run with its own full schedule."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_rlora.errors import UserError
from lightning_rlora.fragments import Config, as_config, fill, merge

MEAN_OF_TASKS = "mean-of-tasks"
"""Stands where a task's name would."""

PILOT = "pilot"
"""Stands where a task's name would: for the mean of the pilot's tasks where these are fewer."""


@dataclass(frozen=True)
class Method:
    """A method: what it changes in the configuration, and the rates and budgets (in optimizer steps) to try."""

    name: str
    config: Config
    rates: tuple[float, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Pilot:
    """A cheap first stage: all rates are tried on these tasks and seeds, and the `keep` around the best ones go on."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    keep: int


@dataclass(frozen=True)
class Run:
    """One training run.

    `config` is the configuration that `rlora fit` gets, with the plan's variables not yet filled in; `variables` are
    the values of those that it uses, as outsiders may see them: of a place on this machine the last part of its path.
    """

    task: str
    method: str
    rate: float
    seed: int
    steps: int
    config: Config
    variables: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """What tells runs apart: everything in the configuration but the values of the plan's variables."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the run lives in the output folder; a changed plan never meets the runs of the old one."""
        name = f"{self.steps}-steps_rate-{self.rate:g}_seed-{self.seed}_{self.fingerprint[:8]}"
        return Path("runs", self.task, self.method, name)


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        name: The plan's file name without its ending.
        description: What is compared and why, for the report.
        sources: Where an outsider gets data and base models, by name, for the report.
        variables: Places such as folders and models that differ between machines; they do not tell runs apart.
        steps: Budgets of the methods that name none; the first one is the reference's.
        validate_every: Optimizer steps from one validation to the next.
        seeds: Of initialisation and dropout, and of the data's order where the plan uses `${seed}` there.
        reference: Method whose tuned final loss the others are to reach.
        scores: What else validations measure and the tables show, by the names of its logs without `val/`.
        mean_of_tasks: Whether tables and pictures of the mean over all tasks are wanted, too: one rate for all of them.
        pilot: Chooses the rates that are run on all tasks and seeds; without, all rates are.
        callbacks: That every run gets beside its own, such as one that measures a score.
        common: Configuration of all runs.
        tasks: What each task changes in it.
        methods: What each method changes, after the task.
    """

    name: str
    description: str
    sources: dict[str, str]
    variables: dict[str, str | None]
    steps: tuple[int, ...]
    validate_every: int
    seeds: tuple[int, ...]
    reference: str
    scores: tuple[str, ...]
    mean_of_tasks: bool
    pilot: Pilot | None
    callbacks: tuple[Any, ...]
    common: Config
    tasks: dict[str, Config]
    methods: dict[str, Method]

    def runs(self) -> list[Run]:
        """All runs, in the order in which they are best done: the first seed of everything, then the next."""
        return [
            self._run(task, method, rate, seed, steps)
            for seed in self.seeds
            for task in self.tasks
            for method in self.methods.values()
            for steps in method.steps
            for rate in method.rates
        ]

    def filled(self, run: Run) -> Config:
        """The configuration of a run with the variables' values.

        Raises:
            UserError: If it uses a variable that has no value.
        """
        return fill(run.config, self.variables)

    def _run(self, task: str, method: Method, rate: float, seed: int, steps: int) -> Run:
        config = self._config(task, method, rate, seed, steps)
        text = json.dumps(config, ensure_ascii=False)
        used = {name: _shown(v) for name, v in self.variables.items() if v is not None and f"${{{name}}}" in text}
        return Run(task, method.name, rate, seed, steps, config, used)

    def _config(self, task: str, method: Method, rate: float, seed: int, steps: int) -> Config:
        where = f"task {task!r}, method {method.name!r}"
        config = merge({}, merge(merge(self.common, self.tasks[task]), method.config))
        trainer, model = (as_config(config.get(part), f"{where}: {part}") for part in ("trainer", "model"))
        trainer.pop("default_root_dir", None)  # of an overlay that also serves `rlora fit`
        if self.callbacks:
            own = trainer.get("callbacks") or []
            trainer["callbacks"] = [*self.callbacks, *(own if isinstance(own, list) else [own])]
        accumulate = whole_number(
            trainer.get("accumulate_grad_batches", 1), f"{where}: trainer.accumulate_grad_batches"
        )
        as_config(model.get("init_args"), f"{where}: model.init_args")
        schedule = {
            "max_steps": steps,
            "max_epochs": -1,
            "val_check_interval": self.validate_every * accumulate,
            "check_val_every_n_epoch": None,
        }
        optimizer = {"init_args": {"optimizer": {"init_args": {"lr": rate}}}}
        config = merge(config, {"seed_everything": seed, "trainer": schedule, "model": optimizer})
        if "class_path" not in config["model"]["init_args"]["optimizer"]:
            raise UserError(f"method {method.name!r} names no optimizer: give model.init_args.optimizer.class_path")
        return fill(config, {"seed": seed}, partly=True)


def whole_number(value: Any, where: str, least: int = 1) -> int:
    """The value, which must be one.

    Raises:
        UserError: If it is none, or too small; `where` says where it stands.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}: expected a whole number from {least} on, not {value!r}")
    return value


def _shown(value: str) -> str:
    """A variable's value for outsiders, the same on every machine as far as that can be."""
    return Path(value).resolve().name if value.startswith(("/", ".", "~")) else value
