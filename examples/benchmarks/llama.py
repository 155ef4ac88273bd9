"""The models of the benchmarks: Llama-3-8B with random weights (or narrower), and the quickstart's embedded one."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from bench import DEVICE, ON_GPU
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lightning_rlora.assets import resolve

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_3_8b(layers: int = 32, shrink: int = 1) -> LlamaConfig:
    """Llama-3-8B's configuration; `shrink` divides all widths and the vocabulary."""
    return LlamaConfig(
        hidden_size=4096 // shrink,
        intermediate_size=14336 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256 // shrink,
    )


def quickstart() -> tuple[LlamaConfig, dict[str, Any]]:
    """The quickstart's model, and the fields of its adapter."""
    options = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]
    return AutoConfig.from_pretrained(resolve(options["base"])), options["adapter"]


def projection_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(m, n) of the seven projections of every layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    layer = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*layer, (wide, hidden), (wide, hidden), (hidden, wide)] * config.num_hidden_layers


def adapted_llama(config: LlamaConfig, rank: int) -> nn.Module:
    """A model with random weights in bfloat16, made on the device, and float32 LoRA factors on all projections."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model.train()


class Tokens(NamedTuple):
    """A batch of text, (B, length)."""

    ids: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """The mean cross-entropy of the next token."""
        return model(input_ids=self.ids, labels=self.ids, use_cache=False).loss


class Batch(Protocol):
    """What a model is trained on."""

    def loss(self, model: nn.Module) -> Tensor: ...


def random_tokens(config: LlamaConfig, batch: int, length: int) -> Tokens:
    return Tokens(torch.randint(config.vocab_size, (batch, length), device=DEVICE))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = batch.loss(model)
    loss.backward()
    return loss.detach()


def training_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Tensor:
    loss = backward(model, batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def training_memory(model: nn.Module, make: Callable[[nn.Module], Optimizer], batch: Batch) -> dict[str, int | None]:
    """Bytes that training with an optimizer takes; it lives no longer than this call. No peaks without a GPU.

    Returns:
        `state`: tensors of the optimizer's state. `held`: allocated between two steps, the model included. `peak` and
        `reserved`: the most allocated, and taken from the device, during training steps. `inside_step`: the most that
        `optimizer.step()` alone allocates beyond what it found.
    """
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    optimizer = make(model)
    for _ in range(3):
        training_step(model, optimizer, batch)
    sizes: dict[str, int | None] = dict.fromkeys(("held", "peak", "reserved", "inside_step"))
    sizes["state"] = state_bytes(optimizer)
    if ON_GPU:
        sizes["held"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            training_step(model, optimizer, batch)
        sizes["peak"], sizes["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        backward(model, batch)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        sizes["inside_step"] = torch.cuda.max_memory_allocated() - before
        optimizer.zero_grad(set_to_none=True)
    return sizes
