"""Tiny models adapted by PEFT, and the dense gradient of one layer as the oracle."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

LAYERS = {
    "Linear": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "Conv1D": (lambda: Conv1D(7, 9), lambda: torch.randn(4, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 7, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 6, 5)),
    "Conv2d pointwise": (lambda: nn.Conv2d(9, 7, 1), lambda: torch.randn(2, 9, 3, 2)),
    "Conv1d": (lambda: nn.Conv1d(4, 7, 3), lambda: torch.randn(2, 4, 8)),
    "Embedding": (lambda: nn.Embedding(11, 7), lambda: torch.tensor([[0, 3, 3], [10, 1, 5]])),
}
KINDS = list(LAYERS)


class OneLayer(nn.Module):
    """One layer under a nonlinear loss whose gradient with respect to the output is dense."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * (y + y.square())).sum()


@dataclass
class Case:
    kind: str
    model: OneLayer
    x: Tensor

    @property
    def peft_layer(self) -> Any:
        return self.model.layer

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A base weight as the m x n matrix that the factors' product is added to."""
        return weight.T if self.kind in ("Conv1D", "Embedding") else weight.flatten(1)

    def dense_gradient(self, adapter: str = "default") -> Tensor:
        """G (m, n) by autograd through an ordinary layer with the weight W + PEFT's own delta weight."""
        base = copy.deepcopy(self.peft_layer.base_layer)
        weight = base.weight.requires_grad_(True)
        with torch.no_grad():
            weight += self.peft_layer.get_delta_weight(adapter)
        OneLayer(base)(self.x).backward()
        return self.as_matrix(weight.grad)


def one_layer(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> Case:
    """A layer of that kind with a random adapter of rank 3 and scaling 5 / 3."""
    torch.manual_seed(seed)
    make, inputs = LAYERS[kind]
    fields = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "fan_in_fan_out": kind == "Conv1D"} | fields
    model = inject_adapter_in_model(LoraConfig(target_modules=["layer"], **fields), OneLayer(make()))
    x = inputs()
    model = model.to(dtype)
    with torch.no_grad():  # PEFT starts some kinds at zero in spite of init_lora_weights=False
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.5)
    return Case(kind, model, x.to(dtype) if x.is_floating_point() else x)


def llama(*, seed: int = 0, layers: int = 2, hidden: int = 16, tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=hidden + 8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config).eval()


def unet(*, seed: int = 0) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def randomise(model: nn.Module, *, seed: int = 1, std: float = 0.1) -> nn.Module:
    """Give every trainable parameter random values, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


IDS = torch.arange(12).reshape(2, 6)
