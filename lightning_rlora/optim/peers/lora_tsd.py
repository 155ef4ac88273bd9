"""LoRA-TSD: a spectral step in the tangent space of the rank-r matrices, taken by the factors themselves."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.lora_muon import decayed
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units
from lightning_rlora.optim.peers.roots import DIVISOR_FLOOR, inverse_roots, msigns

RIDGE = 1e-8
"""Added to the diagonal of a Gram matrix, as a share of its mean."""


def lora_tsd_step(
    sides: list[Side], *, lr: float, momentum: float, weight_decay: float, max_step_norm: float
) -> list[Side]:
    """One step of `LoRATSD` on pairs of one rank."""
    means = [torch.lerp(side.grad, side.state["momentum_buffer"], momentum) for side in sides]
    roots = inverse_roots([gram(side.value) for side in sides], lambda eigenvalues: RIDGE * eigenvalues.mean(-1))
    bases = [side.value @ root for side, root in zip(sides, roots, strict=True)]
    # the tangent part U K V^T + U Y^T + Z V^T of a gradient G, from G V and G^T U; Y and Z are orthogonal to V and U
    products = [mean @ roots[i ^ 1] for i, mean in enumerate(means)]
    rests = [x - u @ (u.mT @ x) for u, x in zip(bases, products, strict=True)]
    q = msigns(rests)
    cores = []
    for b in range(0, len(sides), 2):
        k = products[b + 1].mT @ bases[b + 1]
        r = k.shape[-1]
        core = k.new_zeros(len(k), 2 * r, 2 * r)
        core[:, :r, :r], core[:, :r, r:], core[:, r:, :r] = k, rests[b + 1].mT @ q[b + 1], q[b].mT @ rests[b]
        cores.append(core)
    moved = []
    for b, polar in zip(range(0, len(sides), 2), msigns(cores), strict=True):
        a, r = b + 1, polar.shape[-1] // 2
        polar[:, r:, r:] = 0  # no tangent vector has a part orthogonal to both U and V
        rate = (max_step_norm / polar.norm(dim=(1, 2)).clamp_min(DIVISOR_FLOOR)).clamp_max(lr)[:, None, None]
        change_b = -rate * (bases[b] @ polar[:, :r, :r] + q[b] @ polar[:, r:, :r]) @ roots[a]
        change_a = -rate * (q[a] @ polar[:, :r, r:].mT) @ roots[b]
        new_b = decayed(sides[b].value, change_b, lr * weight_decay)
        new_a = decayed(sides[a].value, change_a, lr * weight_decay)
        # equal norms, at the same product; gradients go the other way
        norm_b, norm_a = new_b.norm(dim=(1, 2), keepdim=True), new_a.norm(dim=(1, 2), keepdim=True)
        ratio = torch.where((norm_b > 0) & (norm_a > 0), norm_b / norm_a, 1.0).sqrt()
        moved.append(sides[b]._replace(value=new_b / ratio, state={"momentum_buffer": means[b] * ratio}))
        moved.append(sides[a]._replace(value=new_a * ratio, state={"momentum_buffer": means[a] / ratio}))
    return moved


class LoRATSD(PerPairOptimizer):
    """Tangent-space spectral descent of the product X = W + c B A (arXiv 2609.02734).

    With M_A, M_B running means of the factor gradients, U and V orthonormal bases of B's columns and A's rows:

        T = P(G), the tangent vector at B A with G V and G^T U taken from M_B and M_A
        D = P(msign(T)), shortened so that |lr D|_F <= max_step_norm
        B <- B - lr D A^T (A A^T)^-1        A <- A - lr (B^T B)^-1 B^T D (I - V V^T)

    so the product's change is -lr D to first order, and there is no retraction beyond that: nothing bounds the second
    order, the product of both changes, which is large where a factor's smallest singular values are tiny beside lr
    (after gradients of rank below r, say). Afterwards A and B are scaled to equal norms, at the same product. D is
    Riemannion's direction; momentum is kept with the factors and not transported. The paper has no weight decay; ours
    shrinks the product, by 1 - lr * weight_decay. Scalings c other than 1 are taken into the factors, half each.

    The step is invariant under (A, B) -> (S A, B S^-1) up to the ridge of the inverses, 1e-8 of a Gram matrix's mean
    diagonal. A factor of zeros has an inverse of zero and spans nothing: from PEFT's start B = 0 only B moves at first.

    Args:
        params: As for `RPrecAdamW`.
        lr: Spectral norm of a step's orthogonalised tangent vector, in units of the weights.
        momentum: Share of the momentum kept at each step.
        weight_decay: Rate at which the product shrinks (times lr); for AdamW groups their decoupled weight decay.
        max_step_norm: Largest Frobenius norm of the product's change in a step.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    needs_full_rank = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        max_step_norm: float = 0.1,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "max_step_norm": max_step_norm},
            adamw_lr=adamw_lr,
        )

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """The running mean of the gradient."""
        return {"momentum_buffer": torch.zeros_like(factor)}

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """See `lora_tsd_step`."""
        numbers = {n: group[n] for n in ("lr", "momentum", "weight_decay", "max_step_norm")}
        return in_weight_units(lora_tsd_step, sides, group["scaling"], **numbers)
