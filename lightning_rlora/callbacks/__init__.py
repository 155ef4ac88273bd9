"""Lightning callbacks: thin shells around the geometry, the initialisation and the bookkeeping of a run."""

from lightning_rlora.callbacks.adapter_export import AdapterExport
from lightning_rlora.callbacks.adapter_init import AdapterInit
from lightning_rlora.callbacks.adapter_only_checkpoint import AdapterOnlyCheckpoint
from lightning_rlora.callbacks.image_similarity import ImageSimilarity
from lightning_rlora.callbacks.locally_optimal_init import LocallyOptimalInit
from lightning_rlora.callbacks.retraction import Retraction
from lightning_rlora.callbacks.run_cost import RunCost
from lightning_rlora.callbacks.run_record import RunRecord
from lightning_rlora.callbacks.sample_images import SampleImages
from lightning_rlora.callbacks.spectrum_monitor import SpectrumMonitor

__all__ = [
    "AdapterExport",
    "AdapterInit",
    "AdapterOnlyCheckpoint",
    "ImageSimilarity",
    "LocallyOptimalInit",
    "Retraction",
    "RunCost",
    "RunRecord",
    "SampleImages",
    "SpectrumMonitor",
]
