"""An optimizer over LoRA pairs of given shapes, without a model: the thing that step_time.py times."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from bench import DEVICE, ON_GPU, back_to_back, interleaved, latency
from llama import state_bytes
from torch import nn
from torch.optim import Optimizer

from lightning_rlora.optim import RiemannianSGD, Riemannion, WhitenedRiemannion

SCALING = 2.0
SIZE = 0.05
"""About the singular values of the points."""

Make = Callable[[list[dict[str, Any]]], Optimizer]

ADAMW: dict[str, Make] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, **{"fused" if ON_GPU else "foreach": True})
}
RIEMANNION: dict[str, Make] = {"Riemannion": lambda groups: Riemannion(groups, lr=1e-3, momentum=0.9)}
VARIANTS: dict[str, Make] = {
    "Riemannion, clipped": lambda groups: Riemannion(groups, lr=1e-3, momentum=0.9, max_tangent_norm=1.0),
    "WhitenedRiemannion": lambda groups: WhitenedRiemannion(groups, lr=1e-3, momentum=0.9, relative=False),
    "RiemannianSGD": lambda groups: RiemannianSGD(groups, lr=1e-3, momentum=0.9),
    "RiemannianSGD, simulate_adam": lambda groups: RiemannianSGD(groups, lr=1e-3, momentum=0.9, simulate_adam=True),
}


def floor_bytes(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """The least that two passes over the factors move: read factor, gradient, momentum; again; write two of them."""
    return 8 * 4 * rank * sum(m + n for m, n in shapes)


class Contestant:
    """An optimizer over float32 pairs of its own, whose gradients change between two sets of random numbers."""

    def __init__(self, make: Make, shapes: Sequence[tuple[int, int]], rank: int) -> None:
        torch.manual_seed(0)  # the same numbers for every contestant
        self.params: list[nn.Parameter] = []
        for m, n in shapes:
            # entries with which A and B have columns of equal length, and c B A singular values of about SIZE
            self.params.append(nn.Parameter(torch.randn(rank, n, device=DEVICE) * (SIZE / SCALING / n) ** 0.5))
            self.params.append(nn.Parameter(torch.randn(m, rank, device=DEVICE) * (SIZE / SCALING / m) ** 0.5))
        self.gradients = [[1e-3 * torch.randn_like(p) for p in self.params] for _ in range(2)]
        start = perf_counter()
        self.optimizer = make([{"params": self.params, "scaling": SCALING}])
        self.construction_seconds = perf_counter() - start

    def new_gradients(self) -> None:
        """Other gradients at other addresses, as after `zero_grad(set_to_none=True)` and a backward pass."""
        self.gradients.reverse()
        for parameter, gradient in zip(self.params, self.gradients[0], strict=True):
            parameter.grad = gradient

    def timed(self, timing: Callable[[Callable[[], Any]], float]) -> float:
        self.new_gradients()
        return timing(self.optimizer.step)

    def step(self) -> None:
        self.new_gradients()
        self.optimizer.step()


def compare(
    makes: dict[str, Make], shapes: Sequence[tuple[int, int]], rank: int, repeats: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Milliseconds of `optimizer.step()` for each optimizer, in turn: medians, smallest and largest times.

    Args:
        makes: Optimizers by name.
        shapes: (m, n) of the adapted matrices.
        rank: Rank of the adapters.
        repeats: Measurements of each optimizer and timing; ten more go before them as warm-up.
        seconds: Limit for each timing, for optimizers so slow that fewer repeats must do; the result says how many.
    """
    contestants = {name: Contestant(make, shapes, rank) for name, make in makes.items()}
    results: dict[str, dict[str, Any]] = {name: {} for name in makes}
    for key, timing in (("latency_ms", latency), ("back_to_back_ms", back_to_back)):
        runs = {name: partial(contestant.timed, timing) for name, contestant in contestants.items()}
        interleaved({name: partial(c.timed, latency) for name, c in contestants.items()}, 10, seconds / 4)  # compiles
        for name, times in interleaved(runs, repeats, seconds).items():
            results[name] |= {key: statistics.median(times), f"{key}_range": [min(times), max(times)]}
            results[name][f"{key}_repeats"] = len(times)
    for name, contestant in contestants.items():
        assert all(bool(p.isfinite().all()) for p in contestant.params), f"{name} made factors that are not finite"
        results[name]["state_bytes"] = state_bytes(contestant.optimizer)
        results[name]["construction_s"] = contestant.construction_seconds
    return results
