"""Optimizers of LoRA pairs, on the manifold and beside it, their parameter groups, and learning-rate schedules."""

from lightning_rlora.optim.fixed_rank import FixedRankOptimizer
from lightning_rlora.optim.groups import parameter_groups
from lightning_rlora.optim.lora_plus import lora_plus, lora_plus_groups
from lightning_rlora.optim.peers import FactorMuon, LoRAFA, LoRAMuon, LoRARITE, LoRATSD, PoLoRA, RPrecAdamW
from lightning_rlora.optim.riemannian_sgd import RiemannianSGD
from lightning_rlora.optim.riemannion import Riemannion
from lightning_rlora.optim.schedules import CosineWithWarmup, LinearWithWarmup, PolynomialWithWarmup
from lightning_rlora.optim.whitened_riemannion import WhitenedRiemannion

__all__ = [
    "CosineWithWarmup",
    "FactorMuon",
    "FixedRankOptimizer",
    "LinearWithWarmup",
    "LoRAFA",
    "LoRAMuon",
    "LoRARITE",
    "LoRATSD",
    "PoLoRA",
    "PolynomialWithWarmup",
    "RPrecAdamW",
    "RiemannianSGD",
    "Riemannion",
    "WhitenedRiemannion",
    "lora_plus",
    "lora_plus_groups",
    "parameter_groups",
]
