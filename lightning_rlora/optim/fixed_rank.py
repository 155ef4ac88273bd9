"""The optimizer object behind Riemannion and RiemannianSGD: groups, state and the batches of the two-pass step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlora.adapters.gauge import start_factors
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import RANK_TOLERANCE
from lightning_rlora.optim.adamw import adamw_step
from lightning_rlora.optim.groups import parameter_groups
from lightning_rlora.optim.two_pass import (
    Direction,
    Factors,
    Measured,
    advance,
    measure,
    orthogonal_direction,
    scaled_direction,
)

ALGORITHMS = ("riemannion", "sgd", "adamw")

_MOVED = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative change of the anchors that means a change from outside; rounding moves them by 1e-6 and 1e-15."""


class Batch(NamedTuple):
    """Pairs of one group and shape, stacked, after the first pass."""

    group: dict[str, Any]
    pairs: list[tuple[Tensor, Tensor]]
    left: Factors
    right: Factors
    measured: Measured


class FixedRankOptimizer(Optimizer):
    """One optimizer object for LoRA pairs on the manifold and for everything else that trains.

    Groups with `algorithm` riemannion or sgd hold pairs of factors, `params` = A, B, A, B, ..., and their `scaling` c;
    groups with `algorithm` adamw hold anything. State, beside each factor and of its shape, is the momentum's tangent
    factor, half of what AdamW keeps, and `anchor`, a small sketch of the orthonormal basis it refers to: where the
    factors are changed from outside between two steps (loaded, merged, re-factored), the momentum is carried to the new
    bases if they span the same spaces, and forgotten if they do not.

    Args:
        params: Parameter groups; `parameter_groups(model)` makes them, `for_model` does both.
        defaults: Options of the groups.
        max_tangent_norm: Clip the gradient, taken as tangent vectors and the plain gradients of the AdamW group
            together, to this Frobenius norm. Unlike the norm of the factor gradients it does not depend on how X is
            factored.
        adamw_lr: Learning rate of AdamW groups that bring none.

    Raises:
        UserError: If a group's parameters are not pairs of factors, or are not float32 or float64.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        max_tangent_norm: float | None = None,
        adamw_lr: float = 1e-4,
    ) -> None:
        if max_tangent_norm is not None and not max_tangent_norm > 0:
            raise UserError(f"max_tangent_norm = {max_tangent_norm} must be positive; leave it out for no clipping")
        self.max_tangent_norm = max_tangent_norm
        self._adamw_lr = adamw_lr
        self._generator = torch.Generator().manual_seed(0)  # of the random factors that replace zero ones
        super().__init__(
            params, {"scaling": 1.0, "simulate_adam": False, "betas": (0.9, 0.999), "eps": 1e-8} | defaults
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs beyond groups and state, which is all that torch's optimizers copy."""
        own = ("max_tangent_norm", "_adamw_lr", "_generator")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of everything that trains in an adapted model.

        Args:
            model: A model that PEFT adapted, or a module that contains one.
            options: The constructor's options (lr, momentum, weight_decay, max_tangent_norm, ...).

        Raises:
            UserError: If nothing in the model is trainable.
        """
        return cls(parameter_groups(model), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; zero factors in it get a tiny start on the manifold, which keeps the function to rounding."""
        algorithm = param_group.get("algorithm", self.defaults["algorithm"])
        if algorithm not in ALGORITHMS:
            raise UserError(f"unknown algorithm {algorithm!r} of a parameter group: use one of {', '.join(ALGORITHMS)}")
        if algorithm == "adamw":
            param_group.setdefault("lr", self._adamw_lr)
        _check_options(self.defaults | param_group, type(self).__name__)
        if algorithm != "adamw":
            param_group["params"] = list(param_group["params"])
            if len(param_group["params"]) % 2:
                raise UserError(
                    f"a group of LoRA pairs holds {len(param_group['params'])} parameters, an odd number: give them as "
                    "A, B, A, B, ..., or the group algorithm='adamw'"
                )
            scaling = param_group.get("scaling", 1.0)
            for a, b in _pairs(param_group["params"]):
                _check_pair(a, b, scaling)
                with torch.no_grad():
                    start_factors(b, a, scaling, self._generator)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this kind for an adapter of the same shapes.

        Raises:
            UserError: If it is another optimizer's, or another adapter's.
        """
        if any("algorithm" not in group for group in state_dict["param_groups"]):
            raise UserError(f"this is the state of another optimizer than {type(self).__name__}")
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for index, parameter in zip(saved["params"], group["params"], strict=False):
                momentum = state_dict["state"].get(index, {}).get("momentum", parameter)
                if momentum.shape != parameter.shape:
                    raise UserError("this is the state of an optimizer for an adapter of another rank or other layers")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group.

        Args:
            closure: Re-evaluates the loss and its gradients; run first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            UserError: If the gradient is not finite. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _full_precision():
            batches = [batch for group in self.param_groups for batch in self._measured(group)]
            scale = self._gradient_scale(batches)
            for batch in batches:
                self._advance(batch, scale)
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                adamw_step(group, self.state, scale)
        return loss

    def _measured(self, group: dict[str, Any]) -> Iterator[Batch]:
        """The pairs of a group that have gradients, batched by shape, after the first pass."""
        if group["algorithm"] == "adamw":
            return
        buckets: dict[Hashable, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for a, b in _pairs(group["params"]):
            if a.grad is not None and b.grad is not None:
                self._init_state(group, a, b)
                buckets[(len(b), a[0].numel(), len(a), a.dtype, a.device)].append((a, b))
        for pairs in buckets.values():
            left = Factors(
                *(_stack(part) for part in zip(*((b, b.grad, self._momentum(b)) for _, b in pairs), strict=True))
            )
            right = Factors(
                *(_stack(part).mT for part in zip(*((a, a.grad, self._momentum(a)) for a, _ in pairs), strict=True))
            )
            measured = measure(left, right, group["scaling"])
            if not bool(torch.isfinite(measured.tangent_norm).all()) and self._restarted(pairs, group["scaling"]):
                continue
            yield Batch(group, pairs, left, right, measured)

    def _restarted(self, pairs: list[tuple[Tensor, Tensor]], scaling: float) -> bool:
        """Whether factors were reset to zero from outside; they get their start then, and the pairs skip this step."""
        return sum(start_factors(b, a, scaling, self._generator) for a, b in pairs) > 0

    def _momentum(self, factor: Tensor) -> Tensor:
        return self.state[factor]["momentum"]

    def _init_state(self, group: dict[str, Any], a: Tensor, b: Tensor) -> None:
        for factor, rows in ((a, a[0].numel()), (b, len(b))):
            state = self.state[factor]
            if not state:
                state["momentum"] = torch.zeros_like(factor)
                state["anchor"] = factor.new_zeros(min(rows, 2 * len(a)), len(a))
                if group["algorithm"] == "sgd" and group["simulate_adam"]:
                    state["norm"] = factor.new_zeros(())
                    state["step"] = torch.zeros(())

    def _gradient_scale(self, batches: list[Batch]) -> float:
        """The factor that clips the gradient of all groups together."""
        squares = [batch.measured.tangent_norm.square().sum() for batch in batches]
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                squares += [p.grad.double().square().sum() for p in group["params"] if p.grad is not None]
        norm = math.sqrt(sum(square.item() for square in squares))
        if not math.isfinite(norm):
            raise UserError("the gradient is not finite: lower the learning rate, clip it, or look for bad input data")
        if self.max_tangent_norm is None or norm <= self.max_tangent_norm:
            return 1.0
        return self.max_tangent_norm / norm

    def _advance(self, batch: Batch, scale: float) -> None:
        """The second pass of a batch, and its new factors and state written back."""
        group, measured = batch.group, batch.measured
        turn_left, turn_right = self._turns(batch)
        new_left, new_right, new_velocity_left, new_velocity_right, root = advance(
            batch.left,
            batch.right,
            measured,
            scaling=group["scaling"],
            direction=self._direction(batch, scale),
            lr=float(group["lr"]),
            momentum=group["momentum"],
            gradient_weight=scale * (1.0 if group["algorithm"] == "riemannion" else 1.0 - group["momentum"]),
            weight_decay=group["weight_decay"],
            turn_left=turn_left,
            turn_right=turn_right,
            min_singular_value=group["min_singular_value"],
        )
        anchors = [_sketch(new) / root.to(new.dtype) for new in (new_left, new_right)]
        for i, (a, b) in enumerate(batch.pairs):
            b.copy_(new_left[i].reshape(b.shape))
            a.copy_(new_right[i].mT.reshape(a.shape))
            self.state[b]["momentum"].copy_(new_velocity_left[i].reshape(b.shape))
            self.state[a]["momentum"].copy_(new_velocity_right[i].mT.reshape(a.shape))
            self.state[b]["anchor"].copy_(anchors[0][i])
            self.state[a]["anchor"].copy_(anchors[1][i])

    def _turns(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """How the bases turned since the last step, if the factors were changed from outside (else None)."""
        turns = []
        for tall, inverse, which in (
            (batch.left.factor, batch.measured.left.inverse, 1),
            (batch.right.factor, batch.measured.right.inverse, 0),
        ):
            sketch = _sketch(tall).double() @ inverse
            anchors = torch.stack([self.state[pair[which]]["anchor"] for pair in batch.pairs]).double()
            turns.append(_turn(sketch, anchors, _MOVED[tall.dtype]))
        if turns[0] is None and turns[1] is None:
            return None, None
        eye = torch.eye(batch.left.factor.shape[-1], dtype=torch.float64, device=batch.left.factor.device)
        left, right = (eye.expand(len(batch.pairs), -1, -1) if turn is None else turn for turn in turns)
        # where one basis is lost, so is the point that the momentum belonged to
        known = (left.abs().amax((1, 2)) > 0) & (right.abs().amax((1, 2)) > 0)
        return left * known[:, None, None], right * known[:, None, None]

    def _direction(self, batch: Batch, scale: float) -> Direction:
        """What the batch's algorithm makes of the momentum."""
        group = batch.group
        if group["algorithm"] == "riemannion":
            return orthogonal_direction(RANK_TOLERANCE[batch.left.factor.dtype])
        if not group["simulate_adam"]:
            return lambda core: core
        beta = group["betas"][1]
        averages = []
        for which, norms in ((0, batch.measured.norm_b), (1, batch.measured.norm_a)):
            states = [self.state[pair[which]] for pair in batch.pairs]
            for state, norm in zip(states, norms * scale, strict=True):
                state["norm"].lerp_(norm.to(state["norm"].dtype), 1 - beta)
                state["step"] += 1
            # averages that start at zero are too small by 1 - beta^steps
            averages.append(torch.stack([s["norm"].double() / (1 - beta ** s["step"].item()) for s in states]))
        return scaled_direction(norm_a=averages[1], norm_b=averages[0], eps=group["eps"])


def _pairs(params: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(params[::2], params[1::2], strict=True)


def _stack(factors: Iterable[Tensor]) -> Tensor:
    return torch.stack([factor.flatten(1) for factor in factors])


def _sketch(tall: Tensor) -> Tensor:
    """At most 2r sums of every 2r-th row of tall matrices (L, rows, r).

    Single rows would not do: an embedding's start from gradients is zero in the rows of all tokens not seen.
    """
    rows, r = tall.shape[1:]
    k = min(rows, 2 * r)
    whole = rows // k * k
    sums = tall[:, :whole].unflatten(1, (-1, k)).sum(1)
    sums[:, : rows - whole] += tall[:, whole:]
    return sums


def _turn(sketch: Tensor, anchors: Tensor, moved: float) -> Tensor | None:
    """The old bases in the new ones, U^T U_old, (L, r, r), from a sketch of both; None if no basis moved.

    Identity where a basis did not move, zero where it does not span the old space any more.
    """
    change = (sketch - anchors).flatten(1).norm(dim=1)
    size = anchors.flatten(1).norm(dim=1)
    still = change <= moved * size
    if bool(still.all()):
        return None
    eye = torch.eye(sketch.shape[-1], dtype=sketch.dtype, device=sketch.device)
    turn = torch.linalg.pinv(sketch) @ anchors
    same_span = (sketch @ turn - anchors).flatten(1).norm(dim=1) <= 1e-2 * size
    rotation = (turn.mT @ turn - eye).flatten(1).norm(dim=1) <= 1e-2
    turn = torch.where((same_span & rotation)[:, None, None], turn, 0)
    return torch.where(still[:, None, None], eye, turn)


def _check_options(options: dict[str, Any], optimizer: str) -> None:
    for name in ("lr", "weight_decay", "momentum"):
        if not options[name] >= 0:
            raise UserError(f"{name} = {options[name]} of {optimizer} must not be negative")
    if not options["min_singular_value"] > 0:
        value = options["min_singular_value"]
        raise UserError(f"min_singular_value = {value} of {optimizer} must be positive: points have full rank")
    if options["momentum"] >= 1:
        raise UserError(f"momentum = {options['momentum']} of {optimizer} must be below 1")


def _check_pair(a: Tensor, b: Tensor, scaling: float) -> None:
    if a.ndim < 2 or b.ndim < 2 or b[0].numel() != len(a):
        raise UserError(
            f"parameters of shapes {tuple(a.shape)} and {tuple(b.shape)} are no LoRA pair: give the factors as A, B, "
            "A, B, ... with A (r, n) and B (m, r), or the group algorithm='adamw'"
        )
    if len(a) > min(len(b), a[0].numel()):
        raise UserError(f"rank {len(a)} exceeds min(m, n) = {min(len(b), a[0].numel())} of a LoRA pair: lower the rank")
    for factor in (a, b):
        if factor.dtype not in RANK_TOLERANCE:
            raise UserError(
                f"LoRA factors are {factor.dtype}, too coarse for points of the manifold: keep them in float32, with "
                "precision bf16-mixed or 16-mixed instead of bf16-true or 16-true"
            )
    if not scaling > 0:
        raise UserError(f"the scaling {scaling} of a LoRA group must be positive")


@contextmanager
def _full_precision() -> Iterator[None]:
    """No autocast and no TF32: factors must keep the digits of their dtype."""
    # read a backend at a time: torch.get_float32_matmul_precision raises where these newer switches were used
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
