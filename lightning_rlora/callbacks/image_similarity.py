"""How much a subject's sampled pictures look like it, and like what the prompts say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F

from lightning_rlora.errors import UserError
from lightning_rlora.image_files import decode, opened

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageSimilarity(Callback):
    """At each validation, samples pictures of a subject and compares them with photos of it and with the prompts.

    Two numbers of the DreamBooth paper (arXiv 2208.12242) are logged. `val/image_similarity` is the mean cosine between
    DINO's class tokens of every sampled picture and every photo; `val/text_similarity` is the mean cosine between
    CLIP's embeddings of each picture and of its description. Sampling leaves the random state of the training as it is.

    Args:
        prompts: What to draw; by default what DreamBoothData says of its photos.
        references: Folder of photos of the subject; by default those of DreamBoothData.
        descriptions: What each prompt's pictures should show in words that CLIP knows, without the subject's token; by
            default the prompts.
        seeds: One picture of each prompt for each.
        dino: Hub id or folder of a vision transformer whose class token describes a picture.
        clip: Hub id or folder of a CLIP model; None to leave the text similarity out.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of classifier-free guidance.

    Raises:
        UserError: If there is no prompt, seed or photo.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        references: str | None = None,
        descriptions: list[str] | None = None,
        seeds: Sequence[int] = (0, 1, 2, 3),
        dino: str = "facebook/dino-vits16",
        clip: str | None = "openai/clip-vit-large-patch14",
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
    ) -> None:
        if prompts == [] or not seeds:
            raise UserError("ImageSimilarity needs at least one prompt and one seed")
        self.prompts = prompts
        self.descriptions = descriptions
        self.seeds = list(seeds)
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self._references = None if references is None else opened(references)
        self._photos: list[Image] = []
        self._drawn: list[str] = []
        self._names = dino, clip
        self._dino: tuple[Any, Any] | None = None  # each with its processor
        self._clip: tuple[Any, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load DINO and CLIP, before anything is trained.

        Raises:
            UserError: If one of them cannot be loaded, a photo cannot be read, the module cannot sample, there are no
                photos or prompts to compare with, or the descriptions are not as many as the prompts.
        """
        if not callable(getattr(pl_module, "sample", None)):
            raise UserError(
                f"ImageSimilarity needs a module with a method sample(prompts, seeds), such as TextToImage, and not "
                f"{type(pl_module).__name__}"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if (self.prompts is None or self._references is None) and not callable(getattr(data, "photos", None)):
            raise UserError("ImageSimilarity needs prompts and references: only DreamBoothData tells of a subject")
        self._drawn = data.prompts if self.prompts is None else self.prompts
        if self.descriptions is not None and len(self.descriptions) != len(self._drawn):
            raise UserError(f"ImageSimilarity has {len(self._drawn)} prompts and {len(self.descriptions)} descriptions")
        if self._references is None:
            self._photos = data.photos()
        else:
            self._photos = [decode(name, opener) for name, opener in self._references]
        if self._dino is None:
            from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

            dino, clip = self._names
            with isolate_rng():
                self._clip = _load(clip, CLIPModel, CLIPProcessor) if clip is not None else None
                self._dino = _load(dino, AutoModel, AutoImageProcessor)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample, compare and log; in every process the same, so that all know the numbers."""
        assert self._dino is not None
        pictures: list[Image] = []
        with isolate_rng(), trainer.precision_plugin.forward_context():
            for prompt in self._drawn:
                pictures += pl_module.sample(
                    [prompt] * len(self.seeds),
                    self.seeds,
                    num_inference_steps=self.num_inference_steps,
                    guidance_scale=self.guidance_scale,
                )
        with torch.autocast(pl_module.device.type, enabled=False):
            with _lent(self._dino, pl_module.device) as dino:
                alike = class_tokens(*dino, pictures) @ class_tokens(*dino, self._photos).mT
            pl_module.log("val/image_similarity", alike.mean())
            if self._clip is not None:
                texts = [text for text in self.descriptions or self._drawn for _ in self.seeds]
                with _lent(self._clip, pl_module.device) as clip:
                    pl_module.log("val/text_similarity", text_similarities(*clip, pictures, texts).mean())


def class_tokens(model: Any, processor: Any, pictures: list[Image]) -> Tensor:
    """A vision transformer's class tokens after its last layer, of length 1, (pictures, width)."""
    pixels = processor(images=pictures, return_tensors="pt").pixel_values.to(model.device)
    return F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)


def text_similarities(model: Any, processor: Any, pictures: list[Image], texts: list[str]) -> Tensor:
    """The cosine between CLIP's embeddings of each picture and of its text, (pictures,)."""
    inputs = processor(images=pictures, text=texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    output = model(**inputs)
    return F.cosine_similarity(output.image_embeds, output.text_embeds)


@contextmanager
def _lent(loaded: tuple[Any, Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """A model on the device for a while, with its processor; the training needs the room afterwards."""
    try:
        loaded[0].to(device)
        yield loaded
    finally:
        loaded[0].to("cpu")


def _load(name: str, model: Any, processor: Any) -> tuple[Any, Any]:
    """A model in float32 and evaluation mode, and its processor."""
    try:
        return model.from_pretrained(name).eval(), processor.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"ImageSimilarity cannot load {name!r}: {reason[:200]}") from error
