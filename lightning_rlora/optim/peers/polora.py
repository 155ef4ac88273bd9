"""PoLoRA: LoRA-Muon's direction under diagonal curvature, with steps of a bounded size."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.batched_eigh import eigh
from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.lora_muon import decayed
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units
from lightning_rlora.optim.peers.roots import DIVISOR_FLOOR, inverse_root, msign, spectral_norm

RIDGE = 1e-4
"""Added to curvatures, diagonal or not, as a share of the largest."""


def polora_step(
    b: Side, a: Side, *, lr: float, momentum: float, curvature_beta: float, weight_decay: float
) -> tuple[Side, Side]:
    """One step of `PoLoRA` on a batch of pairs."""
    size = lr / (spectral_norm(b.value) + spectral_norm(a.value)).clamp_min(DIVISOR_FLOOR)

    def moved(side: Side, other: Side) -> Side:
        mean = torch.lerp(side.grad, side.state["momentum_buffer"], momentum)
        ahead = torch.lerp(side.grad, mean, momentum)
        root_p = damped(side.state["curvature"]).rsqrt().unsqueeze(-1)
        n = gram(other.value * damped(other.state["curvature"]).sqrt().unsqueeze(-1))
        root_c = inverse_root(n, RIDGE * largest_eigenvalue(n))
        direction = root_p * msign(root_p * ahead @ root_c) @ root_c
        share = size / spectral_norm(direction).clamp_min(DIVISOR_FLOOR)
        value = decayed(side.value, -share[:, None, None] * direction, lr * weight_decay)
        rows = (side.grad @ root_c).square().mean(-1)
        curvature = torch.lerp(rows, side.state["curvature"], curvature_beta)
        return side._replace(value=value, state={"momentum_buffer": mean, "curvature": curvature})

    return moved(b, a), moved(a, b)


def damped(curvature: Tensor) -> Tensor:
    """A diagonal (L, k) with its largest entry at 1, and the ridge; all equal where nothing is known yet."""
    largest = curvature.amax(-1, keepdim=True)
    return torch.where(largest > 0, curvature / largest.clamp_min(DIVISOR_FLOOR), 1.0) + RIDGE


def largest_eigenvalue(n: Tensor) -> Tensor:
    """The largest eigenvalue, (L, r, r) -> (L,)."""
    return eigh(n)[0][..., -1].clamp_min(0)


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

    def update(self, b: Side, a: Side, group: dict[str, Any]) -> tuple[Side, Side]:
        """See `polora_step`."""
        numbers = {n: group[n] for n in ("lr", "momentum", "curvature_beta", "weight_decay")}
        return in_weight_units(polora_step, b, a, group["scaling"], **numbers)
