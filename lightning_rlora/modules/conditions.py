"""What a UNet is told beside the noisy latents: the prompt, and for SDXL the picture's size and crop."""

from typing import Any

import torch
from torch import Tensor

from lightning_rlora.errors import UserError


@torch.no_grad()
def conditions(pipeline: Any, batch: dict[str, Any], *, truncate: bool) -> dict[str, Any]:
    """The UNet's keyword arguments for a batch, by the pipeline's own encoding of prompts.

    Args:
        pipeline: Of diffusers, with one text encoder or, for SDXL, two.
        batch: `prompt`, a list of B strings, and `pixel_values` (B, 3, H, W); for SDXL also `original_size` and
            `crop_top_left` (B, 2), int64; without them the picture counts as whole.
        truncate: Cut prompts that are too long, where they would be refused.

    Returns:
        `encoder_hidden_states` (B, tokens, width), and for SDXL `added_cond_kwargs` with the pooled `text_embeds` and
        the six `time_ids`: original height and width, top and left of the crop, height and width.

    Raises:
        UserError: If a prompt is longer than the text encoder takes.
    """
    pixels, prompts = batch["pixel_values"], batch["prompt"]
    if not truncate:
        check_lengths(pipeline, prompts)
    options = {"device": pixels.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if not hasattr(pipeline, "text_encoder_2"):
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, **options)[0]}
    hidden, _, pooled, _ = pipeline.encode_prompt(prompts, **options)
    time_ids = _time_ids(batch, pixels).to(pooled.dtype)
    return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def check_lengths(pipeline: Any, prompts: list[str]) -> None:
    """Refuse prompts of which the text encoder would not see the end.

    Raises:
        UserError: If there is one.
    """
    tokenizer = pipeline.tokenizer
    limit = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            shown = prompt if len(prompt) <= 60 else prompt[:60] + " ..."
            raise UserError(
                f"the prompt {shown!r} has {len(ids)} tokens with its start and end, and the text encoder takes {limit}"
                ": shorten it, or set truncate_prompts to have such prompts cut"
            )


def _time_ids(batch: dict[str, Any], pixels: Tensor) -> Tensor:
    size = torch.tensor(pixels.shape[-2:], device=pixels.device).expand(len(pixels), 2)
    original = batch.get("original_size", size)
    corner = batch.get("crop_top_left", torch.zeros_like(size))
    return torch.cat([original, corner, size], 1)
