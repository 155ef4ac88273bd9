"""Riemannian-preconditioned AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, others


def preconditioned(gradient: Tensor, other: Tensor, damping: float) -> Tensor:
    """The product G (F^T F + damping I)^-1 of gradients (L, k, r) and the other factor F (L, l, r), both tall."""
    n = gram(other)
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    return torch.linalg.solve(n + damping * eye, gradient, left=False)


def adamw_start(factor: Tensor) -> dict[str, Tensor]:
    """The state of `adamw_side`. Its moments are none of a factor's gradient, so not named as torch names those."""
    zeros = torch.zeros_like
    return {"steps": factor.new_zeros(()), "first_moment": zeros(factor), "second_moment": zeros(factor)}


def adamw_side(
    side: Side, gradient: Tensor, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Side:
    """One step of AdamW with another gradient in the place of the side's own."""
    step = side.state["steps"] + 1
    first = torch.lerp(gradient, side.state["first_moment"], betas[0])
    second = torch.lerp(gradient.square(), side.state["second_moment"], betas[1])
    correction1, correction2 = ((1 - beta**step)[:, None, None] for beta in betas)
    direction = (first / correction1) / ((second / correction2).sqrt() + eps)
    value = (1 - lr * weight_decay) * side.value - lr * direction
    return side._replace(value=value, state={"steps": step, "first_moment": first, "second_moment": second})


def rprec_adamw_step(sides: list[Side], *, damping: float, **adamw: Any) -> list[Side]:
    """One step of `RPrecAdamW` on pairs of one rank."""
    return [
        adamw_side(side, preconditioned(side.grad, other.value, damping), **adamw)
        for side, other in zip(sides, others(sides), strict=True)
    ]


class RPrecAdamW(PerPairOptimizer):
    """AdamW on Riemannian-preconditioned gradients of LoRA factors (arXiv 2402.02347).

    With the factor gradients g_A, g_B of W + c B A and damping d:

        g_A <- (B^T B + d I)^-1 g_A        g_B <- g_B (A A^T + d I)^-1

    and then AdamW on both. Without the damping the preconditioned *gradient step* does not depend on how the product is
    factored; AdamW's division entry by entry does, so this method is invariant under no (A, B) -> (S A, B S^-1) but
    signed permutations of the rank. The damping keeps the inverse finite where a factor has not its full rank: from
    PEFT's start B = 0 the gradient of A is zero, and A rests at the first step.

    Args:
        params: Groups made by `parameter_groups(model)`, or by hand: `{"params": [A1, B1, A2, B2, ...], "scaling": c}`
            for LoRA pairs and `{"params": [...], "algorithm": "adamw"}` for anything else. `RPrecAdamW.for_model(model,
            lr=...)` does it in one go.
        lr: Learning rate of AdamW, in units of the factors' entries.
        betas: Decay of AdamW's running means.
        eps: AdamW's floor of the denominator.
        weight_decay: Rate at which both factors shrink (times lr); for AdamW groups their decoupled weight decay.
        damping: d, what is added to the diagonals of the Gram matrices.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.5,
        damping: float = 1e-6,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping},
            adamw_lr=adamw_lr,
        )

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """See `adamw_start`."""
        return adamw_start(factor)

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """See `rprec_adamw_step`."""
        return rprec_adamw_step(sides, **{n: group[n] for n in ("damping", "lr", "betas", "eps", "weight_decay")})
