"""The result of a run: one JSON file, written when the run has ended and only then."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_rlora.bench.plan import Run
from lightning_rlora.files import write_atomically

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """What is kept of a run.

    Attributes:
        status: `finished`, `diverged` (a loss or gradient that is not finite, as good a result as any), or `failed`,
            which is tried again at the next start.
        fingerprint: Of the run (see `Run.fingerprint`).
        task: The run's task.
        method: Its method.
        rate: Its learning rate.
        seed: Its seed.
        steps: Its budget, in optimizer steps.
        note: Why it diverged or failed, in one line.
        validation: Validation loss by step, from step 0 (before training) to the last.
        train: Training loss by step, of single batches.
        scores: What else was measured at validations, such as `accuracy`: by name, a value by step.
        cost: What `RunCost` measured; empty if the run did not come to its end.
        adapter: `bytes` of the exported adapter's weights, and its PEFT `config`.
        meta: When, with which versions, beside how many other runs, and how many seconds in all.
        config: The run's configuration, variables not filled in.
        variables: Their values (see `Run.variables`); none in results of before they were kept.
    """

    status: Literal["finished", "diverged", "failed"]
    fingerprint: str
    task: str
    method: str
    rate: float
    seed: int
    steps: int
    note: str = ""
    validation: Curve = field(default_factory=list)
    train: Curve = field(default_factory=list)
    scores: dict[str, Curve] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Validation loss at the end; infinite if there is none."""
        return self.validation[-1][1] if self.status == "finished" else math.inf

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of a training step, without the first interval between validations, in which things warm up."""
        seconds = self.cost.get("seconds") or []
        first, last = (seconds[0], seconds[-1]) if len(seconds) > 1 else ((0, 0.0), (seconds or [(0, 0.0)])[-1])
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else None


def result_of(run: Run, status: Literal["finished", "diverged", "failed"], **more: Any) -> Result:
    """A result of a run."""
    place = run.task, run.method, run.rate, run.seed, run.steps
    return Result(status, run.fingerprint, *place, variables=run.variables, **more)


def write_result(output: Path, run: Run, result: Result) -> None:
    """Leave the result in the run's folder, whole or not at all."""
    content = json.dumps(asdict(result), indent=1, allow_nan=False)
    write_atomically(output / run.folder / "result.json", content.encode())


def read_result(output: Path, run: Run) -> Result | None:
    """The result of a run, if its folder holds one that is whole and belongs to this very configuration."""
    path = output / run.folder / "result.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "accuracy" in content:  # the only score of results of before
            content["scores"] = {"accuracy": content.pop("accuracy")}
        result = Result(**content)
    except (ValueError, TypeError):  # not JSON, or of another version of this file
        return None
    return result if result.fingerprint == run.fingerprint else None
