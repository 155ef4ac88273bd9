"""The methods that the manifold's optimizers are compared with: each moves the factors A and B by a rule of its own."""

from lightning_rlora.optim.peers.factor_muon import FactorMuon
from lightning_rlora.optim.peers.lora_fa import LoRAFA
from lightning_rlora.optim.peers.lora_muon import LoRAMuon
from lightning_rlora.optim.peers.lora_rite import LoRARITE
from lightning_rlora.optim.peers.lora_tsd import LoRATSD
from lightning_rlora.optim.peers.polora import PoLoRA
from lightning_rlora.optim.peers.rprec_adamw import RPrecAdamW

__all__ = ["FactorMuon", "LoRAFA", "LoRAMuon", "LoRARITE", "LoRATSD", "PoLoRA", "RPrecAdamW"]
