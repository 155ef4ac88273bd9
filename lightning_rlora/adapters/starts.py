"""Starts: what the factors of an adapter are before the first step, where PEFT's default (A random, B zero) is not it.

A start sets the factors and leaves the base as it is. Where their product is not zero it belongs on a base shifted by
it, W' = W - c B A, so that the function is unchanged; `AdapterInit` does that, by way of `BaseOffset`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_rlora.adapters.gauge import write_point
from lightning_rlora.adapters.pairs import (
    FSDP1,
    LoraPair,
    base_weight,
    gathered,
    is_quantised,
    is_transposed,
    matrix,
    whole,
)
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Point


@dataclass(frozen=True)
class Passes:
    """The first training batches, and what can be run on them: dropout is off, nothing is logged.

    Attributes:
        batches: As many as the start asks for.
        forward: The adapted model on a batch of keyword arguments, without gradients.
        loss: The loss of a batch, differentiable; what it draws at random it draws the same each time.
    """

    batches: list[Any]
    forward: Callable[[Any], object]
    loss: Callable[[Any], Tensor]


class Start(ABC):
    """Sets the factors of every pair before the first step.

    Attributes:
        batches: Number of training batches that it looks at.
        shifts_base: Whether the base takes the product off, so that the function is unchanged.
    """

    batches: int = 0
    shifts_base: bool = True

    @abstractmethod
    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Set A and B of each pair in place; the base stays as it is.

        Args:
            model: The model that PEFT adapted, at its pretrained function.
            pairs: Its pairs.
            passes: What the training data have to say.
            generator: Source of random factors, on the CPU.

        Raises:
            UserError: If a layer is of a kind that the start does not know.
        """


class Stiefel(Start):
    """Orthonormal factors: points of the Stiefel manifold (arXiv 2507.12142, table 7).

    Args:
        factor: `A` has orthonormal rows and B is zero; `B` has orthonormal columns and A is zero; `both` are
            orthonormal, so that all singular values of the product are the adapter's scaling, and the base is shifted.
    """

    def __init__(self, factor: Literal["A", "B", "both"]) -> None:
        self.factor = factor
        self.shifts_base = factor == "both"

    @torch.no_grad()
    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Draw random orthonormal factors."""
        for pair in pairs:
            for name, factor in (("A", pair.a), ("B", pair.b)):
                new = torch.zeros(matrix(factor).shape)
                if self.factor in (name, "both"):
                    nn.init.orthogonal_(new, generator=generator)
                factor.copy_(new.reshape(factor.shape))


class PiSSA(Start):
    """The base's own top r singular triplets (arXiv 2404.02948), as computed by PEFT.

    Args:
        niter: Subspace iterations of a fast randomised SVD; by default the exact one.
    """

    def __init__(self, niter: int | None = None) -> None:
        self._method = "pissa" if niter is None else f"pissa_niter_{niter}"

    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Decompose every base weight."""
        check_linear(pairs, "PiSSA")
        for pair in pairs:
            keep_base(pair, lambda layer, adapter: layer.pissa_init(adapter, self._method))


class OLoRA(Start):
    """The first r columns of Q and rows of R in the QR factorisation of the base (arXiv 2406.01775), by PEFT."""

    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Factorise every base weight."""
        check_linear(pairs, "OLoRA")
        for pair in pairs:
            if is_transposed(pair):
                raise UserError(f"layer {pair.name} stores its weight transposed, which OLoRA's start does not know")
            keep_base(pair, lambda layer, adapter: layer.olora_init(adapter))


class LoftQ(Start):
    """The best rank-r approximation of what quantisation took away (arXiv 2310.08659): W is about Q(W) + c B A.

    One round of LoftQ's alternation, as in PEFT's `replace_lora_weights_loftq`, which wants CUDA: the base stays Q(W)
    as bitsandbytes loads it, on a CPU or a GPU, in 4 or 8 bits. (More rounds would quantise W - c B A, another base
    than the one that every user of the adapter loads.) So the adapter belongs to the base quantised in the same way,
    and to no other. The weights before quantisation are read once more, from where the base came from, into the CPU's
    memory.
    """

    shifts_base = False

    @torch.no_grad()
    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Decompose every quantisation error."""
        for pair in pairs:
            if not is_quantised(pair):
                raise UserError(f"LoftQ starts from the error of quantisation, and layer {pair.name} is not quantised")
        adapted: Any = model
        quantised = adapted.get_base_model() if isinstance(model, PeftModel) else adapted
        exact = dict(_before_quantisation(getattr(quantised, FSDP1, quantised)).named_modules())
        for pair in pairs:
            weight: Any = exact[pair.name.removeprefix("base_model.model.")].weight
            with whole_base(pair):
                rounded = dequantize_module_weight(pair.layer.get_base_layer())
            error = weight.to(pair.b) - rounded.to(pair.b)
            u, s, vt = torch.linalg.svd(error.mT if is_transposed(pair) else error, full_matrices=False)
            r = pair.shape[2]
            write_point(pair, Point(u[:, :r], s[:r], vt[:r].mT))


def _before_quantisation(model: Any) -> nn.Module:
    """The weights that a quantised model was made from, read once more, in the revision that it was loaded from."""
    name, revision = model.name_or_path, getattr(model.config, "_commit_hash", None) or "main"
    stored = type(model.config).from_pretrained(name, revision=revision)
    if getattr(stored, "quantization_config", None) is not None:
        raise UserError(
            f"{name} is stored quantised, so what quantisation took away is not to be had: LoftQ needs a base that is "
            "quantised as it is loaded (quantization: 4bit)"
        )
    exact: nn.Module = type(model).from_pretrained(name, revision=revision, dtype="auto")
    return exact


def check_linear(pairs: list[LoraPair], start: str) -> None:
    """Refuse layers that PEFT's initialisations of linear layers do not know, before anything is done."""
    for pair in pairs:
        if pair.adapter not in pair.layer.lora_A or pair.a.ndim != 2:
            raise UserError(f"layer {pair.name} is not linear, and {start} knows linear layers only")


@contextmanager
def whole_base(pair: LoraPair) -> Iterator[None]:
    """All of the base weight in its layer's hands for a while, a copy: what is done to it does not last.

    Of a weight that is sharded over processes this is the only way to see it, outside the model's own passes.
    """
    with gathered(pair):
        layer: Any = pair.layer.get_base_layer()
        weight = base_weight(pair)
        if not is_quantised(pair):
            layer.weight = nn.Parameter(whole(weight.detach()).clone(), requires_grad=False)
        elif isinstance(weight, DTensor):  # in 4 bits: the layer has kept the scales
            from bitsandbytes.nn import Params4bit

            layer.weight = Params4bit(whole(weight.detach()), quant_state=layer.quant_state, bnb_quantized=True)
        try:
            yield
        finally:
            layer.weight = weight


@torch.no_grad()
def keep_base(pair: LoraPair, peft_init: Callable[[Any, str], object]) -> None:
    """Run one of PEFT's initialisations of a layer, and undo what it did to the base.

    PEFT puts new tensors in the places of the factors, or changes them in place; afterwards they are where they were in
    memory.

    Args:
        pair: The layer's pair.
        peft_init: Called with PEFT's layer and the adapter's name.
    """
    tensors = pair.a.data, pair.b.data
    with whole_base(pair):
        peft_init(pair.layer, pair.adapter)
    values = pair.a.data, pair.b.data
    for parameter, tensor, value in zip((pair.a, pair.b), tensors, values, strict=True):
        parameter.data = tensor
        parameter.copy_(value)


@torch.no_grad()
def renew_magnitude(pair: LoraPair) -> None:
    """Make DoRA's magnitudes, if the pair has any, the norms of W + c B A as they are now, so that the layer is that.

    PEFT took them of the base alone, when the adapter was made.
    """
    if not pair.layer.use_dora.get(pair.adapter, False):
        return
    dora: Any = pair.layer.lora_magnitude_vector[pair.adapter]
    magnitude = dora.weight  # the optimizer's
    with whole_base(pair):
        dora.update_layer(
            base_layer=pair.layer.get_base_layer(), lora_A=pair.a.detach(), lora_B=pair.b.detach(), scaling=pair.scaling
        )
    magnitude.copy_(dora.weight)
    dora.weight = magnitude
