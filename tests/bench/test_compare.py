"""`rlora compare` with a real model: killed with SIGKILL in the middle it goes on, and ends with the same table."""

import csv
import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml
from plans import make_plan

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.bench.compare import write_outputs
from lightning_rlora.bench.plan_file import read_plan
from lightning_rlora.bench.worker import Job, execute
from lightning_rlora.cli import _fit, _set_environment, main

EXAMPLES = Path(__file__).parents[2] / "examples" / "comparison"
PLAN = {
    "steps": 4,
    "validate_every": 2,
    "seeds": [0],
    "reference": "adamw",
    "variables": {"data": None},
    "common": {
        "trainer": {"log_every_n_steps": 1, "limit_val_batches": 1},
        "model": {"class_path": "CausalLM", "init_args": {"adapter": {"r": 2, "target_modules": ["q_proj"]}}},
    },
    "tasks": {
        "numbers": {
            "data": {
                "class_path": "TextData",
                "init_args": {"train": "${data}/data.jsonl", "max_length": 24, "batch_size": 2, "seed": "${seed}"},
            }
        }
    },
    "methods": {
        name: {"rates": rates, "overlay": {"model": {"init_args": {"optimizer": {"class_path": path}}}}}
        for name, path, rates in (("adamw", "torch.optim.AdamW", [0.01, 0.1]), ("sgd", "torch.optim.SGD", [0.1, 1e30]))
    },
}
MEASURED = ("seconds_to_reference", "seconds_per_step", "peak_memory")


def numbers(output):
    """The table without what a clock or the process's memory decides."""
    with (output / "table.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(file)]


def curves(output, plan):
    return [json.loads((output / run.folder / "result.json").read_text())["validation"] for run in plan.runs()]


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of several threads are rounded otherwise
    records = [{"text": f"The {n}th of the many sentences that tell a number."} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    plan = read_plan(path, {"data": str(tmp_path)})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in plan.runs():  # uninterrupted, in this process
        job = Job(run, plan.filled(run), whole, side_by_side=1, keep_adapter=False)
        job.folder.mkdir(parents=True)
        result, _ = execute(job, "cpu", _fit)
        assert result.status == ("diverged" if run.rate == 1e30 else "finished"), result.note
    write_outputs(plan, whole)

    command = ["compare", str(path), "--output", str(killed), "--set", f"data={tmp_path}", "--devices", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_rlora.cli", *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    second = killed / plan.runs()[1].folder
    while not (second / "run.yaml").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in killed.rglob("result.json")}
    assert 1 <= len(done) < 4

    main(command)
    printed = capsys.readouterr().out
    assert f"4 runs, {len(done)} of them done" in printed
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert numbers(killed) == numbers(whole)
    assert curves(killed, plan) == curves(whole, plan)
    assert "| sgd | 4 | 0.1 (edge) |" in printed and "1 of 2" in printed


BAD = {
    "a setting without a value": (["--set", "data"], "NAME=VALUE"),
    "no such variable": (["--set", "dta=x"], "dta"),
    "no such method": (["--set", "data=x", "--only", "adam"], "adam"),
    "no value": ([], "--set data="),
    "no jobs": (["--jobs", "0"], "--jobs 0"),
    "no time": (["--set", "data=x", "--limit-minutes", "nan"], "--limit-minutes nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_status_two(case, tmp_path, capsys):
    make_plan(tmp_path)
    options, word = BAD[case]
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "out"), "--devices", "cpu", *options])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("rlora: error: ") and err.count("\n") == 1 and word in err
    assert not (tmp_path / "out").exists()


def test_many_runs_in_one_process_add_their_filters_once():
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    _set_environment()
    filters = list(logger.filters), list(warnings.filters)
    _set_environment()
    assert (logger.filters, len(warnings.filters)) == (filters[0], len(filters[1]))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_plans_are_whole(path):
    plan = read_plan(path)
    for run in plan.runs():
        config = plan.filled(run)
        assert config["trainer"]["max_steps"] == run.steps
