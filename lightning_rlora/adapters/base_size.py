"""How large the weights are that adapters adapt: the unit of relative learning rates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.utils.integrations import dequantize_module_weight

from lightning_rlora.adapters.pairs import LoraPair, base_weight, is_quantised

_NOTED = "base_size"
"""Name of the attribute by which an adapted layer knows its size once its weight is sharded."""


@torch.no_grad()
def base_size(pair: LoraPair) -> float:
    """Root mean square of the base weight's singular values, |W|_F / sqrt(min(m, n)), summed in float64.

    One where the weight is all zeros. Of a layer that is sharded the size before that, see `note_base_sizes`.
    """
    noted: float | None = getattr(pair.layer, _NOTED, None)
    if noted is not None:
        return noted
    weight = dequantize_module_weight(pair.layer.get_base_layer()) if is_quantised(pair) else base_weight(pair)
    m, n, _ = pair.shape
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    return norm / min(m, n) ** 0.5 or 1.0


def note_base_sizes(pairs: Iterable[LoraPair]) -> None:
    """Keep the sizes in the layers, whose weights are about to be cut up."""
    for pair in pairs:
        setattr(pair.layer, _NOTED, base_size(pair))
