"""Data modules."""

from lightning_rlora.data.captioned_images import CaptionedImageData
from lightning_rlora.data.classification import ClassificationData
from lightning_rlora.data.dreambooth import DreamBoothData
from lightning_rlora.data.reasoning import ReasoningData
from lightning_rlora.data.text import TextData

__all__ = ["CaptionedImageData", "ClassificationData", "DreamBoothData", "ReasoningData", "TextData"]
