"""LoRA-RITE: an adaptive method whose second moment lives in the other factor's orthonormal basis."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units, others
from lightning_rlora.optim.peers.roots import eighs, pseudo_inverse_roots


def lora_rite_step(
    sides: list[Side], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> list[Side]:
    """One step of `LoRARITE` on pairs of one rank."""
    roots = pseudo_inverse_roots([gram(side.value) for side in sides])
    bases = [side.value @ root for side, root in zip(sides, roots, strict=True)]
    turns = [bases[i ^ 1].mT @ other.state["basis"] for i, other in enumerate(others(sides))]
    # "unmagnified": in the other factor's orthonormal basis
    gradients = [side.grad @ roots[i ^ 1] for i, side in enumerate(sides)]
    keeps = [[_corrected(beta, side.state["steps"] + 1) for beta in betas] for side in sides]
    old = [side.state["second_moment"] for side in sides]
    carried = [turn @ second @ turn.mT for turn, second in zip(turns, old, strict=True)]
    new = [
        torch.lerp(gram(g) / g.shape[1], second, keep2[:, None, None])
        for g, second, (_, keep2) in zip(gradients, carried, keeps, strict=True)
    ]
    spectra = eighs([*old, *carried, *new])
    moved = []
    for i, side in enumerate(sides):
        before, after, (values, vectors) = (spectra[i + k * len(sides)] for k in range(3))
        keep1, keep2 = keeps[i]
        escaped = keep2 * (side.state["escaped"] + _escaped(before[0], after[0]))
        inverse = 1 / ((values.clamp_min(0) + escaped.unsqueeze(-1)).sqrt() + eps)
        scaled = gradients[i] @ (vectors * inverse.unsqueeze(-2)) @ vectors.mT
        first = torch.lerp(scaled, side.state["first_moment"] @ turns[i].mT, keep1[:, None, None])
        state = {
            "steps": side.state["steps"] + 1,
            "basis": bases[i],
            "first_moment": first,
            "second_moment": new[i],
            "escaped": escaped,
        }
        value = (1 - lr * weight_decay) * side.value - lr * first @ roots[i ^ 1]
        moved.append(side._replace(value=value, state=state))
    return moved


def _corrected(beta: float, step: Tensor) -> Tensor:
    """The share kept at a step such that a mean that starts at zero is one of what it has seen."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _escaped(old: Tensor, new: Tensor) -> Tensor:
    """What a second moment lost on its way into the new basis: at most its eigenvalues' loss, or its trace's.

    Args:
        old: Its eigenvalues before, ascending, (L, r).
        new: The same after.
    """
    return torch.minimum((old - new).amax(-1), (old - new).sum(-1)).clamp_min(0)


class LoRARITE(PerPairOptimizer):
    """Robust invariant transformation equilibration for LoRA (arXiv 2410.20625).

    For B: with A^T = V R, V orthonormal, the gradient in A's basis g = g_B R^-1, T = V_new^T V_old the change of basis
    since the last step, and running means with Adam's correction for their start at zero (g_B is (m, r)):

        S <- beta2 T S T^T + (1 - beta2) g^T g / m          e <- beta2 (e + d(S, T S T^T))
        M <- beta1 M T^T + (1 - beta1) g ((S + e I)^(1/2) + eps I)^-1
        B <- (1 - lr * weight_decay) B - lr M R^-T

    where d, the smaller one of the largest loss of an eigenvalue and the trace's loss, makes up for what S lost in the
    change of basis, so that it never shrinks by it. A moves by the mirror image. The scaling c of the layer W + c B A
    is taken into the factors, half each. The authors' code also clips and skips large gradients; here that is the
    trainer's task.

    The step is invariant under (A, B) -> (S A, B S^-1). Where a factor has not its full rank, R's inverse is the
    pseudo-inverse, and a factor of zeros spans nothing: from PEFT's start B = 0 only B moves at first.

    Args:
        params: As for `RPrecAdamW`.
        lr: Learning rate: the root mean square of a step's entries in the other factor's orthonormal basis.
        betas: Decay of the first and the second moment; also of AdamW groups.
        eps: Floor of the second moment's root; also of AdamW groups.
        weight_decay: Rate at which both factors shrink (times lr); for AdamW groups their decoupled weight decay.
        adamw_lr: Learning rate of AdamW groups that bring none.
    """

    needs_full_rank = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-4,
        adamw_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, adamw_lr=adamw_lr
        )

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """Moments in the other factor's basis, what escaped from them, and this factor's own basis."""
        r = factor.shape[-1]
        return {
            "steps": factor.new_zeros(()),
            "basis": torch.zeros_like(factor),
            "first_moment": torch.zeros_like(factor),
            "second_moment": factor.new_zeros(r, r),
            "escaped": factor.new_zeros(()),
        }

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """See `lora_rite_step`."""
        numbers = {n: group[n] for n in ("lr", "betas", "eps", "weight_decay")}
        return in_weight_units(lora_rite_step, sides, group["scaling"], **numbers)
