"""Initialisations of adapters from loss gradients."""

from lightning_rlora.init.locally_optimal import LayerStart, locally_optimal_init

__all__ = ["LayerStart", "locally_optimal_init"]
