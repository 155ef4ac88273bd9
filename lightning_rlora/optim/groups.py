"""Parameter groups: LoRA pairs on the manifold, everything else that trains, and what a step reads of them."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

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
    "curvature_decay": lambda group: group.get("curvature_decay", 0.0),
    "curvature_floor": lambda group: group.get("curvature_floor", 0.0),
    "gradient_weight": lambda group: 1.0 - group["momentum"] if group["algorithm"] == "sgd" else 1.0,
}
"""Numbers of a group that may change from step to step."""

_NOT_NEGATIVE = (lambda value: value >= 0, "must not be negative")
_POSITIVE = (lambda value: value > 0, "must be positive")
_SHARE = (lambda value: 0 <= value < 1, "must be below 1 and not negative")

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "betas": _SHARE,
    "momentum": _SHARE,
    "curvature_beta": _SHARE,
    "curvature_decay": _SHARE,
    "min_singular_value": _POSITIVE,  # points of the manifold have full rank
    "curvature_floor": _POSITIVE,
    "damping": _POSITIVE,
    "max_step_norm": _POSITIVE,
}
"""Which values the options of a group may take, where it has them: a test, and its words."""


class PairInGroup(NamedTuple):
    """A pair of factors, the parameter group it belongs to, and the unit in which that group's rate counts for it."""

    a: Tensor
    b: Tensor
    group: dict[str, Any]
    unit: float = 1.0


def unit_factors(pairs: Sequence[PairInGroup]) -> Tensor:
    """What the numbers of a pair's group are multiplied by for the pair, (pairs, HYPERPARAMETERS), float64.

    A rate counts in the pair's unit. Weight decay shrinks X by rate times decay, which has no unit.
    """
    powers = torch.tensor([{"lr": 1.0, "weight_decay": -1.0}.get(name, 0.0) for name in HYPERPARAMETERS])
    return torch.tensor([[pair.unit] for pair in pairs], dtype=torch.float64) ** powers


def has_units(group: dict[str, Any]) -> bool:
    """Whether a group's rate is in units of the base weights: of orthogonalised steps alone, as others have no size."""
    return bool(group.get("relative")) and group["algorithm"] in ("riemannion", "whitened")


def pairs_in_group(group: dict[str, Any]) -> Iterator[PairInGroup]:
    """The pairs of a group of pairs.

    Raises:
        UserError: If its rate is relative, and nothing is known of the weights that it is relative to.
    """
    params = group["params"]
    units = group.get("units") if has_units(group) else repeat(1.0, len(params) // 2)
    if units is None:
        raise UserError(
            "relative rates need the sizes of the base weights: make the optimizer by for_model(model), call its "
            "measure_base(model), or give relative=False and a rate in units of the weights"
        )
    for a, b, unit in zip(params[::2], params[1::2], units, strict=True):
        yield PairInGroup(a, b, group, unit)


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


def groups_with_pairs(model: nn.Module) -> list[dict[str, Any]]:
    """`parameter_groups` of a model that is there to train LoRA pairs.

    Raises:
        UserError: If it has none: all of it would be left to AdamW without a word.
    """
    groups = parameter_groups(model)
    if all(group.get("algorithm") == "adamw" for group in groups):
        raise UserError("the model has no LoRA pairs to train: adapt it first (peft.get_peft_model), or take AdamW")
    return groups


def pairs_of_new_group(
    group: dict[str, Any], optimizer: Optimizer, algorithms: Collection[str], adamw_lr: float
) -> list[tuple[Tensor, Tensor]]:
    """Complete a group that is about to join an optimizer, and refuse what no step can take.

    Args:
        group: The group; `params` of pairs becomes a list, and an AdamW group without a rate gets one.
        optimizer: The optimizer, with the defaults of its groups.
        algorithms: What it knows, adamw among them.
        adamw_lr: Learning rate of AdamW groups that bring none.

    Returns:
        The group's pairs (A, B); of an AdamW group none.

    Raises:
        UserError: If the algorithm is unknown, an option out of its range, or the parameters are no LoRA pairs.
    """
    name = type(optimizer).__name__
    algorithm = group.get("algorithm", optimizer.defaults["algorithm"])
    if algorithm not in algorithms:
        raise UserError(
            f"unknown algorithm {algorithm!r} of a parameter group of {name}: use one of {', '.join(algorithms)}"
        )
    if algorithm == "adamw":
        group.setdefault("lr", adamw_lr)
    check_options(optimizer.defaults | group, name)
    if algorithm == "adamw":
        return []
    group["params"] = params = list(group["params"])
    if len(params) % 2:
        raise UserError(
            f"a group of LoRA pairs holds {len(params)} parameters, an odd number: give them as A, B, A, B, ..., or "
            "the group algorithm='adamw'"
        )
    pairs = list(zip(params[::2], params[1::2], strict=True))
    for a, b in pairs:
        check_pair(a, b, group.get("scaling", 1.0), name)
    return pairs


def check_options(options: dict[str, Any], optimizer: str) -> None:
    """Refuse options of a group that are out of their range, with a UserError; see `RANGES`."""
    for name, (is_allowed, rule) in RANGES.items():
        value = options.get(name)
        if value is not None and not all(map(is_allowed, value if isinstance(value, tuple | list) else (value,))):
            raise UserError(f"{name} = {value} of {optimizer} {rule}")
    if len(options["betas"]) != 2:
        raise UserError(f"betas = {options['betas']} of {optimizer} must be two numbers")


def check_pair(a: Tensor, b: Tensor, scaling: float, optimizer: str) -> None:
    """Refuse factors that are no LoRA pair, or too coarse, with a UserError."""
    if a.ndim < 2 or b.ndim < 2 or b[0].numel() != len(a):
        raise UserError(
            f"parameters of shapes {tuple(a.shape)} and {tuple(b.shape)} are no LoRA pair: give the factors as A, B, "
            "A, B, ... with A (r, n) and B (m, r), or the group algorithm='adamw'"
        )
    for factor in (a, b):
        if isinstance(factor, DTensor):
            raise UserError(
                f"{optimizer} takes whole factors, and these are sharded (FSDP2's DTensors): use strategy ddp, or "
                "FSDP2Strategy, which shards the base only"
            )
        if factor.dtype not in RANK_TOLERANCE:
            raise UserError(
                f"LoRA factors are {factor.dtype}, too coarse for the steps of {optimizer}: keep them in float32, with "
                "precision bf16-mixed or 16-mixed instead of bf16-true or 16-true"
            )
    if not scaling > 0:
        raise UserError(f"the scaling {scaling} of a LoRA group must be positive")


def check_full_rank(pairs: list[tuple[Tensor, Tensor]], optimizer: str) -> None:
    """Refuse pairs of a rank above min(m, n), whose factors cannot have r independent rows and columns."""
    for a, b in pairs:
        if len(a) > min(len(b), a[0].numel()):
            raise UserError(
                f"rank {len(a)} exceeds min(m, n) = {min(len(b), a[0].numel())} of a LoRA pair, and {optimizer} needs "
                "factors of full rank: lower the rank"
            )
