"""Finding the LoRA pairs of a model that PEFT adapted, and saying what is left out and why."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_rlora.errors import UserError


@dataclass(frozen=True)
class LoraPair:
    """One trainable pair of factors: the layer's weight is W + c B A.

    Attributes:
        name: Path of the PEFT layer inside the model it was found in.
        layer: The PEFT layer.
        adapter: Name of the adapter the factors belong to.
        a: Factor A as PEFT stores it, (r, n) or, for convolutions, (r, channels, *kernel).
        b: Factor B as PEFT stores it, (m, r) or, for convolutions, (m, r, 1, ...).
        scaling: PEFT's factor c (alpha / r, or alpha / sqrt(r) for rslora).
    """

    name: str
    layer: LoraLayer
    adapter: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, r) of the product's flattened matrix and its rank."""
        return self.b.shape[0], self.a[0].numel(), self.a.shape[0]


def matrix(factor: Tensor) -> Tensor:
    """A factor as a matrix: PEFT's convolution factors flatten to (r, n) and (m, r), the others are matrices."""
    return factor.flatten(1)


@dataclass(frozen=True)
class LoraScan:
    """What a model trains: pairs that are points of the manifold, and all other trainable parameters.

    Attributes:
        pairs: The pairs, in the order of the model's modules.
        others: Every other trainable parameter by name: heads, norms, biases, magnitudes, and factors left out.
        left_out: For each LoRA factor among `others`, the sentence that says why it is no point of the manifold; also
            for what other PEFT methods train.
    """

    pairs: list[LoraPair]
    others: dict[str, nn.Parameter]
    left_out: dict[str, str]


def scan(model: nn.Module) -> LoraScan:
    """Sort the trainable parameters of a model into LoRA pairs and the rest.

    Args:
        model: Any model adapted by `peft.get_peft_model`, `peft.inject_adapter_in_model` or diffusers' `add_adapter`,
            or a module that contains one.

    Raises:
        UserError: If a pair's rank exceeds min(m, n): no matrix of that rank exists.
    """
    candidates = [pair for name, module in model.named_modules() for pair in _layer_pairs(plain(name), module)]
    uses = Counter(_address(factor) for pair in candidates for factor in (pair.a, pair.b))
    names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}
    pairs: list[LoraPair] = []
    modules = ((plain(name), module) for name, module in model.named_modules())
    left_out = {key: reason for name, module in modules for key, reason in _other_methods(name, module)}
    for pair in candidates:
        trainable = [factor for factor in (pair.a, pair.b) if factor.requires_grad]
        if not trainable:
            continue
        reason = _why_left_out(pair, shared=uses[_address(pair.a)] > 1 or uses[_address(pair.b)] > 1)
        if reason is None:
            m, n, r = pair.shape
            if r > min(m, n):
                raise UserError(
                    f"rank {r} of adapter '{pair.adapter}' exceeds min(m, n) = {min(m, n)} of layer {pair.name}: "
                    "lower r, or give this layer its own with rank_pattern"
                )
            pairs.append(pair)
        else:
            left_out |= {names[id(factor)]: reason for factor in trainable}
    taken = {id(factor) for pair in pairs for factor in (pair.a, pair.b)}
    others = {plain(n): p for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken}
    return LoraScan(pairs, others, left_out)


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """The trainable LoRA pairs of a model, in the order of its modules.

    Raises:
        UserError: If there is none.
    """
    found = scan(model)
    if not found.pairs:
        reasons = sorted(set(found.left_out.values()))
        if reasons:
            raise UserError("the model has no LoRA pair that is a point of the manifold: " + "; ".join(reasons))
        raise UserError(
            "the model has no trainable LoRA pair: adapt it with PEFT (get_peft_model) and leave the adapter unfrozen "
            "(is_trainable=True when loading a saved one)"
        )
    return found.pairs


def _layer_pairs(name: str, module: nn.Module) -> Iterator[LoraPair]:
    """The factors of every adapter of one PEFT layer, linear ones first, then embeddings."""
    if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer):
        return
    for adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        assert isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)
        yield LoraPair(name, module, adapter, a, b, module.scaling[adapter])
    for adapter, a in module.lora_embedding_A.items():
        b = module.lora_embedding_B[adapter]
        assert isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)
        yield LoraPair(name, module, adapter, a, b, module.scaling[adapter])


def _other_methods(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """What a layer of another PEFT method trains, and why it is left out; tokens trained as such are like a head."""
    lora = isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)
    if lora or not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
        return
    layer = f"{type(module).__module__}.{type(module).__qualname__}"
    for key, parameter in module.named_parameters(prefix=name):
        if parameter.requires_grad and not key.startswith(f"{name}.base_layer."):
            yield key, f"its layer ({layer}) is of another PEFT method than LoRA and has no pair of factors"


def _address(factor: Tensor) -> int:
    """Where a factor's numbers lie: tied adapters of PEFT's are two parameters over one storage."""
    local = factor.to_local() if isinstance(factor, DTensor) else factor
    return local.data_ptr() or id(factor)


def _why_left_out(pair: LoraPair, *, shared: bool) -> str | None:
    """The reason why a pair cannot be treated as a point of the manifold, or None."""
    base = pair.layer.get_base_layer()
    if not (pair.a.requires_grad and pair.b.requires_grad):
        return "one of its two factors is frozen, so the product moves in a linear space and not on the manifold"
    if shared:
        return "its factors are shared with another layer, so the layers' products cannot move on their own"
    if isinstance(pair.layer, ParamWrapper):
        return "its factors adapt a stack of expert matrices (target_parameters), which is not one product"
    if isinstance(base, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return "PEFT adds the update of a MultiheadAttention's output projection twice, so its layers are not W + c B A"
    if pair.scaling <= 0:
        return "its scaling (lora_alpha) is not positive, so its factors have no balanced form"
    if getattr(base, "groups", 1) > 1:
        return "it adapts a grouped convolution, whose update is not the product of the flattened factors"
    if getattr(base, "padding_mode", "zeros") != "zeros" or set(getattr(base, "dilation", ())) - {1}:
        return "PEFT's adapter of a convolution ignores its padding_mode and dilation, so the layer is not W + c B A"
    if isinstance(base, nn.Embedding) and base.padding_idx is not None:
        return "its embedding has a padding_idx, whose column only one of the two factor gradients contains"
    if isinstance(base, nn.Embedding) and base.sparse:
        return "its embedding makes sparse gradients"
    variant = pair.layer.lora_variant.get(pair.adapter)
    if variant is not None and not pair.layer.use_dora[pair.adapter]:
        return f"its PEFT variant {type(variant).__name__} is more than a product"
    return None


def base_weight(pair: LoraPair) -> nn.Parameter:
    """The frozen weight that the pair adapts, as the base layer stores it."""
    weight = pair.layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def is_transposed(pair: LoraPair) -> bool:
    """Whether the base layer stores the transposed matrix (n, m): Conv1D of GPT-2, and embeddings."""
    return bool(getattr(pair.layer, "fan_in_fan_out", False)) or isinstance(pair.layer.get_base_layer(), nn.Embedding)


def is_quantised(pair: LoraPair) -> bool:
    """Whether the base weight holds packed integers, to which no offset can be added; FSDP shards them as floats."""
    in_4_bits = getattr(pair.layer.get_base_layer(), "quant_state", None) is not None
    return in_4_bits or not torch.is_floating_point(base_weight(pair))


def with_shared_base(model: nn.Module, pairs: list[LoraPair]) -> list[LoraPair]:
    """The pairs whose base weight is another layer's too (tied embeddings), so that it must not be changed."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [pair for pair in pairs if uses[id(base_weight(pair))] > 1]


FSDP1 = "_fsdp_wrapped_module"
"""What FSDP1 puts into the paths of the modules that it wraps."""


FSDP1_UNIT = "fsdp1_unit"
"""Name of the attribute by which a layer knows the wrapper that shards it, and the one around all: weak references."""


def plain(name: str) -> str:
    """A path in a model as it is without FSDP1."""
    return name.replace(f"{FSDP1}.", "")


@contextmanager
def gathered(pair: LoraPair) -> Iterator[None]:
    """The base weight, of which FSDP1 leaves a process a flat part, as it is without; what is written to it lasts."""
    wrappers = getattr(pair.layer.get_base_layer(), FSDP1_UNIT, None)
    if wrappers is None:
        yield
    else:
        unit, root = (wrapper() for wrapper in wrappers)
        # before the first pass FSDP1 would take whatever is gathered first for the root; asked for that, it finds it
        FullyShardedDataParallel.fsdp_modules(root, root_only=True)
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False):
            yield


def whole(weight: Tensor) -> Tensor:
    """All of a weight; of one that FSDP2 shards a copy, for which all processes must ask together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def own_rows(weight: Tensor) -> tuple[Tensor, slice]:
    """The part of a weight that this process holds, to be written to, and which rows of the whole it is."""
    if not isinstance(weight, DTensor):
        return weight, slice(len(weight))
    # FSDP2 cuts along the first dimension, into parts of equal height, of which the last may be short or empty
    own = weight.to_local()
    height = -(-len(weight) // weight.device_mesh.size())
    first = min(weight.device_mesh.get_local_rank() * height, len(weight))
    return own, slice(first, first + len(own))
