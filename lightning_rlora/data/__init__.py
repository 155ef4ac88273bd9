"""Data modules."""

from lightning_rlora.data.reasoning import ReasoningData
from lightning_rlora.data.text import TextData

__all__ = ["ReasoningData", "TextData"]
