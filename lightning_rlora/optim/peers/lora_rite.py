"""LoRA-RITE: an adaptive method whose second moment lives in the other factor's orthonormal basis."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry.batched_eigh import eigh
from lightning_rlora.geometry.gram import gram
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer, Side, in_weight_units
from lightning_rlora.optim.peers.roots import pseudo_inverse_root


def lora_rite_step(
    b: Side, a: Side, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[Side, Side]:
    """One step of `LoRARITE` on a batch of pairs."""
    root_b, root_a = (pseudo_inverse_root(gram(side.value)) for side in (b, a))
    basis_b, basis_a = b.value @ root_b, a.value @ root_a

    def moved(side: Side, basis: Tensor, other_root: Tensor, other_basis: Tensor, other: Side) -> Side:
        step = side.state["steps"] + 1
        keep1, keep2 = (_corrected(beta, step) for beta in betas)
        turn = other_basis.mT @ other.state["basis"]
        gradient = side.grad @ other_root  # "unmagnified": in the other factor's orthonormal basis
        carried = turn @ side.state["second_moment"] @ turn.mT
        lost = _escaped(side.state["second_moment"], carried)
        second = torch.lerp(gram(gradient) / gradient.shape[1], carried, keep2[:, None, None])
        escaped = keep2 * (side.state["escaped"] + lost)
        values, vectors = eigh(second)
        inverse = 1 / ((values.clamp_min(0) + escaped.unsqueeze(-1)).sqrt() + eps)
        scaled = gradient @ (vectors * inverse.unsqueeze(-2)) @ vectors.mT
        first = torch.lerp(scaled, side.state["first_moment"] @ turn.mT, keep1[:, None, None])
        value = (1 - lr * weight_decay) * side.value - lr * first @ other_root
        state = {"steps": step, "basis": basis, "first_moment": first, "second_moment": second, "escaped": escaped}
        return side._replace(value=value, state=state)

    return moved(b, basis_b, root_a, basis_a, a), moved(a, basis_a, root_b, basis_b, b)


def _corrected(beta: float, step: Tensor) -> Tensor:
    """The share kept at a step such that a mean that starts at zero is one of what it has seen."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _escaped(old: Tensor, new: Tensor) -> Tensor:
    """What a second moment lost on its way into the new basis: at most its eigenvalues' loss, or its trace's."""
    eigenvalues = (eigh(old)[0] - eigh(new)[0]).amax(-1)
    trace = (old - new).diagonal(dim1=1, dim2=2).sum(-1)
    return torch.minimum(eigenvalues, trace).clamp_min(0)


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

    def update(self, b: Side, a: Side, group: dict[str, Any]) -> tuple[Side, Side]:
        """See `lora_rite_step`."""
        numbers = {n: group[n] for n in ("lr", "betas", "eps", "weight_decay")}
        return in_weight_units(lora_rite_step, b, a, group["scaling"], **numbers)
