"""LoRA-Muon: spectral steepest descent of the product, one factor at a time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units, others
from lightning_rlora.optim.peers.roots import inverse_roots, msigns

RIDGE = 1e-5
"""Added to the diagonal of a Gram matrix before its root, as a share of the matrix's Frobenius norm."""


def lora_muon_step(sides: list[Side], *, lr: float, momentum: float, weight_decay: float) -> list[Side]:
    """One step of `LoRAMuon` on pairs of one rank."""
    means = [torch.lerp(side.grad, side.state["momentum_buffer"], momentum) for side in sides]
    grams = [gram(other.value) for other in others(sides)]
    roots = inverse_roots(grams, lambda eigenvalues: RIDGE * eigenvalues.norm(dim=-1))
    polars = msigns([mean @ root for mean, root in zip(means, roots, strict=True)])
    return [
        side._replace(
            value=decayed(side.value, -lr / 2 * polar @ root, lr * weight_decay), state={"momentum_buffer": mean}
        )
        for side, mean, root, polar in zip(sides, means, roots, polars, strict=True)
    ]


def decayed(value: Tensor, change: Tensor, decay: float) -> Tensor:
    """A factor after a step such that the product shrinks by 1 - decay, and the step's own part not at all."""
    root = (1 - decay) ** 0.5
    return root * value + change / root


class LoRAMuon(PerPairOptimizer):
    """Muon's step of the product W + c B A, split evenly between the factors (arXiv 2606.12921).

    With M_A, M_B running means of the factor gradients, C_B = B^T B, C_A = A A^T, s = sqrt(1 - lr * weight_decay), and
    c = 1 (other scalings are taken into the factors, half each):

        A <- s A - lr / (2 s) C_B^(-1/2) msign(C_B^(-1/2) M_A)
        B <- s B - lr / (2 s) msign(M_B C_A^(-1/2)) C_A^(-1/2)

    so that to first order the product changes by at most lr in the spectral norm, and shrinks by 1 - lr *
    weight_decay. The step is invariant under (A, B) -> (S A, B S^-1) up to the ridge in the roots, 1e-5 of the Gram
    matrix's norm: directions of a factor far below 3e-3 of its largest move more slowly. A factor of zeros has a root
    of zero, so from PEFT's start B = 0 only B moves at first.

    Args:
        params: As for `RPrecAdamW`.
        lr: Spectral norm of a step, in units of the weights.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which the product shrinks (times lr); for AdamW groups their decoupled weight decay.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    needs_full_rank = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, adamw_lr=adamw_lr)

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """The running mean of the gradient."""
        return {"momentum_buffer": torch.zeros_like(factor)}

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """See `lora_muon_step`."""
        numbers = {n: group[n] for n in ("lr", "momentum", "weight_decay")}
        return in_weight_units(lora_muon_step, sides, group["scaling"], **numbers)
