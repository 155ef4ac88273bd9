"""The offset of the base: W' = W - X0, so that an adapter that starts at X0 leaves the function unchanged.

The offset belongs to the adapter: it travels in every state dict as factors of rank r, and loading a state dict puts
the base where the offset says it should be, whether the base at hand is pristine or was shifted before.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_rlora.adapters.pairs import LoraPair, base_weight, is_quantised, is_transposed
from lightning_rlora.errors import UserError

NAME = "manifold_offset"
"""Name of the submodule of a PEFT layer; PEFT saves only what has `lora_` in its name, and so leaves it alone."""

_SAMPLES = 64


class BaseOffset(nn.Module):
    """The factors of X0 = left right that one base weight was shifted by, and a fingerprint of the weight before.

    Registered on a PEFT layer as `manifold_offset`. Its buffers are `left` (m, k) and `right` (k, n) in the adapter's
    dtype, with k = 0 for no offset, and `fingerprint` (64,), entries of the pristine base weight in float32.
    """

    left: Tensor
    right: Tensor
    fingerprint: Tensor

    def __init__(self, pair: LoraPair) -> None:
        super().__init__()
        m, n, _ = pair.shape
        self._pair = (pair,)  # a tuple, so that the layer does not become a submodule of its own submodule
        self.register_buffer("left", pair.b.new_zeros(m, 0).detach())
        self.register_buffer("right", pair.a.new_zeros(0, n).detach())
        self.register_buffer("fingerprint", self._entries())

    @property
    def is_set(self) -> bool:
        """Whether the base is shifted."""
        return self.left.shape[1] > 0

    @torch.no_grad()
    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Shift the base by -left right, (m, k) and (k, n); the fingerprint stays that of the pristine base.

        Raises:
            UserError: If the base is shifted already, is quantised, or is shared with another layer.
        """
        pair = self._pair[0]
        if self.is_set:
            raise UserError(f"the base of layer {pair.name} carries an offset already: initialise an adapter only once")
        if is_quantised(pair):
            raise UserError(f"the base of layer {pair.name} is quantised and takes no offset: use offset='none'")
        self.left, self.right = left.to(self.left), right.to(self.right)
        self._shift(-1.0)

    @torch.no_grad()
    def remove(self) -> None:
        """Shift the base back and forget the offset."""
        if self.is_set:
            self._shift(1.0)
            self.forget()

    def forget(self) -> None:
        """Drop the offset of a base that was put back to its pristine state by other means."""
        self.left, self.right = self.left[:, :0].clone(), self.right[:0].clone()

    def _shift(self, sign: float) -> None:
        pair = self._pair[0]
        weight = base_weight(pair)
        delta = self.left.float() @ self.right.float() if weight.dtype != torch.float64 else self.left @ self.right
        delta = (delta.mT if is_transposed(pair) else delta).reshape(weight.shape)
        weight.copy_((weight.to(delta.dtype) + sign * delta).to(weight.dtype))

    def _positions(self) -> Tensor:
        weight = base_weight(self._pair[0])
        return torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64, device=weight.device).long()

    def _entries(self) -> Tensor:
        weight = base_weight(self._pair[0]).detach()
        return weight.flatten()[self._positions()].float()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over the offset of a state dict and bring the base to W - X0.

        A state dict that holds the base as well holds it shifted: the base layer, which stands before this module, has
            loaded
        it. Without it, the base at hand is the pristine one, or the one this module shifted.
        """
        keys = [prefix + name for name in ("left", "right", "fingerprint")]
        if any(key not in state_dict for key in keys):
            super()._load_from_state_dict(state_dict, prefix, *args)  # reports what is missing
            return
        left, right, fingerprint = (state_dict[key].to(self.left.device) for key in keys)
        pair = self._pair[0]
        came_along = prefix.removesuffix(f"{NAME}.") + "base_layer.weight" in state_dict
        if not came_along:
            if self.left.shape == left.shape and torch.equal(self.left, left) and torch.equal(self.right, right):
                return
            self.remove()
            m, n, _ = pair.shape
            same_shape = left.shape[0] == m and right.shape[1] == n
            if not same_shape or (self._entries() - fingerprint).norm() > 0.01 * fingerprint.norm():
                raise UserError(
                    f"the adapter was trained on another base model (the weights of layer {pair.name} differ): "
                    "load it with the base it was trained on"
                )
        self.left, self.right = left.to(self.left.dtype), right.to(self.right.dtype)
        self.fingerprint = fingerprint
        if self.is_set and not came_along:
            self._shift(-1.0)


def track_offsets(pairs: list[LoraPair]) -> None:
    """Register an empty `BaseOffset` on every pair's layer that has none, while the base is still pristine.

    Must come before a checkpoint is loaded: a state dict can only restore the offset of a layer that tracks one.
    """
    for pair in pairs:
        if get_offset(pair) is None:
            cast(nn.Module, pair.layer).add_module(NAME, BaseOffset(pair))


def get_offset(pair: LoraPair) -> BaseOffset | None:
    """The offset module of a pair's layer, or None where `track_offsets` was not called."""
    offset = getattr(pair.layer, NAME, None)
    return offset if isinstance(offset, BaseOffset) else None


def offset_factors(pair: LoraPair) -> tuple[Tensor, Tensor] | None:
    """The factors (m, k), (k, n) of the X0 that the pair's base is shifted by, or None for a pristine base."""
    offset = get_offset(pair)
    return (offset.left, offset.right) if offset is not None and offset.is_set else None
