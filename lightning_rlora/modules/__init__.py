"""LightningModules that fine-tune pretrained models with adapters on the manifold."""

from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.modules.causal_lm import CausalLM
from lightning_rlora.modules.sequence_classification import SequenceClassification

__all__ = ["AdaptedModel", "CausalLM", "SequenceClassification"]
