"""Under autocast, inputs of LoRA layers as they are: PEFT would cast them up, and autocast down again."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


def leave_casts_to_autocast(model: PeftModel) -> None:
    """Spare LoRA layers, whenever the base model is called under autocast, PEFT's cast of the input to float32.

    The factors are float32, so behind a half-precision base PEFT casts a layer's input to float32, and autocast casts
    it back for the product. Numbers are the same to the bit without, and a pass moves much less memory. PEFT itself
    leaves the cast out under autocast where the base is quantised. DoRA is let alone: its norms are taken in the dtype
    that the input has.
    """
    model.get_base_model().register_forward_pre_hook(_choose)


def _choose(base: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Stays as chosen until the next call, so that checkpointed activations are recomputed as they were computed."""
    autocast = torch.is_autocast_enabled(next(base.parameters()).device.type)
    if autocast == getattr(base, "_casts_left_to_autocast", False):
        return
    base._casts_left_to_autocast = autocast  # type: ignore[assignment]
    for layer in base.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = not autocast
