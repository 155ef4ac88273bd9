"""What a UNet is told beside the noisy latents: the prompt, and for SDXL the picture's size and crop."""

from typing import Any

import torch
from torch import Tensor

from lightning_rlora.errors import UserError

KEPT = 16
"""Lists of prompts whose encodings are kept."""


class Conditions:
    """The UNet's keyword arguments for a batch, by the pipeline's own encoding of prompts.

    Text encoders are frozen, and batches of a few subjects say the same again and again: what the last lists of prompts
    were encoded to is kept. A list is encoded as a whole, so that a resumed run, which begins with nothing, finds the
    very same numbers.

    Args:
        pipeline: Of diffusers, with one text encoder or, for SDXL, two.
        truncate: Cut prompts that are too long, where they would be refused.
    """

    def __init__(self, pipeline: Any, *, truncate: bool) -> None:
        self._pipeline = pipeline
        self._truncate = truncate
        self._kept: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a batch.

        Args:
            batch: `prompt`, a list of B strings, and `pixel_values` (B, 3, H, W); for SDXL also `original_size` and
                `crop_top_left` (B, 2), int64; without them the picture counts as whole.

        Returns:
            `encoder_hidden_states` (B, tokens, width), and for SDXL `added_cond_kwargs` with the pooled `text_embeds`
            and the six `time_ids`: original height and width, top and left of the crop, height and width.

        Raises:
            UserError: If a prompt is longer than the text encoder takes.
        """
        pixels = batch["pixel_values"]
        hidden, *pooled = self._encoded(batch["prompt"], pixels.device)
        if not pooled:
            return {"encoder_hidden_states": hidden}
        time_ids = _time_ids(batch, pixels).to(hidden.dtype)
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": time_ids}}

    def _encoded(self, prompts: list[str], device: torch.device) -> tuple[Tensor, ...]:
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (*prompts, device, precision, self._pipeline.text_encoder.dtype)
        if key not in self._kept:
            if len(self._kept) == KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._encode(prompts, device)
        return self._kept[key]

    @torch.inference_mode(False)  # what an evaluation meets first is kept for the training, too
    @torch.no_grad()
    def _encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, ...]:
        """Hidden states (B, tokens, width), and for SDXL the pooled ones (B, width)."""
        if not self._truncate:
            check_lengths(self._pipeline, prompts)
        options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = self._pipeline.encode_prompt(prompts, **options)
        return (encoded[0], encoded[2]) if hasattr(self._pipeline, "text_encoder_2") else (encoded[0],)


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
