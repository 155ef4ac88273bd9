"""Whitened Riemannion: Riemannion in the metric of diagonal curvatures on both sides."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_rlora.optim.fixed_rank import FixedRankOptimizer


class WhitenedRiemannion(FixedRankOptimizer):
    r"""Riemannion with a metric that follows the curvature of every row and column of the weight.

    With diagonal matrices C, D of the root mean squares of the loss gradient's rows and columns (running means over the
    steps before, a floor added, their roots scaled to mean 1), one step is Riemannion's for
    X~ = C^(1/2) X D^(1/2), in the metric <xi, eta> = tr(C xi D eta^T):

        G~ = C^(-1/2) G D^(-1/2)
        M~ <- momentum * M~ + P_X~(G~)
        X~ <- retract((1 - lr * weight_decay) X~ - lr * P_X~(Ortho_r(M~)))

    and back. `lightning_rlora.optim.whitening` derives it: what is invariant, which products of the momentum are kept
    and how they move where the point, its factors or the metric change. The step depends on neither the gradient's
    scale nor on how X is factored; with equal curvatures it is Riemannion's. The first step has no curvatures yet, and
    is Riemannion's, too.

    Beside Riemannion's state an adapter of an m x n weight keeps m + n numbers, `curvature`. The factors are balanced
    in the frame: C^(1/2) B and (A D^(1/2))^T have orthogonal columns, of equal sizes. A and B themselves in general
    do not, and the `Retraction` callback leaves them alone.

    Args:
        params: As for `Riemannion`.
        lr: Frobenius norm of a step's orthogonalised momentum in the frame (where, since the roots have mean 1, things
            have the weights' size), in units of the base weight's size; see `relative`.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which X shrinks (times lr); for AdamW groups their decoupled weight decay.
        curvature_decay: Share of the curvatures' mean squares kept at each step.
        curvature_floor: Added to the mean squares, as a share of their mean over rows or columns.
        max_tangent_norm: Clip the whole gradient to this norm: of the Riemannian gradient in its metric, |P_X~(G~)|,
            and of the gradients of AdamW groups. What is clipped enters the curvatures, too.
        adamw_lr: Learning rate of AdamW groups that bring none.
        min_singular_value: Floor of the singular values of X~. Under 16-mixed precision use 1e-6: smaller factors lose
            digits in float16.
        relative: Whether `lr` counts in units of the base weight's size, the root mean square of its singular values,
            so that one rate may serve all ranks, shapes and widths. The modules and `for_model` measure the sizes, as
            `measure_base` does. Weight decay goes by `lr` alone, and the AdamW groups' rates stay as they are. Without
            it `lr` is the step's spectral norm in units of the weights, as that of `Riemannion` is: give one then, such
            as 0.05.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.2,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        curvature_decay: float = 0.98,
        curvature_floor: float = 1e-3,
        max_tangent_norm: float | None = None,
        adamw_lr: float = 1e-4,
        min_singular_value: float = 1e-14,
        relative: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "algorithm": "whitened",
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "curvature_decay": curvature_decay,
                "curvature_floor": curvature_floor,
                "min_singular_value": min_singular_value,
                "relative": relative,
            },
            max_tangent_norm=max_tangent_norm,
            adamw_lr=adamw_lr,
        )
