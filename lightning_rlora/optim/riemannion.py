"""Riemannion: Muon on the manifold of fixed-rank matrices."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_rlora.optim.fixed_rank import FixedRankOptimizer


class Riemannion(FixedRankOptimizer):
    r"""Riemannian momentum with orthogonalised steps for LoRA adapters (arXiv 2507.12142, Eq. 10 to 12).

    One step from the product X = c B A and the momentum M, with the loss gradient G with respect to X:

        M <- momentum * M + P_X(G)
        X <- retract((1 - lr * weight_decay) X - lr * P_X(Ortho_r(M)))

    and M is carried to the new point by projection. P_X projects onto the tangent space of the rank-r matrices at X,
    Ortho_r sets the singular values of M to one, and the retraction is the best approximation of rank r. The step
    depends on neither the gradient's scale nor on how X is factored; factors A, B are left in the balanced gauge, and
    the function never changes by that.

    Weight decay shrinks X. With an offset of the base (locally optimal initialisation), W' = W - X0, it therefore pulls
    the weight towards W - X0, as in the paper, and not towards W.

    Args:
        params: Groups made by `parameter_groups(model)`, or by hand: `{"params": [A1, B1, A2, B2, ...], "scaling": c}`
            for LoRA pairs and `{"params": [...], "algorithm": "adamw"}` for anything else. `Riemannion.for_model(model,
            lr=...)` does it in one go.
        lr: Spectral norm of a step's orthogonalised momentum, in units of the weights.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which X shrinks (times lr); for AdamW groups their decoupled weight decay.
        max_tangent_norm: Clip the whole gradient, as a tangent vector, to this norm.
        adamw_lr: Learning rate of AdamW groups that bring none.
        min_singular_value: Floor of X's singular values. Under 16-mixed precision use 1e-6: smaller factors lose digits
            in float16.
        relative: Whether `lr` is the Frobenius norm of a step's orthogonalised momentum in units of the base weight's
            size, the root mean square of its singular values, so that one rate may serve all ranks, shapes and widths;
            0.1 is a rate to begin with. The modules and `for_model` measure the sizes, as `measure_base` does. Weight
            decay goes by `lr` alone, and the AdamW groups' rates stay as they are.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_tangent_norm: float | None = None,
        adamw_lr: float = 1e-4,
        min_singular_value: float = 1e-14,
        relative: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "algorithm": "riemannion",
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "min_singular_value": min_singular_value,
                "relative": relative,
            },
            max_tangent_norm=max_tangent_norm,
            adamw_lr=adamw_lr,
        )
