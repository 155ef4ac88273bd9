"""Probing factors: products of a loss gradient with chosen matrices, out of ordinary backward passes.

With PEFT's forward W x + c B A x and A = Omega^T, B = 0, the function is the base's own and autograd's grad_B is c G
Omega; with A = 0, B = Q, grad_A is c Q^T G. So products with the full gradient G (m x n) come without G ever being
formed, for all layers in one pass, and of any width, since PEFT's forward reads the rank off the factors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_rlora.adapters.pairs import LoraPair


class Probes:
    """Products of the loss gradients of all pairs with matrices of any width.

    Args:
        pairs: The pairs whose layers are probed.
        backward: Runs the backward passes: adds the gradient of the mean loss to the `.grad` of whatever requires it.
    """

    def __init__(self, pairs: list[LoraPair], backward: Callable[[], object]) -> None:
        self._pairs = pairs
        self._backward = backward
        self.passes = 0
        """How often `backward` was called."""

    def multiply(self, omegas: list[Tensor]) -> list[Tensor]:
        """G Omega (m, k) for each pair's Omega (n, k)."""
        return self._products([(omega.mT, None) for omega in omegas])

    def multiply_transposed(self, qs: list[Tensor]) -> list[Tensor]:
        """G^T Q (n, k) for each pair's Q (m, k)."""
        return [product.mT for product in self._products([(None, q) for q in qs])]

    def _products(self, factors: list[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
        probed = []
        for pair, (a, b) in zip(self._pairs, factors, strict=True):
            k = len(a) if a is not None else b.shape[1]  # type: ignore[union-attr]
            # The factor that is probed is the zero one, and the only one that needs a gradient. It is a single zero
            # in memory, and the other one is the caller's block itself: both stay through the whole pass.
            shape_a, shape_b = (k, *pair.a.shape[1:]), (len(pair.b), k, *pair.b.shape[2:])
            new_a = pair.a.new_zeros(()).expand(shape_a) if a is None else a.to(pair.a).reshape(shape_a)
            new_b = pair.b.new_zeros(()).expand(shape_b) if b is None else b.to(pair.b).reshape(shape_b)
            new = nn.Parameter(new_a, requires_grad=a is None), nn.Parameter(new_b, requires_grad=b is None)
            put_factors(pair, *new)
            probed.append(new[0] if a is None else new[1])
        self._backward()
        self.passes += 1
        products = []
        for pair, probe in zip(self._pairs, probed, strict=True):
            gradient, probe.grad = probe.grad, None
            products.append((torch.zeros_like(probe) if gradient is None else gradient.div_(pair.scaling)).flatten(1))
        return products


def put_factors(pair: LoraPair, a: nn.Parameter, b: nn.Parameter) -> None:
    """Put other parameters, of any rank, in the place of a pair's factors."""
    if pair.adapter in pair.layer.lora_embedding_A:
        pair.layer.lora_embedding_A[pair.adapter] = a
        pair.layer.lora_embedding_B[pair.adapter] = b
    else:
        pair.layer.lora_A[pair.adapter].weight = a
        pair.layer.lora_B[pair.adapter].weight = b


@contextmanager
def probing(model: nn.Module, pairs: list[LoraPair], backward: Callable[[], object]) -> Iterator[Probes]:
    """Probes for a while; afterwards every parameter and gradient is what it was.

    Args:
        model: The adapted model (or a module around it); its other trainable parameters need no gradients meanwhile.
        pairs: The pairs whose layers are probed.
        backward: Runs the backward passes.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield Probes(pairs, backward)
    finally:
        for pair in pairs:
            put_factors(pair, pair.a, pair.b)
        for parameter in trainable:
            parameter.requires_grad_(True)
