"""Under autocast, inputs of LoRA layers as they are: PEFT would cast them up, and autocast down again."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Spare a model's LoRA layers, wherever they are called under autocast, PEFT's cast of the input to float32.

    The factors are float32, so behind a half-precision base PEFT casts a layer's input to float32, and autocast casts
    it back for the product. Numbers are the same to the bit without, and a pass moves much less memory. PEFT itself
    leaves the cast out under autocast where bitsandbytes has quantised the base. Let alone are layers with dropout,
    whose masks and rounding follow the dtype, and DoRA's and their like, which take norms in it.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_pre_hook(_choose)


def _choose(layer: Any, inputs: tuple[Any, ...]) -> None:
    plain = not layer.lora_variant and all(isinstance(x, nn.Identity) for x in layer.lora_dropout.values())
    layer.cast_input_dtype_enabled = not (plain and torch.is_autocast_enabled(inputs[0].device.type))
