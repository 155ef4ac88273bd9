"""Loading text-to-image pipelines part by part, with one clear line where that fails."""

from pathlib import Path
from typing import Any

import torch

from lightning_rlora.assets import resolve
from lightning_rlora.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")
"""What a UNet may have been trained to predict."""


def load_pipeline(name: str, *, dtype: str) -> Any:
    """A Stable Diffusion pipeline of the 1.5, 2 or XL layout, in evaluation mode and without a safety checker.

    Weights are read from safetensors files only, and no code of the repository runs.

    Args:
        name: Hub id, folder in diffusers' layout, or `embedded:` name.
        dtype: Name of the weights' torch dtype.

    Returns:
        A StableDiffusionPipeline or StableDiffusionXLPipeline.

    Raises:
        UserError: If there is no such pipeline, it is of another kind, or a part is missing or broken.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UserError("text-to-image models need diffusers: pip install 'lightning-rlora[diffusion]'") from error

    base = resolve(name)
    index = _index(name, base)
    kinds: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "tokenizer": transformers.CLIPTokenizer,
        "scheduler": getattr(diffusers, str(index["scheduler"][1]), None),
    }
    if kinds["scheduler"] is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {index['scheduler'][1]}, the scheduler of {name!r}")
    double = "text_encoder_2" in index
    if double:
        kinds["text_encoder_2"] = transformers.CLIPTextModelWithProjection
        kinds["tokenizer_2"] = transformers.CLIPTokenizer
    parts = {part: _load(name, base, part, kind, getattr(torch, dtype)) for part, kind in kinds.items()}
    _check(name, parts)
    _check_text(name, parts)
    if double:
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _index(name: str, base: str) -> dict[str, Any]:
    """What model_index.json says of a pipeline's parts."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(base)
    except (OSError, ValueError) as error:
        if not Path(base).is_dir():
            raise UserError(
                f"cannot load the pipeline {name!r}: no such folder, and not to be had from the hub ({_short(error)})"
            ) from error
        raise UserError(
            f"{name!r} is no diffusers pipeline: a folder with a model_index.json, unet/, vae/, text_encoder/, "
            f"tokenizer/ and scheduler/ is wanted ({_short(error)})"
        ) from error
    if not isinstance(index, dict):
        raise UserError(f"{name!r} is no diffusers pipeline: its model_index.json is no table of parts")
    held = sorted(part for part, kind in index.items() if isinstance(kind, list) and kind[0])
    if index.get("unet", [None, None])[1] != "UNet2DConditionModel":
        raise UserError(
            f"the pipeline {name!r} has no UNet2DConditionModel to adapt (it has {', '.join(held)}): use one of the "
            "layout of Stable Diffusion 1.5, 2 or XL"
        )
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        if part not in held:
            raise UserError(f"the pipeline {name!r} has no {part}: it has {', '.join(held)}")
    return index


def _load(name: str, base: str, part: str, kind: Any, dtype: torch.dtype) -> Any:
    """One part of a pipeline, whole: nothing of it is left at random."""
    if Path(base).is_dir() and not (Path(base) / part).is_dir():  # a tokenizer would be made up
        raise UserError(f"the pipeline {name!r} lacks its {part}: there is no folder {Path(base) / part}")
    trained = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "dtype": dtype} if trained else {}
    try:
        loaded = kind.from_pretrained(base, subfolder=part, **options)
    except Exception as error:
        if isinstance(error, OSError | ValueError | RuntimeError) or type(error).__name__ == "SafetensorError":
            hint = " (only weights in safetensors are read)" if "no file named" in str(error) else ""
            raise UserError(f"cannot load the {part} of the pipeline {name!r}: {_short(error)}{hint}") from error
        raise
    if not trained:
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"the {part} of the pipeline {name!r} lacks {len(missing)} weights, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def _check(name: str, parts: dict[str, Any]) -> None:
    """Refuse a UNet that takes more than noisy latents and text, or predicts something else than noise or velocity."""
    takes, gives = parts["unet"].config.in_channels, parts["vae"].config.latent_channels
    if takes != gives:
        raise UserError(
            f"the UNet of {name!r} takes {takes} channels and its VAE gives {gives}: an inpainting or editing model, "
            "and not one of text-to-image"
        )
    prediction = parts["scheduler"].config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{name!r} predicts {prediction!r}: only {' and '.join(PREDICTIONS)} can be trained")


def _check_text(name: str, parts: dict[str, Any]) -> None:
    """Refuse tokenizers, text encoders and a UNet that were not made for each other."""
    encoders = {part: encoder.config for part, encoder in parts.items() if part.startswith("text_encoder")}
    for part, encoder in encoders.items():
        tokenizer = parts[part.replace("text_encoder", "tokenizer")]
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what is made up where files are absent
            raise UserError(f"the tokenizer beside the {part} of {name!r} knows no words: a file of it is not there")
        if len(tokenizer) > encoder.vocab_size or tokenizer.model_max_length > encoder.max_position_embeddings:
            raise UserError(
                f"the tokenizer beside the {part} of {name!r} gives up to {tokenizer.model_max_length} of "
                f"{len(tokenizer)} tokens, and the text encoder takes {encoder.max_position_embeddings} of "
                f"{encoder.vocab_size}: look at tokenizer_config.json"
            )
    takes, gives = parts["unet"].config.cross_attention_dim, sum(encoder.hidden_size for encoder in encoders.values())
    wanted = 2 if parts["unet"].config.addition_embed_type == "text_time" else 1
    if {gives} != ({takes} if isinstance(takes, int) else set(takes)) or wanted != len(encoders):
        raise UserError(
            f"the UNet of {name!r} takes {takes} numbers for each token from {wanted} text encoders, and the "
            f"pipeline's {len(encoders)} give {gives}: they belong to different models"
        )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " ..."
