"""Initialisations of adapters from loss gradients."""

from lightning_rlora.init.locally_optimal import LayerStart, locally_optimal_init
from lightning_rlora.init.lora_ga import LoRAGA

__all__ = ["LayerStart", "LoRAGA", "locally_optimal_init"]
