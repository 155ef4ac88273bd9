"""PoLoRA: LoRA-Muon's direction under diagonal curvature, with steps of a bounded size."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.lora_muon import decayed
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units, others
from lightning_rlora.optim.peers.roots import DIVISOR_FLOOR, inverse_roots, msigns, spectral_norms

RIDGE = 1e-4
"""Added to curvatures, diagonal or not, as a share of the largest."""


def polora_step(
    sides: list[Side], *, lr: float, momentum: float, curvature_beta: float, weight_decay: float
) -> list[Side]:
    """One step of `PoLoRA` on pairs of one rank."""
    norms = spectral_norms([side.value for side in sides])
    means = [torch.lerp(side.grad, side.state["momentum_buffer"], momentum) for side in sides]
    rows = [damped(side.state["curvature"]).unsqueeze(-1) for side in sides]
    grams = [gram(other.value * rows[i ^ 1].sqrt()) for i, other in enumerate(others(sides))]
    roots = inverse_roots(grams, lambda eigenvalues: RIDGE * eigenvalues[..., -1])
    polars = msigns(
        [
            torch.lerp(side.grad, mean, momentum) / p.sqrt() @ root
            for side, mean, p, root in zip(sides, means, rows, roots, strict=True)
        ]
    )
    directions = [polar / p.sqrt() @ root for polar, p, root in zip(polars, rows, roots, strict=True)]
    sizes = spectral_norms(directions)
    moved = []
    for i, (side, direction) in enumerate(zip(sides, directions, strict=True)):
        share = lr / (norms[i] + norms[i ^ 1]).clamp_min(DIVISOR_FLOOR) / sizes[i].clamp_min(DIVISOR_FLOOR)
        value = decayed(side.value, -share[:, None, None] * direction, lr * weight_decay)
        seen = (side.grad @ roots[i]).square().mean(-1)
        curvature = torch.lerp(seen, side.state["curvature"], curvature_beta)
        moved.append(side._replace(value=value, state={"momentum_buffer": means[i], "curvature": curvature}))
    return moved


def damped(curvature: Tensor) -> Tensor:
    """A diagonal (L, k) with its largest entry at 1, and the ridge; all equal where nothing is known yet."""
    largest = curvature.amax(-1, keepdim=True)
    return torch.where(largest > 0, curvature / largest.clamp_min(DIVISOR_FLOOR), 1.0) + RIDGE


class PoLoRA(PerPairOptimizer):
    """Polar steps of the product W + c B A in a metric of diagonal curvature (arXiv 2607.17620).

    With M_A, M_B running means of the factor gradients, looked ahead as Nesterov does, P and Q diagonal curvatures of
    the weight's rows and columns, C_B = B^T P B, C_A = A Q A^T, and c = 1 (other scalings are taken into the factors,
    half each):

        D_A = C_B^(-1/2) msign(C_B^(-1/2) M_A Q^(-1/2)) Q^(-1/2)
        D_B = P^(-1/2) msign(P^(-1/2) M_B C_A^(-1/2)) C_A^(-1/2)
        A <- A - h D_A / |D_A|_2,   B <- B - h D_B / |D_B|_2,   h = lr / (|A|_2 + |B|_2)

    so that to first order the product changes by at most lr in the spectral norm. Q and P are running means of the
    diagonals of g_A^T C_B^-1 g_A / r and g_B C_A^-1 g_B^T / r, divided by their largest entry. The paper has no weight
    decay; ours shrinks the product, by 1 - lr * weight_decay.

    The directions D_A, D_B do not depend on how the product is factored, the sizes do: the method is invariant under
    orthogonal S of (A, B) -> (S A, B S^-1), and no others. Gram matrices and diagonals have a ridge of 1e-4 of their
    largest value, and a factor of zeros has a root of zero: from PEFT's start B = 0 only B moves at first.

    Args:
        params: As for `RPrecAdamW`.
        lr: Bound of a step's spectral norm, in units of the weights.
        momentum: Share of the momentum kept at each step.
        curvature_beta: Share of the curvatures kept at each step.
        weight_decay: Rate at which the product shrinks (times lr); for AdamW groups their decoupled weight decay.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        momentum: float = 0.9,
        curvature_beta: float = 0.99,
        weight_decay: float = 0.0,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "curvature_beta": curvature_beta, "weight_decay": weight_decay},
            adamw_lr=adamw_lr,
        )

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """The running mean of the gradient, and the curvature of each of the factor's rows or columns."""
        return {"momentum_buffer": torch.zeros_like(factor), "curvature": factor.new_zeros(len(factor))}

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """See `polora_step`."""
        numbers = {n: group[n] for n in ("lr", "momentum", "curvature_beta", "weight_decay")}
        return in_weight_units(polora_step, sides, group["scaling"], **numbers)
