"""AdamW for the trainable parameters that are no adapter pair, inside the same optimizer object."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_step(
    group: dict[str, Any],
    state: dict[Tensor, dict[str, Any]],
    gradient_scale: Tensor | float,
    found_nonfinite: Tensor | None = None,
) -> None:
    """One step of torch's AdamW on a parameter group.

    Args:
        group: With `params`, `lr`, `betas`, `eps` and `weight_decay`.
        state: The optimizer's state: `step`, `exp_avg` and `exp_avg_sq` of each parameter, as torch.optim.AdamW keeps
            them.
        gradient_scale: Factor on every gradient (clipping).
        found_nonfinite: A float32 scalar on the device of the parameters, which must be CUDA: nothing is done where it
            is 1. The host is not waited for.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    fused = found_nonfinite is not None
    for p in params:
        if not state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32)
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
        # the fused step counts on the device, the other on the host
        state[p]["step"] = state[p]["step"].to(p.device if fused else "cpu")
    gradients = [p.grad for p in params]
    if isinstance(gradient_scale, Tensor) or gradient_scale != 1.0:
        gradients = list(torch._foreach_mul(gradients, gradient_scale))
    beta1, beta2 = group["betas"]
    adamw(
        params,
        gradients,
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        foreach=not fused,
        fused=fused,
        found_inf=found_nonfinite,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
