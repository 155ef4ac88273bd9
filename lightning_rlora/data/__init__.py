"""Data modules."""

from lightning_rlora.data.classification import ClassificationData
from lightning_rlora.data.reasoning import ReasoningData
from lightning_rlora.data.text import TextData

__all__ = ["ClassificationData", "ReasoningData", "TextData"]
