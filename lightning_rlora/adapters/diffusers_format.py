"""The adapter of a diffusers UNet in the two formats that image tools read: diffusers' own and kohya's.

Both hold factors whose product with the written alpha / r is the change of the base. Many readers of diffusers' format
know no alpha, so there the scaling goes into B and alpha = r; kohya's has an alpha for each layer.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights(folder)` looks for."""

KOHYA_WEIGHTS = "kohya_lora.safetensors"
"""Keys such as lora_unet_mid_block_attentions_0_..._to_q.lora_down.weight, with .alpha entries."""

_PREFIX = "unet"
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")


def is_diffusers_unet(model: nn.Module) -> bool:
    """Whether a model, adapted or not, is a UNet of diffusers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return any(
        c.__name__ == "UNet2DConditionModel" and c.__module__.startswith("diffusers.") for c in type(base).__mro__
    )


def write_diffusers_files(
    folder: Path, config: Any, state: dict[str, Tensor], ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    """Write the adapter's files for image tools, as far as their formats can hold it.

    Neither holds anything but LoRA's factors, biases and DoRA's magnitudes; kohya's, as diffusers reads it, only
    factors. A warning says if nothing is written.

    Args:
        folder: Where to.
        config: PEFT's configuration of the adapter.
        state: The adapter's tensors by PEFT's keys, without the prefix of a PeftModel.
        ranks: Rank of each layer, by its path in the UNet.
        alphas: Alpha of each layer: its scaling is alpha / rank.
    """
    others = [key for key in state if not isinstance(config, LoraConfig) or not key.endswith(_FACTORS)]
    if others:
        warnings.warn(
            f"no {DIFFUSERS_WEIGHTS} is written: image tools' formats hold LoRA's factors only, and not {others[0]}; "
            "load the folder with PEFT, or merge it into a pipeline (rlora merge)",
            stacklevel=2,
        )
        return
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    scaled = _scaled(state, {name: alphas[name] / ranks[name] for name in ranks})
    common = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    metadata = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }
    # PEFT's keys, and not those of convert_state_dict_to_diffusers: that renames attention layers only, and pipelines
    # do not understand both ways in one file
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers={**scaled},
        unet_lora_adapter_metadata=metadata,
        weight_name=DIFFUSERS_WEIGHTS,
    )
    if all(key.endswith(_FACTORS[:2]) for key in state):
        save_file(_kohya(state, ranks, alphas), folder / KOHYA_WEIGHTS, metadata={"format": "pt"})


def _kohya(state: dict[str, Tensor], ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Tensor]:
    """Tensors by kohya's keys. One alpha for all layers, since diffusers mixes up several: B makes up for the rest."""
    from diffusers.utils import convert_state_dict_to_kohya

    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors = convert_state_dict_to_kohya(
        {f"{_PREFIX}.{key}": value for key, value in _scaled(state, {n: a / alpha for n, a in alphas.items()}).items()}
    )
    return {key: torch.tensor(float(alpha)) if key.endswith(".alpha") else value for key, value in tensors.items()}


def _scaled(state: dict[str, Tensor], factors: dict[str, float]) -> dict[str, Tensor]:
    """The tensors with each layer's B, and its bias, times a factor; contiguous copies."""

    def scaled(key: str, value: Tensor) -> Tensor:
        name, b, _ = key.partition(".lora_B.")
        return (value * factors[name] if b and factors[name] != 1 else value.clone()).contiguous()

    return {key: scaled(key, value) for key, value in state.items()}
