"""How large the weights are that adapters adapt: the unit of relative learning rates."""

import torch
from peft.utils.integrations import dequantize_module_weight

from lightning_rlora.adapters.pairs import LoraPair, base_weight, is_quantised
from lightning_rlora.adapters.starts import whole_base


@torch.no_grad()
def base_size(pair: LoraPair) -> float:
    """Root mean square of the base weight's singular values, |W|_F / sqrt(min(m, n)); one where W is zero.

    Summed in float64. Of a sharded weight all processes must ask together.
    """
    m, n, _ = pair.shape
    with whole_base(pair):  # PEFT leaves another weight behind when it undoes 8 bits on a CPU
        layer = pair.layer.get_base_layer()
        weight = dequantize_module_weight(layer) if is_quantised(pair) else base_weight(pair)
        norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    return norm / min(m, n) ** 0.5 or 1.0
