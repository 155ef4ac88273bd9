"""Muon on each LoRA factor by itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of Muon's iteration a X + (b X X^T + c (X X^T)^2) X, the ones of torch.optim.Muon."""

STEPS = 5

EPS = 1e-7
"""The least norm a matrix is divided by before the iteration, as in torch.optim.Muon."""


def newton_schulz(x: Tensor) -> Tensor:
    """Muon's rough polar factor of x (L, k, r): singular values between about 0.7 and 1.2, zero stays zero."""
    a, b, c = QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(EPS)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(STEPS):
        n = x.mT @ x
        x = x @ (a * eye + b * n + c * n @ n)
    return x


def factor_muon_side(side: Side, *, lr: float, momentum: float, weight_decay: float, size: float) -> Side:
    """One step of Muon on one factor of a batch of pairs; `size` multiplies the learning rate."""
    mean = torch.lerp(side.grad, side.state["momentum_buffer"], momentum)
    direction = newton_schulz(torch.lerp(side.grad, mean, momentum))
    value = (1 - lr * weight_decay) * side.value - lr * size * direction
    return side._replace(value=value, state={"momentum_buffer": mean})


class FactorMuon(PerPairOptimizer):
    """Muon on each factor of LoRA pairs, as if A and B were weights of their own.

    With M a running mean of a factor's gradient g and NS five steps of Newton and Schulz' iteration:

        M <- momentum * M + (1 - momentum) * g
        F <- (1 - lr * weight_decay) F - lr * sqrt(max(1, rows / columns)) * NS((1 - momentum) * g + momentum * M)

    It is what torch.optim.Muon does, with all pairs of one shape at once, convolutions flattened to matrices, and the
    iteration in float64, where torch's runs in bfloat16 and is some 2e-2 of a step away. NS whitens each factor on
    its own, so the method is invariant under orthogonal S of (A, B) -> (S A, B S^-1) and no others. It has no Gram
    matrix to invert: at PEFT's start B = 0 the gradient of A is zero, and A rests.

    Args:
        params: As for `RPrecAdamW`.
        lr: Learning rate.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which both factors shrink (times lr); for AdamW groups their decoupled weight decay.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.2,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, adamw_lr=adamw_lr)

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """The running mean of the gradient."""
        return {"momentum_buffer": torch.zeros_like(factor)}

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """Every side on its own."""
        numbers = {n: group[n] for n in ("lr", "momentum", "weight_decay")}
        moved = []
        for i, side in enumerate(sides):
            long, r = side.value.shape[1:]
            rows, columns = (long, r) if i % 2 == 0 else (r, long)  # A is transposed here
            moved.append(factor_muon_side(side, **numbers, size=max(1, rows / columns) ** 0.5))
        return moved
