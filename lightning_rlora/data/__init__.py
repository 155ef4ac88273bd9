"""Data modules."""

from lightning_rlora.data.text import TextData

__all__ = ["TextData"]
