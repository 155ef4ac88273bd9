"""Lightning callbacks: thin shells around the geometry, the initialisation and the bookkeeping of a run."""

from lightning_rlora.callbacks.adapter_export import AdapterExport
from lightning_rlora.callbacks.adapter_only_checkpoint import AdapterOnlyCheckpoint
from lightning_rlora.callbacks.locally_optimal_init import LocallyOptimalInit
from lightning_rlora.callbacks.retraction import Retraction

__all__ = ["AdapterExport", "AdapterOnlyCheckpoint", "LocallyOptimalInit", "Retraction"]
