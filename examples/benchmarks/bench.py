"""What the benchmarks share: timing, the report's header, its tables and its JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TO_MS, MIB = 1e3, 2**20
FEW = 3
"""Rounds that are always measured."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=int, default=32 if ON_GPU else 2, help="layers of the Llama")
    made.add_argument("--shrink", type=int, default=1 if ON_GPU else 16, help="divide Llama-3-8B's widths by this")
    made.add_argument("--threads", type=int, help="CPU threads of torch")
    made.add_argument("--out", type=Path, help="write the results as JSON")
    return made


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def latency(step: Callable[[], Any]) -> float:
    """Milliseconds of one step, from an idle device to an idle device."""
    synchronise()
    start = perf_counter()
    step()
    synchronise()
    return (perf_counter() - start) * TO_MS


def back_to_back(step: Callable[[], Any], count: int = 10) -> float:
    """Milliseconds of each of several steps that are queued without waiting for the one before."""

    def steps() -> None:
        for _ in range(count):
            step()

    return latency(steps) / count


def interleaved(
    runs: Mapping[str, Callable[[], float]], repeats: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """What each of several measurements returns, taken in turn so that a drift of the clocks meets all alike.

    Args:
        runs: Measurements by name.
        repeats: Rounds.
        seconds: Start no further round after this time, if there were a few.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = perf_counter()
    for number in range(repeats):
        if number >= FEW and perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            times[name].append(run())
    return times


def copy_bandwidth() -> float:
    """Bytes per second, read and written ones, of a large copy on the device: the speed of the memory."""
    source = torch.ones(2**29 if ON_GPU else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    times = [latency(lambda: target.copy_(source)) for _ in range(13)]
    return 2 * source.nbytes / (statistics.median(times[3:]) / TO_MS)


def device_name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.open() if "model name" in line] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def header(argv: Sequence[str] | None) -> dict[str, str]:
    """Where, with what, when and how the figures were measured; also printed."""
    found = {"device": device_name(), "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "peft", "lightning-rlora"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    found["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    found["command"] = " ".join(["python", sys.argv[0], *argv]) if argv is not None else " ".join(["python", *sys.argv])
    print(f"# {found['device']}")
    print(", ".join(f"{key} {value}" for key, value in found.items() if key not in ("device", "command")))
    print(f"`{found['command']}`\n")
    return found


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a markdown table; floats get four digits."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else value

    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(value) for value in row) + " |")
    print(flush=True)


def write(out: Path | None, head: Mapping[str, str], **results: Any) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"header": dict(head), **results}, indent=1))
