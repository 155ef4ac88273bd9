"""Low-rank adapters as points of the fixed-rank manifold, for PyTorch Lightning.

The names below are loaded when they are first used, since Lightning takes seconds to import.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rlora.adapters import export_adapter, find_pairs, merge_adapter, shard_base, track_offsets
    from lightning_rlora.callbacks import (
        AdapterInit,
        AdapterOnlyCheckpoint,
        ImageSimilarity,
        LocallyOptimalInit,
        Retraction,
        SampleImages,
        SpectrumMonitor,
    )
    from lightning_rlora.data import CaptionedImageData, ClassificationData, DreamBoothData, ReasoningData, TextData
    from lightning_rlora.errors import UserError
    from lightning_rlora.init import locally_optimal_init
    from lightning_rlora.modules import CausalLM, SequenceClassification, TextToImage
    from lightning_rlora.optim import RiemannianSGD, Riemannion, WhitenedRiemannion, lora_plus_groups
    from lightning_rlora.strategies import FSDP1Strategy, FSDP2Strategy

_HOMES = {
    "adapters": ("export_adapter", "find_pairs", "merge_adapter", "shard_base", "track_offsets"),
    "callbacks": (
        "AdapterInit",
        "AdapterOnlyCheckpoint",
        "ImageSimilarity",
        "LocallyOptimalInit",
        "Retraction",
        "SampleImages",
        "SpectrumMonitor",
    ),
    "data": ("CaptionedImageData", "ClassificationData", "DreamBoothData", "ReasoningData", "TextData"),
    "errors": ("UserError",),
    "init": ("locally_optimal_init",),
    "modules": ("CausalLM", "SequenceClassification", "TextToImage"),
    "optim": ("RiemannianSGD", "Riemannion", "WhitenedRiemannion", "lora_plus_groups"),
    "strategies": ("FSDP1Strategy", "FSDP2Strategy"),
}

__version__ = version("lightning-rlora")
__all__ = [
    "AdapterInit",
    "AdapterOnlyCheckpoint",
    "CaptionedImageData",
    "CausalLM",
    "ClassificationData",
    "DreamBoothData",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "ImageSimilarity",
    "LocallyOptimalInit",
    "ReasoningData",
    "Retraction",
    "RiemannianSGD",
    "Riemannion",
    "SampleImages",
    "SequenceClassification",
    "SpectrumMonitor",
    "TextData",
    "TextToImage",
    "UserError",
    "WhitenedRiemannion",
    "export_adapter",
    "find_pairs",
    "locally_optimal_init",
    "lora_plus_groups",
    "merge_adapter",
    "shard_base",
    "track_offsets",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lightning_rlora.{home}"), name)
    raise AttributeError(f"module 'lightning_rlora' has no attribute {name!r}")
