"""Plans and results to test with."""

import copy
from pathlib import Path

import yaml

from lightning_rlora.bench.plan import Plan, Run
from lightning_rlora.bench.plan_file import read_plan
from lightning_rlora.bench.results import Result, result_of

PLAN = {
    "steps": 4,
    "validate_every": 2,
    "seeds": [0, 1],
    "reference": "adamw",
    "variables": {"base": "embedded:tiny-lm", "data": None},
    "common": {"model": {"class_path": "CausalLM", "init_args": {"base": "${base}", "adapter": {"r": 2}}}},
    "tasks": {
        "words": {"data": {"class_path": "TextData", "init_args": {"train": "${data}/a.jsonl", "seed": "${seed}"}}}
    },
    "methods": {
        "adamw": {"rates": [0.1, 0.01], "overlay": {"model": {"init_args": {"optimizer": {"class_path": "AdamW"}}}}},
        "sgd": {"rates": [1.0], "overlay": {"model": {"init_args": {"optimizer": {"class_path": "SGD"}}}}},
    },
}


def write_plan(folder: Path, **changes) -> Path:
    """A plan file: PLAN with some keys replaced, or left out if None."""
    content = copy.deepcopy(PLAN) | changes
    path = folder / "plan.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def make_plan(folder: Path, **changes) -> Plan:
    return read_plan(write_plan(folder, **changes), {"data": str(folder)})


def finished(run: Run, loss: float, seconds: float = 1.0) -> Result:
    """A run whose loss falls in a straight line from 5 at step 0, with so many seconds a step."""
    points = range(0, run.steps + 1, 2)
    return result_of(
        run,
        "finished",
        validation=[(step, 5 + (loss - 5) * step / run.steps) for step in points],
        train=[(step, 5 + (loss - 5) * step / run.steps) for step in points if step],
        scores={"accuracy": [(step, step / run.steps / (1 + run.seed)) for step in points]},
        cost={
            "device": "cpu",
            "seconds": [(step, seconds * step) for step in points if step],
            "peak_memory": 2**20,
            "memory_reserved_mean": 1,
            "memory_reserved_99th": 2,
            "samples": 8 * run.steps,
            "tokens": 64 * run.steps,
            "trainable_parameters": 10,
            "parameters": 100,
        },
        adapter={"bytes": 40, "config": {"peft_type": "LORA"}},
        meta={
            "created": "2026-11-22T00:00:00+00:00",
            "total_seconds": 9.0,
            "side_by_side": 1,
            "versions": {"python": "3.11", "torch": "2.13", "peft": "0.21"},
            "system": {"system": "Linux"},
        },
        config=run.config,
    )
