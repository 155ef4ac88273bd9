"""Optimizers on pairs of any shapes, ranks and scalings, and their gradients, for the tests of the fast step."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry import random_point
from lightning_rlora.optim import FixedRankOptimizer


class Shapes(NamedTuple):
    """A group of pairs."""

    scaling: float
    rank: int
    shapes: list[tuple[int, int]]


RANKS = [
    Shapes(2.0, 1, [(64, 48)]),
    Shapes(0.5, 2, [(64, 48), (100, 36)]),
    Shapes(1.0, 5, [(64, 50)]),
    Shapes(1.0, 8, [(64, 50), (200, 100), (8, 50)]),  # r = m
    Shapes(2.0, 12, [(64, 50), (20, 18)]),  # 2r > m, n
    Shapes(2.0, 16, [(300, 50)]),
    Shapes(1.0, 28, [(300, 61)]),
    Shapes(2.0, 32, [(300, 150)]),
    Shapes(1.0, 40, [(99, 300)]),
    Shapes(0.3, 56, [(300, 150)]),
    Shapes(0.3, 64, [(300, 200), (100, 200)]),
    Shapes(2.0, 128, [(500, 400)]),
]
"""For a GPU: every rank that takes kernels of its own, and shapes at its limits."""


def build(
    make: Callable[..., FixedRankOptimizer],
    cases: Iterable[Shapes],
    dtype: torch.dtype,
    device: str = "cpu",
    spread: float = 0.1,
    **options: object,
) -> FixedRankOptimizer:
    """An optimizer whose pairs start at the same float32 points, in the balanced gauge, in any dtype.

    Singular values run down from 0.1 to `spread` times that.
    """
    generator = torch.Generator().manual_seed(0)
    groups = []
    for scaling, rank, shapes in cases:
        params = []
        for m, n in shapes:
            point = random_point(m, n, rank, generator=generator, dtype=torch.float64)
            root = (0.1 * spread ** (torch.arange(rank, dtype=torch.float64) / max(rank - 1, 1)) / scaling).sqrt()
            for factor in ((point.v * root).mT, point.u * root):
                params.append(torch.nn.Parameter(factor.float().contiguous().to(device, dtype)))
        groups.append({"params": params, "scaling": scaling})
    return make(groups, **options)


def pairs_of(optimizer: FixedRankOptimizer) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and c of every pair."""
    return [
        (a, b, group["scaling"])
        for group in optimizer.param_groups
        if group["algorithm"] != "adamw"
        for a, b in zip(group["params"][::2], group["params"][1::2], strict=True)
    ]


def hand_over(optimizers: list[FixedRankOptimizer], gradients: list[Tensor]) -> None:
    """Set the factor gradients that belong to gradients (m, n) with respect to the products."""
    for optimizer in optimizers:
        for (a, b, c), g in zip(pairs_of(optimizer), gradients, strict=True):
            g = g.to(b.device)
            a.grad = (c * b.detach().double().mT @ g).to(a.dtype)
            b.grad = (c * g @ a.detach().double().mT).to(b.dtype)


def random_gradients(optimizer: FixedRankOptimizer, generator: torch.Generator) -> list[Tensor]:
    """A gradient (m, n) of every pair, float64."""
    return [
        torch.randn(len(b), a.shape[1], generator=generator, dtype=torch.float64) for a, b, _ in pairs_of(optimizer)
    ]


def worst_error(optimizer: FixedRankOptimizer, reference: FixedRankOptimizer) -> float:
    """The largest relative difference of two optimizers' products."""
    errors = []
    for (a, b, _), (a_0, b_0, _) in zip(pairs_of(optimizer), pairs_of(reference), strict=True):
        x, x_0 = (left.detach().double().cpu() @ right.detach().double().cpu() for left, right in ((b, a), (b_0, a_0)))
        errors.append(float((x - x_0).norm() / x_0.norm()))
    return max(errors)


def worst_drift(optimizer: FixedRankOptimizer) -> float:
    """The largest cosine of two columns of one factor."""
    worst = 0.0
    for a, b, _ in pairs_of(optimizer):
        for tall in (a.detach().double().mT, b.detach().double()):
            basis = tall / tall.norm(dim=0)
            n = basis.mT @ basis
            worst = max(worst, float((n - torch.eye(len(n), dtype=n.dtype, device=n.device)).abs().max()))
    return worst
