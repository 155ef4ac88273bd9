"""How the time of a Riemannion step grows with rank, width and number of adapters, and the plot of it."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import ON_GPU, TO_MS, show
from contestant import RIEMANNION, compare, floor_bytes

WIDTHS = [1024, 2048, 4096, 8192] if ON_GPU else [64, 128, 256]
COUNTS = [28, 56, 112, 224, 448, 1000] if ON_GPU else [7, 14, 28]
WIDTH, COUNT, RANK = (4096, 224, 16) if ON_GPU else (256, 14, 8)

LINEAR = 1.3
"""Above a millisecond, time may grow by this factor more than the floor's bytes from one point to the next."""

Case = tuple[int, list[tuple[int, int]], int]
"""A point of an axis: the number shown, the shapes, the rank."""


def growth(
    shapes: list[tuple[int, int]], ranks: Sequence[int], repeats: int, seconds: float, bandwidth: float
) -> dict[str, list[dict[str, Any]]]:
    """Measure along three axes, print a table of each, and return its points."""
    axes: dict[str, list[Case]] = {
        f"rank ({len(shapes)} adapters of a Llama)": [(rank, shapes, rank) for rank in ranks],
        f"width m = n ({COUNT} adapters, rank {RANK})": [(w, [(w, w)] * COUNT, RANK) for w in WIDTHS],
        f"adapters ({WIDTH} x {WIDTH}, rank {RANK})": [(k, [(WIDTH, WIDTH)] * k, RANK) for k in COUNTS],
    }
    points = {name: [measure(case, repeats, seconds, bandwidth) for case in cases] for name, cases in axes.items()}
    for name, axis in points.items():
        show_axis(name, axis)
    return points


def measure(case: Case, repeats: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    value, shapes, rank = case
    result = compare(RIEMANNION, shapes, rank, repeats, seconds)["Riemannion"]
    moved = floor_bytes(shapes, rank)
    return {"value": value, "floor_bytes": moved, "floor_ms": moved / bandwidth * TO_MS} | result


def beyond_linear(before: dict[str, Any], point: dict[str, Any], key: str) -> float | None:
    """By what factor more than its bytes the time has grown; None where a time is under a millisecond."""
    if min(before[key], point[key]) < 1:
        return None
    return (point[key] / before[key]) / (point["floor_bytes"] / before["floor_bytes"])


def show_axis(name: str, axis: list[dict[str, Any]]) -> None:
    rows, worst = [], []
    for before, point in pairwise([None, *axis]):
        row = [point["value"], point["floor_ms"]]
        for key in ("latency_ms", "back_to_back_ms"):
            excess = beyond_linear(before, point, key) if before else None
            row += [point[key], point[key] / point["floor_ms"], excess]
            worst += [] if excess is None else [excess]
        rows.append(row)
    timing = ["/ floor", "growth / bytes'"]
    show([name, "floor, ms", "latency, ms", *timing, "back to back, ms", *timing], rows)
    if worst:
        verdict = "linear" if max(worst) <= LINEAR else "NOT linear"
        print(f"{verdict} within {LINEAR}: at most {max(worst):.2f} above a millisecond\n")
    else:
        print("too few points above a millisecond to judge growth\n")


def plot(results: Path, image: Path) -> None:
    """Three panels, time and floor over rank, width and number of adapters, on logarithmic axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from None
    report = json.loads(results.read_text())
    if "growth" not in report:
        raise SystemExit(f"{results} holds no growth: measure it with --growth --out {results}")
    figure = Figure(figsize=(13, 4), layout="constrained")
    for panel, (name, axis) in zip(figure.subplots(1, 3, sharey=True), report["growth"].items(), strict=True):
        values = [point["value"] for point in axis]
        for key, label, style in (
            ("latency_ms", "step, latency", "o-"),
            ("back_to_back_ms", "step, back to back", "s-"),
            ("floor_ms", "floor: two passes over the factors", "k--"),
        ):
            panel.loglog(values, [point[key] for point in axis], style, label=label)
        panel.set_xticks(values, labels=[str(value) for value in values])
        panel.minorticks_off()
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].legend()
    head = report["header"]
    figure.suptitle(f"Riemannion: optimizer.step() on {head['device']}, torch {head['torch']}, {head['date']}")
    figure.savefig(image, dpi=150)
