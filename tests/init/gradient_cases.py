"""Small adapted models, a backward pass for each, and their materialised gradients: the oracle of LOI."""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rlora.adapters import LoraPair, find_pairs, matrix
from lightning_rlora.adapters.pairs import base_weight, is_transposed

Backward = Callable[[], object]

TEXT = """The old house stood at the end of the lane, and nobody had lived in it for many years. When the wind blew from
the sea, the children of the village said that they could hear voices behind its shutters, but their fathers laughed at
them and told them that it was only the boards that creaked. One evening in November a carriage stopped before the gate.
A tall man in a grey coat stepped out, looked for a while at the dark windows, and then paid the driver without a word.
He had a key. In the morning there was smoke above the chimney, and before noon everybody knew that the stranger had
bought bread and candles, that he had asked the way to the church, and that he had not given his name to anyone."""


def tiny_llama(r=3, dtype=torch.float32, seed=0, **config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # away from a network that is nearly linear
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    return get_peft_model(model.to(dtype), LoraConfig(**settings)).eval()


def llama_backward(model: nn.Module, seeds=(0,)) -> Backward:
    batches = [torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(seed)) for seed in seeds]

    def backward() -> None:
        for ids in batches:
            (model(input_ids=ids, labels=ids).loss / len(batches)).backward()

    return backward


def embedded_lm(r=8, **options) -> tuple[nn.Module, Backward]:
    """The language model in the package, with a page of text."""
    from lightning_rlora.modules.base_model import load_base, load_tokenizer

    settings = {"dtype": "float32", "quantization": None} | options
    base = load_base("embedded:tiny-lm", trust_remote_code=False, **settings)
    ids = load_tokenizer("embedded:tiny-lm", trust_remote_code=False)(TEXT, return_tensors="pt").input_ids
    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    return model, lambda: model(input_ids=ids, labels=ids).loss.backward()


def dense_gradients(model: nn.Module, pairs: list[LoraPair], backward: Backward) -> list[Tensor]:
    """The gradients of the base weights as m x n matrices in float64, by plain autograd."""
    weights = [base_weight(pair) for pair in pairs]
    for weight in weights:
        weight.requires_grad_(True)
    backward()
    gradients = []
    for pair, weight in zip(pairs, weights, strict=True):
        g = weight.grad.double()
        m, n, _ = pair.shape
        gradients.append(g.mT.reshape(m, n) if is_transposed(pair) else g.reshape(m, n))
        weight.grad = None
        weight.requires_grad_(False)
    model.zero_grad()
    return gradients


def start_of(pair: LoraPair) -> Tensor:
    """X0, dense and in float64."""
    return pair.scaling * matrix(pair.b).detach().double() @ matrix(pair.a).detach().double()


def tangent_part(x: Tensor, r: int, z: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    u, v = u[:, :r], vt[:r].mT
    beside = z - u @ (u.mT @ z)
    return z - (beside - beside @ v @ v.mT)


def truncated(g: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def captured(pairs: list[LoraPair], gradients: list[Tensor]) -> tuple[list[float], float]:
    """|P_X0(G)|^2 over the energy of the best rank-2r approximation: for each layer, and all together."""
    held = [tangent_part(start_of(p), p.shape[2], g).square().sum() for p, g in zip(pairs, gradients, strict=True)]
    best = [truncated(g, 2 * p.shape[2]).square().sum() for p, g in zip(pairs, gradients, strict=True)]
    return [float(x / y) for x, y in zip(held, best, strict=True)], float(sum(held) / sum(best))


class NewTensors(TorchDispatchMode):
    """Records the shapes of all tensors with memory of their own that operations produce."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.old = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.old:
                self.shapes.add(tuple(t.shape))
        return out


def pairs_of(model: nn.Module) -> list[LoraPair]:
    return find_pairs(model)
