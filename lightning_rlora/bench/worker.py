"""What a worker process does: run after run with the imports made once."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml

from lightning_rlora.bench.plan import Run
from lightning_rlora.bench.results import Curve, Result, result_of, write_result
from lightning_rlora.errors import Diverged, user_line
from lightning_rlora.fragments import Config, merge

Fit = Callable[[Path], None]
"""Trains as a configuration file says; what `rlora fit --config` does."""

PACKAGES = ("lightning-rlora", "torch", "lightning", "transformers", "peft")


@dataclass(frozen=True)
class Job:
    """A run to do: its configuration with the variables filled in, and where its folder belongs."""

    run: Run
    config: Config
    output: Path
    side_by_side: int
    keep_adapter: bool

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.output / self.run.folder


def work(connection: Connection, device: str, threads: int, fit: Fit) -> None:
    """Do the jobs that come over a connection; send the result of each, and whether this process can do another.

    It cannot after an error that may have left it in disorder, and ends.

    Args:
        connection: To the process that hands out the jobs.
        device: For CUDA_VISIBLE_DEVICES, or `cpu`.
        threads: For CPU work, unless OMP_NUM_THREADS says otherwise.
        fit: Trains.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees Ctrl-C and decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    in_order = True
    while in_order:
        job: Job = connection.recv()
        shutil.rmtree(job.folder, ignore_errors=True)  # what a killed or failed run left
        job.folder.mkdir(parents=True)
        _send_output_to(job.folder / "log.txt")
        result, in_order = execute(job, device, fit)
        connection.send((result, in_order))


def execute(job: Job, device: str, fit: Fit) -> tuple[Result, bool]:
    """Do a run from its start, and leave its result in its folder, which is there and holds no other run.

    Returns:
        The result, and whether this process is fit for another run.
    """
    folder = job.folder
    config = run_config(job, device)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    began, in_order = time.perf_counter(), True
    created = datetime.now(UTC).isoformat(timespec="seconds")
    status, note = "finished", ""
    try:
        fit(folder / "run.yaml")
    except Exception as error:
        traceback.print_exc()
        name = type(error).__name__
        # an eigenvalue solver that gives up has met numbers that are not finite
        status = "diverged" if isinstance(error, Diverged) or name == "LinAlgError" else "failed"
        line = user_line(error)
        note = line or f"{name}: {' '.join(str(error).split())[:300]}"
        in_order = status == "diverged" or (line is not None and name != "OutOfMemoryError")
    curves = _curves(folder)
    validation, train = curves.pop("val/loss"), curves.pop("train/loss")
    if status == "finished" and not all(math.isfinite(loss) for _, loss in validation):
        status, note = "diverged", "the validation loss is not finite"
    elif status == "finished" and (not validation or validation[-1][0] != job.run.steps):
        status, note = "failed", "there was no validation at the last step: do the data have a validation part?"
    _clean_up()
    result = result_of(
        job.run,
        status,  # type: ignore[arg-type]
        note=note,
        validation=_finite(validation),
        train=_finite(train),
        scores={name.removeprefix("val/"): _finite(curve) for name, curve in curves.items()},
        cost=_read_json(folder / "cost.json"),
        adapter=_adapter(folder / "adapter"),
        meta={
            "created": created,
            "total_seconds": time.perf_counter() - began,
            "side_by_side": job.side_by_side,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "system": {
                key: getattr(platform, key)() for key in ("system", "release", "version", "machine", "processor")
            },
        },
        config=job.run.config,
    )
    write_result(job.output, job.run, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not job.keep_adapter:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
    return result, in_order


def run_config(job: Job, device: str) -> Config:
    """The configuration that `rlora fit` gets: the plan's, made quiet, measured, and put in its folder."""
    quiet = {
        "trainer": {"enable_progress_bar": False, "enable_model_summary": False},
        "checkpoint": {"save_top_k": 0, "save_last": False},
        "spectrum": {"every_n_steps": None},
    }
    config = merge(quiet, job.config)
    callbacks = config["trainer"].get("callbacks") or []
    measured = {
        "accelerator": "cpu" if device == "cpu" else "gpu",
        "devices": 1,
        "default_root_dir": str(job.folder),
        "callbacks": [{"class_path": "RunCost"}, *(callbacks if isinstance(callbacks, list) else [callbacks])],
    }
    return merge(config, {"trainer": measured})


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, even by SIGKILL: nobody waits for the result any more."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _send_output_to(path: Path) -> None:
    """Let all that this process writes, also what C code writes, go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _clean_up() -> None:
    """Give the run's memory back before the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _curves(folder: Path) -> dict[str, Curve]:
    """The training loss and all that validations measured, by their names in the metrics file."""
    curves: dict[str, Curve] = {"train/loss": [], "val/loss": []}
    path = folder / "metrics.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name in curves or name.startswith("val/"):
                        points = curves.setdefault(name, [])
                        if value:
                            points.append((int(row["step"]), float(value)))
    return curves


def _finite(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _adapter(folder: Path) -> dict[str, Any]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return {}
    config = _read_json(folder / "adapter_config.json") | {"base_model_name_or_path": None}  # a place on this machine
    return {"bytes": sum(path.stat().st_size for path in weights), "config": config}
