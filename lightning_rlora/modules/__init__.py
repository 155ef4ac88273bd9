"""LightningModules that fine-tune pretrained models with adapters on the manifold."""

from lightning_rlora.modules.causal_lm import CausalLM

__all__ = ["CausalLM"]
