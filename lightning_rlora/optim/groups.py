"""Parameter groups: LoRA pairs that move on the manifold, and everything else that trains."""

import warnings
from typing import Any

from torch import nn

from lightning_rlora.adapters import scan
from lightning_rlora.errors import UserError


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
