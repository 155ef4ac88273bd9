"""The offset of the base: W' = W - X0, so that an adapter that starts at X0 leaves the function unchanged.

The offset belongs to the adapter: it travels in every state dict as factors of rank r, and loading a state dict puts
the base where the offset says it should be, whether the base at hand is pristine or was shifted before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rlora.adapters.pairs import (
    LoraPair,
    base_weight,
    gathered,
    is_quantised,
    is_transposed,
    matrix,
    own_rows,
    whole,
    with_shared_base,
)
from lightning_rlora.errors import UserError

NAME = "manifold_offset"
"""Name of the submodule of a base layer; PEFT saves everything in its own layers but what lies in `base_layer`."""

_SAMPLES = 64


class BaseOffset(nn.Module):
    """The factors of X0 = left right that one base weight was shifted by, and a fingerprint of the weight before.

    Registered on a base layer as `manifold_offset`. Its buffers are `left` (m, k) and `right` (k, n) in the adapter's
    dtype, with k = 0 for no offset, and `fingerprint` (64,), entries of the pristine base weight in float32.
    """

    left: Tensor
    right: Tensor
    fingerprint: Tensor
    handle: RemovableHandle
    """Of the hook on the base layer that sets `base_comes_along`."""

    def __init__(self, pair: LoraPair) -> None:
        super().__init__()
        m, n, _ = pair.shape
        self._pair = (pair,)  # a tuple, so that the layer does not become a submodule of its own submodule
        self.base_comes_along = False  # in the state dict that is being loaded
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
            UserError: If the base is shifted already or quantised.
        """
        pair = self._pair[0]
        if self.is_set:
            raise UserError(f"the base of layer {pair.name} carries an offset already: initialise an adapter only once")
        if is_quantised(pair):
            raise UserError(f"the base of layer {pair.name} is quantised and takes no offset: use offset='none'")
        # copies: the factors given may be the pair's own, which go on to be trained
        self.left = left.detach().to(self.left, copy=True)
        self.right = right.detach().to(self.right, copy=True)
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
        # Where in memory its operands lie may change a matrix product's rounding, and a resumed run must find the very
        # same base. In float64 that is 1e-16 of the offset, and gone once the sum is rounded to the weight's dtype.
        left, right = (sign * self.left).double(), self.right.double()
        if is_transposed(pair):
            left, right = right.mT, left.mT
        with gathered(pair):
            own, rows = own_rows(base_weight(pair))
            delta = left[rows] @ right
            own.copy_(delta.reshape(own.shape).add_(own))

    def _entries(self) -> Tensor:
        pair = self._pair[0]
        with gathered(pair):
            weight = whole(base_weight(pair).detach())
            # in integers, so that every device takes the same entries
            positions = torch.arange(_SAMPLES, device=weight.device) * (weight.numel() - 1) // (_SAMPLES - 1)
            return weight.flatten()[positions].float()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over the offset of a state dict and bring the base to W - X0.

        A state dict that holds the base as well holds it shifted: the base layer, which stands before this module, has
        loaded it. Without it, the base at hand is the pristine one, or the one this module shifted.
        """
        came_along, self.base_comes_along = self.base_comes_along, False
        keys = [prefix + name for name in ("left", "right", "fingerprint")]
        if any(key not in state_dict for key in keys):
            if came_along:
                self.forget()  # the base of a model that tracks no offset is pristine
            super()._load_from_state_dict(state_dict, prefix, *args)  # reports what is missing
            return
        left, right = (state_dict[key].to(self.left) for key in keys[:2])
        fingerprint = state_dict[keys[2]].to(self.left.device)
        if came_along:
            self.left, self.right, self.fingerprint = left, right, fingerprint
            return
        if not self._fits(left, right, fingerprint):
            raise UserError(
                f"the adapter was trained on another base model (the weights of layer {self._pair[0].name} differ): "
                "load it with the base it was trained on"
            )
        if self.left.shape == left.shape and torch.equal(self.left, left) and torch.equal(self.right, right):
            return
        self.remove()
        self.left, self.right, self.fingerprint = left, right, fingerprint
        if self.is_set:
            self._shift(-1.0)

    def _fits(self, left: Tensor, right: Tensor, fingerprint: Tensor) -> bool:
        """Whether an offset belongs to the base at hand; packed integers cannot be told apart, and take none."""
        pair = self._pair[0]
        if is_quantised(pair):
            return left.shape[1] == 0
        pristine = self.fingerprint.float() if self.is_set else self._entries()
        near = (pristine - fingerprint).norm() <= 0.01 * fingerprint.norm()
        return (left.shape[0], right.shape[1]) == pair.shape[:2] and bool(near)


def track_offsets(pairs: list[LoraPair]) -> None:
    """Register an empty `BaseOffset` on every pair's base layer that has none, while the base is still pristine.

    Must come before a checkpoint is loaded: a state dict can only restore the offset of a layer that tracks one.
    """
    for pair in pairs:
        if get_offset(pair) is None:
            base, offset = pair.layer.get_base_layer(), BaseOffset(pair)
            base.add_module(NAME, offset)
            offset.handle = base.register_load_state_dict_pre_hook(_note_base)


def untrack_offsets(model: nn.Module) -> None:
    """Drop every `BaseOffset` of a model, and leave the bases as they are."""
    for module in list(model.modules()):
        offset = getattr(module, NAME, None)
        if isinstance(offset, BaseOffset):
            offset.handle.remove()
            delattr(module, NAME)


def _note_base(base: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Tell the offset whether the base is loaded with it: a module is shown its own part of a state dict only."""
    offset = getattr(base, NAME)
    assert isinstance(offset, BaseOffset)
    offset.base_comes_along = f"{prefix}weight" in state_dict


def get_offset(pair: LoraPair) -> BaseOffset | None:
    """The offset module of a pair's base layer, or None where `track_offsets` was not called."""
    offset = getattr(pair.layer.get_base_layer(), NAME, None)
    return offset if isinstance(offset, BaseOffset) else None


def offset_factors(pair: LoraPair) -> tuple[Tensor, Tensor] | None:
    """The factors (m, k), (k, n) of the X0 that the pair's base is shifted by, or None for a pristine base."""
    offset = get_offset(pair)
    return (offset.left, offset.right) if offset is not None and offset.is_set else None


def check_shiftable(model: nn.Module, pairs: list[LoraPair]) -> None:
    """Refuse bases that cannot take an offset, before anything is done.

    Args:
        model: The model that the pairs were found in, or one around it.
        pairs: The pairs whose bases are to be shifted.

    Raises:
        UserError: If a base is quantised or another layer's too.
    """
    for pair in pairs:
        if is_quantised(pair):
            raise UserError(
                f"the base of layer {pair.name} is quantised and cannot be shifted by a start: use LocallyOptimalInit "
                "with offset 'none', or AdapterInit with LoftQ, which is made for quantised bases"
            )
    for pair in with_shared_base(model, pairs):
        raise UserError(
            f"layer {pair.name} shares its base weight with another layer, so it cannot be shifted for one of them: "
            "leave it out of target_modules, or use a start that leaves the base alone"
        )


def subtract_start(pair: LoraPair) -> None:
    """Shift a tracked base by the factors as they were stored, so that X - X0 is zero to the last bit."""
    offset = get_offset(pair)
    assert offset is not None
    offset.subtract(pair.scaling * matrix(pair.b), matrix(pair.a))
