"""The optimizer object behind the methods that move the factors A and B as they are: groups, state, batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlora.errors import Diverged, UserError
from lightning_rlora.optim.adamw import adamw_step
from lightning_rlora.optim.groups import check_full_rank, groups_with_pairs, pairs_of_new_group

LARGEST_STACK = 2**23
"""Entries of all factors that step together, 64 MB in float64: a step has some ten times as much alive, and all pairs
of a model of 8 billion parameters would take gigabytes."""


class Side(NamedTuple):
    """One factor of pairs of one shape, as tall matrices: B (L, m, r), or A transposed (L, n, r).

    So every rule for B, given A, is a rule for A, given B. All tensors are float64.

    Attributes:
        value: The factors, (L, k, r).
        grad: The loss gradients with respect to them.
        state: What the method keeps of each factor between steps; tensors (L, ...).
    """

    value: Tensor
    grad: Tensor
    state: dict[str, Tensor]


class PerPairOptimizer(Optimizer):
    """One optimizer object for LoRA pairs, moved by a method of its own, and AdamW for everything else that trains.

    Pairs of one rank step together, as many as `LARGEST_STACK` allows, in float64 whatever surrounds the step: those of
    one shape as one stack, and all stacks in step, so that their r x r eigenproblems are solved in one call. A subclass
    says what it keeps of a factor (`start`) and how pairs move (`update`, a pure function behind it). A factor of
    zeros, as PEFT starts B with, is a factor like any other.

    Args:
        params: Parameter groups; `parameter_groups(model)` makes them, `for_model` does both. Groups hold pairs,
            `params` = A, B, A, B, ... and their `scaling`, or anything, with `algorithm` adamw.
        defaults: Options of the groups.
        adamw_lr: Learning rate of AdamW groups that bring none.

    Raises:
        UserError: If a group's parameters are not pairs of factors, are not float32 or float64, or are sharded; if the
            rank is more than the method can do, or an option out of its range.
    """

    needs_full_rank: ClassVar[bool] = False
    """Whether the method has no step for ranks above min(m, n), where Gram matrices of factors are singular."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any], *, adamw_lr: float
    ) -> None:
        self._adamw_lr = adamw_lr
        own = {"scaling": 1.0, "algorithm": type(self).__name__.lower(), "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(params, own | defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs beyond groups and state, which is all that torch's optimizers copy."""
        return super().__getstate__() | {"_adamw_lr": self._adamw_lr}

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of everything that trains in an adapted model.

        Args:
            model: A model that PEFT adapted, or a module that contains one.
            options: The constructor's options (lr, weight_decay, ...).

        Raises:
            UserError: If the model has no LoRA pairs to train.
        """
        return cls(groups_with_pairs(model), **options)

    def start(self, factor: Tensor) -> dict[str, Tensor]:
        """The state of a tall factor (k, r) before its first step; what has two dimensions is laid out like it.

        An entry is not to be called `step`: on loading, torch leaves one of that name on the CPU.
        """
        raise NotImplementedError

    def start_a(self, factor: Tensor) -> dict[str, Tensor]:
        """The same of A, transposed: what `start` says unless a method treats A in another way."""
        return self.start(factor)

    def update(self, sides: list[Side], group: dict[str, Any]) -> list[Side]:
        """The sides, B, A, B, A, ... of one rank, with values and states after one step.

        A side that rests is returned itself.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of pairs or an AdamW group."""
        name = type(self).__name__
        pairs = pairs_of_new_group(param_group, self, (self.defaults["algorithm"], "adamw"), self._adamw_lr)
        if self.needs_full_rank:
            check_full_rank(pairs, name)
        options = self.defaults | param_group
        if not options["lr"] * options["weight_decay"] < 1:
            raise UserError(
                f"lr * weight_decay of {name} is {options['lr'] * options['weight_decay']}: keep it below 1"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this kind for an adapter of the same shapes.

        Raises:
            UserError: If it is another optimizer's, or another adapter's.
        """
        for saved in state_dict["param_groups"]:
            if saved.get("algorithm") not in ("adamw", self.defaults["algorithm"]):
                raise UserError(f"this is the state of another optimizer than {type(self).__name__}")
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if group["algorithm"] == "adamw":
                continue
            for i, (index, factor) in enumerate(zip(saved["params"], group["params"], strict=False)):
                entry = state_dict["state"].get(index, {})
                expected = self._start(factor, transposed=i % 2 == 0)
                if entry and {k: v.shape for k, v in entry.items()} != {k: v.shape for k, v in expected.items()}:
                    raise UserError(
                        "this is the state of an optimizer for an adapter of another rank or other layers, or of an "
                        "earlier version's"
                    )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group.

        Args:
            closure: Re-evaluates the loss and its gradients; run first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            Diverged: If the gradient is not finite. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not _all_finite([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]):
            raise Diverged("the gradient is not finite: lower the learning rate, clip it, or look for bad input data")
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                adamw_step(group, self.state, 1.0)
                continue
            for stacks in _together(_alike(group["params"])):
                # B and A of each stack of pairs, in turn
                factors = [[pair[i] for pair in pairs] for pairs in stacks for i in (1, 0)]
                sides = [self._side(some, transposed=i % 2 == 1) for i, some in enumerate(factors)]
                for i, (side, new) in enumerate(zip(sides, self.update(sides, group), strict=True)):
                    if new is not side:
                        self._write(factors[i], new, transposed=i % 2 == 1)
        return loss

    def _start(self, factor: Tensor, transposed: bool) -> dict[str, Tensor]:
        start = self.start_a if transposed else self.start
        state = start(_turned(factor.detach().flatten(1), transposed))
        return {name: _turned(value, transposed).contiguous() for name, value in state.items()}

    def _side(self, factors: list[Tensor], transposed: bool = False) -> Side:
        for factor in factors:
            if not self.state[factor]:
                self.state[factor] = self._start(factor, transposed)

        def stacked(tensors: list[Tensor]) -> Tensor:
            stack = torch.stack(tensors).double()
            return _turned(stack.flatten(2) if stack.ndim > 2 else stack, transposed, batched=True)

        state = {name: stacked([self.state[p][name] for p in factors]) for name in self.state[factors[0]]}
        return Side(stacked(factors), stacked([p.grad for p in factors if p.grad is not None]), state)

    def _write(self, factors: list[Tensor], side: Side, transposed: bool = False) -> None:
        for name, stack in side.state.items():
            _copy([self.state[p][name] for p in factors], _turned(stack, transposed, batched=True))
        _copy(factors, _turned(side.value, transposed, batched=True))


def others(sides: list[Side]) -> list[Side]:
    """Of each side, B, A, B, A, ..., the other one of its pairs."""
    return [sides[i ^ 1] for i in range(len(sides))]


def in_weight_units(step: Callable[..., list[Side]], sides: list[Side], scaling: float, **numbers: Any) -> list[Side]:
    """A step for W + B A where the layer is W + c B A: each factor takes a square root of c with it.

    Learning rates then count in the weight itself, and do not depend on lora_alpha.
    """
    root = scaling**0.5
    sides = step([Side(side.value * root, side.grad / root, side.state) for side in sides], **numbers)
    return [side._replace(value=side.value / root) for side in sides]


def _alike(params: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """The pairs (A, B) that have gradients: those of one shape, dtype and device, up to `LARGEST_STACK`, together."""
    found: dict[Hashable, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for a, b in zip(params[::2], params[1::2], strict=True):
        if a.grad is not None and b.grad is not None:
            found[a.shape, b.shape, a.dtype, a.device].append((a, b))
    batches = []
    for pairs in found.values():
        at_once = max(1, LARGEST_STACK // max(factor.numel() for factor in pairs[0]))
        batches += [pairs[i : i + at_once] for i in range(0, len(pairs), at_once)]
    return batches


def _together(stacks: list[list[tuple[Tensor, Tensor]]]) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """Stacks of pairs that step in one call: of one rank, dtype and device, up to `LARGEST_STACK` entries in all."""
    found: dict[Hashable, list[list[list[tuple[Tensor, Tensor]]]]] = defaultdict(lambda: [[]])
    room: dict[Hashable, int] = defaultdict(lambda: LARGEST_STACK)
    for pairs in stacks:
        a = pairs[0][0]
        key, entries = (len(a), a.dtype, a.device), len(pairs) * max(factor.numel() for factor in pairs[0])
        if found[key][-1] and entries > room[key]:
            found[key].append([])
            room[key] = LARGEST_STACK
        found[key][-1].append(pairs)
        room[key] -= entries
    return [together for of_kind in found.values() for together in of_kind]


def _turned(x: Tensor, transposed: bool, batched: bool = False) -> Tensor:
    """Matrices between their own layout and the tall one; vectors and numbers have only one."""
    return x.mT if transposed and x.ndim == 2 + batched else x


def _copy(to: list[Tensor], stack: Tensor) -> None:
    torch._foreach_copy_(to, [new.reshape(old.shape) for old, new in zip(to, stack.unbind(), strict=True)])


def _all_finite(gradients: list[Tensor]) -> bool:
    """Whether all entries are finite; each device is waited for once."""
    devices: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        devices[gradient.device].append(gradient)
    # the largest entry, since a sum of squares may overflow
    return all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(some, torch.inf, torch.float64))).all())
        for some in devices.values()
    )
