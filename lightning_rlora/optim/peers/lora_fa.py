"""LoRA-FA: LoRA with A frozen."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side
from lightning_rlora.optim.peers.rprec_adamw import adamw_side, adamw_start, preconditioned


class LoRAFA(PerPairOptimizer):
    """LoRA with A frozen, and AdamW on B's projected gradient (LoRA-FA, arXiv 2308.03303).

    B's gradient is the one whose product with A is nearest to the weight's own gradient:

        g_B <- g_B (A A^T + d I)^-1 / c^2

    A keeps its start, so the product moves in the linear space of matrices with A's row space, and the method is
    invariant under no re-factorisation beyond what AdamW is. A's gradient is still computed where A is trainable.

    Args:
        params: As for `RPrecAdamW`.
        lr: Learning rate of AdamW on B.
        betas: Decay of AdamW's running means.
        eps: AdamW's floor of the denominator.
        weight_decay: Rate at which B shrinks (times lr); for AdamW groups their decoupled weight decay.
        damping: d, what is added to the diagonal of A's Gram matrix.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        damping: float = 1e-8,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping},
            adamw_lr=adamw_lr,
        )

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """AdamW's state, of B."""
        return adamw_start(factor)

    def start_a(self, factor: Tensor) -> dict[str, Tensor]:
        """None: A stays."""
        return {}

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """B moves, A stays."""
        adamw = {n: group[n] for n in ("lr", "betas", "eps", "weight_decay")}
        moved = []
        for b, a in zip(sides[::2], sides[1::2], strict=True):
            gradient = preconditioned(b.grad, a.value, group["damping"]) / group["scaling"] ** 2
            moved += [adamw_side(b, gradient, **adamw), a]
        return moved
