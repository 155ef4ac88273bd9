"""LightningModules that fine-tune pretrained models with adapters on the manifold."""

from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.modules.causal_lm import CausalLM
from lightning_rlora.modules.sequence_classification import SequenceClassification
from lightning_rlora.modules.text_to_image import TextToImage

__all__ = ["AdaptedModel", "CausalLM", "SequenceClassification", "TextToImage"]
