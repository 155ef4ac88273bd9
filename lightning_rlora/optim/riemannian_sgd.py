"""RiemannianSGD: the optimizer of RiemannLoRA, plain or Adam-like."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_rlora.optim.fixed_rank import FixedRankOptimizer


class RiemannianSGD(FixedRankOptimizer):
    """Riemannian gradient descent with momentum for LoRA adapters (arXiv 2507.12142, Algorithm 6).

    One step from the product X = c B A and the momentum M, with the loss gradient G with respect to X:

        M <- momentum * M + (1 - momentum) * P_X(G)
        X <- retract((1 - lr * weight_decay) X - lr * D(M))

    D(M) is M itself or, with `simulate_adam`, M with each of its two tangent factors divided by the running average of
    that factor's Frobenius norm (corrected for its start at zero, as in Adam). M is carried to the new point by
    projection.

    Args:
        params: As for `Riemannion`.
        lr: Step size.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which X shrinks (times lr); for AdamW groups their decoupled weight decay.
        simulate_adam: Divide the tangent factors by running averages of their norms, so that steps have Adam-like
            sizes.
        betas: Only the second is used on pairs: the decay of those running averages. AdamW groups use both.
        max_tangent_norm: Clip the whole gradient, as a tangent vector, to this norm.
        adamw_lr: Learning rate of AdamW groups that bring none.
        min_singular_value: Floor of X's singular values. Under 16-mixed precision use 1e-6: smaller factors lose digits
            in float16.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        simulate_adam: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        max_tangent_norm: float | None = None,
        adamw_lr: float = 1e-4,
        min_singular_value: float = 1e-14,
    ) -> None:
        super().__init__(
            params,
            {
                "algorithm": "sgd",
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "min_singular_value": min_singular_value,
                "simulate_adam": simulate_adam,
                "betas": betas,
            },
            max_tangent_norm=max_tangent_norm,
            adamw_lr=adamw_lr,
        )
