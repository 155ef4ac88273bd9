"""Which adapters the step on an NVIDIA GPU can take; asked without Triton, which may not be there."""

import importlib.util

import torch
from torch import Tensor, nn


def can_be_graphed(factors: list[Tensor]) -> bool:
    """Whether the fast step takes these factors: plain float32 tensors on one NVIDIA GPU of 2020 or later.

    Ranks above 128 would not fit the kernels.
    """
    device = factors[0].device if factors else torch.device("cpu")
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    return all(
        type(factor) in (Tensor, nn.Parameter)
        and factor.device == device
        and factor.dtype == torch.float32
        and factor.is_contiguous()
        and min(len(factor), factor[0].numel()) <= 128
        for factor in factors
    )
