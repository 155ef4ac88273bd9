"""Parameter groups: LoRA pairs on the manifold, everything else that trains, and what a step reads of them."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_rlora.adapters import scan
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import RANK_TOLERANCE

HYPERPARAMETERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "lr": lambda group: group["lr"],
    "momentum": lambda group: group["momentum"],
    "weight_decay": lambda group: group["weight_decay"],
    "scaling": lambda group: group["scaling"],
    "min_singular_value": lambda group: group["min_singular_value"],
    "eps": lambda group: group["eps"],
    "beta": lambda group: group["betas"][1],
    "gradient_weight": lambda group: 1.0 - group["momentum"] if group["algorithm"] == "sgd" else 1.0,
}
"""Numbers of a group that may change from step to step."""


class PairInGroup(NamedTuple):
    """A pair of factors, and the parameter group it belongs to."""

    a: Tensor
    b: Tensor
    group: dict[str, Any]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a model as groups for `Riemannion`, `RiemannianSGD` or any torch optimizer.

    Pairs come first, a group for each scaling, with `params` = A, B, A, B, ... and their common `scaling`; everything
    else that trains (heads, norms, biases, DoRA magnitudes, LoRA factors that are no point of the manifold) forms a
    last group with `algorithm: adamw`. Other optimizers ignore the extra keys.

    Raises:
        UserError: If nothing in the model is trainable.
    """
    found = scan(model)
    for reason in sorted(set(found.left_out.values())):
        names = [name for name, why in found.left_out.items() if why == reason]
        warnings.warn(f"{len(names)} LoRA factors are left to AdamW ({names[0]}, ...): {reason}", stacklevel=2)
    groups: list[dict[str, Any]] = []
    for scaling in dict.fromkeys(pair.scaling for pair in found.pairs):
        pairs = [pair for pair in found.pairs if pair.scaling == scaling]
        groups.append({"params": [factor for pair in pairs for factor in (pair.a, pair.b)], "scaling": scaling})
    if found.others:
        groups.append({"params": list(found.others.values()), "algorithm": "adamw"})
    if not groups:
        raise UserError("the model has nothing to train: adapt it with PEFT first, and leave the adapter unfrozen")
    return groups


def check_options(options: dict[str, Any], optimizer: str) -> None:
    """Refuse options of a group that no step can take, with a UserError."""
    for name in ("lr", "weight_decay", "momentum"):
        if not options[name] >= 0:
            raise UserError(f"{name} = {options[name]} of {optimizer} must not be negative")
    if not options["min_singular_value"] > 0:
        value = options["min_singular_value"]
        raise UserError(f"min_singular_value = {value} of {optimizer} must be positive: points have full rank")
    if not 0 <= options.get("curvature_decay", 0) < 1:
        raise UserError(f"curvature_decay = {options['curvature_decay']} of {optimizer} must be from 0 to below 1")
    if not options.get("curvature_floor", 1) > 0:
        raise UserError(f"curvature_floor = {options['curvature_floor']} of {optimizer} must be positive")
    if options["momentum"] >= 1:
        raise UserError(f"momentum = {options['momentum']} of {optimizer} must be below 1")


def check_pair(a: Tensor, b: Tensor, scaling: float) -> None:
    """Refuse factors that are no LoRA pair on the manifold, with a UserError."""
    if a.ndim < 2 or b.ndim < 2 or b[0].numel() != len(a):
        raise UserError(
            f"parameters of shapes {tuple(a.shape)} and {tuple(b.shape)} are no LoRA pair: give the factors as A, B, "
            "A, B, ... with A (r, n) and B (m, r), or the group algorithm='adamw'"
        )
    if len(a) > min(len(b), a[0].numel()):
        raise UserError(f"rank {len(a)} exceeds min(m, n) = {min(len(b), a[0].numel())} of a LoRA pair: lower the rank")
    for factor in (a, b):
        if factor.dtype not in RANK_TOLERANCE:
            raise UserError(
                f"LoRA factors are {factor.dtype}, too coarse for points of the manifold: keep them in float32, with "
                "precision bf16-mixed or 16-mixed instead of bf16-true or 16-true"
            )
    if not scaling > 0:
        raise UserError(f"the scaling {scaling} of a LoRA group must be positive")
