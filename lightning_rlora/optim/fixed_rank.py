"""The optimizer object behind Riemannion and RiemannianSGD: groups, state, and which step to take."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlora.adapters import base_size, scan
from lightning_rlora.adapters.gauge import start_factors
from lightning_rlora.errors import Diverged, UserError
from lightning_rlora.optim.adamw import adamw_step
from lightning_rlora.optim.anchors import sketch_rows
from lightning_rlora.optim.batched import Batch
from lightning_rlora.optim.cuda.eligible import can_be_graphed
from lightning_rlora.optim.groups import (
    PairInGroup,
    check_full_rank,
    groups_with_pairs,
    has_units,
    pairs_in_group,
    pairs_of_new_group,
)
from lightning_rlora.optim.precision import full_precision
from lightning_rlora.optim.whitened_batch import WhitenedBatch

if TYPE_CHECKING:
    from lightning_rlora.optim.cuda.graphed import GraphedStep

_NOT_FINITE = "the gradient is not finite: lower the learning rate, clip it, or look for bad input data"

ALGORITHMS = ("riemannion", "whitened", "sgd", "adamw")


class FixedRankOptimizer(Optimizer):
    """One optimizer object for LoRA pairs on the manifold and for everything else that trains.

    Groups with `algorithm` riemannion, whitened or sgd hold pairs of factors, `params` = A, B, A, B, ..., and their
    `scaling` c, with `relative` rates also the pairs' `units` that `measure_base` fills in; groups with `algorithm`
    adamw hold anything. State, beside each factor and of its shape, is the momentum's tangent factor, half of what
    AdamW keeps, and `anchor`, a small sketch of what it refers to: where the factors are changed from outside between
    two steps (loaded, merged, re-factored), the momentum is carried to the new ones if they span the same spaces, and
    forgotten if they do not.

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

    _graphed: GraphedStep | None = None  # the fast step on a GPU; a copy makes its own

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
            UserError: If the model has no LoRA pairs to train.
        """
        optimizer = cls(groups_with_pairs(model), **options)
        optimizer.measure_base(model)
        return optimizer

    def measure_base(self, model: nn.Module) -> None:
        """Take the sizes of the base weights as units of the rates of groups that have `relative`.

        Args:
            model: The model whose pairs are in the groups, or a module that contains it.

        Raises:
            UserError: If a group has pairs that the model does not train.
        """
        groups = [group for group in self.param_groups if has_units(group)]
        if not groups:
            return
        pairs = {pair.a: pair for pair in scan(model).pairs}
        for group in groups:
            found = [pairs.get(a) for a in group["params"][::2]]
            if None in found:
                raise UserError("relative rates need the model whose pairs the optimizer has, and this is another one")
            # an orthogonalised momentum has 2r singular values of one, or as many as fit
            group["units"] = [base_size(p) / min(2 * p.shape[2], *p.shape[:2]) ** 0.5 for p in found if p is not None]
        self._drop_graphed()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; zero factors in it get a tiny start on the manifold, which keeps the function to rounding."""
        self._drop_graphed()
        pairs = pairs_of_new_group(param_group, self, ALGORITHMS, self._adamw_lr)
        check_full_rank(pairs, type(self).__name__)
        for a, b in pairs:
            with torch.no_grad():
                start_factors(b, a, param_group.get("scaling", 1.0), self._generator)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it, with what the fast step keeps in stacks in tensors of their own."""
        packed = super().state_dict()
        stacked = ("anchor", "norm", "step")
        packed["state"] = {
            index: {name: value.clone() if name in stacked else value for name, value in entry.items()}
            for index, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this kind for an adapter of the same shapes.

        Raises:
            UserError: If it is another optimizer's, or another adapter's.
        """
        if any("algorithm" not in group for group in state_dict["param_groups"]):
            raise UserError(f"this is the state of another optimizer than {type(self).__name__}")
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if saved["algorithm"] != group["algorithm"]:
                raise UserError(
                    f"this is the state of another optimizer than {type(self).__name__}: a group's algorithm is "
                    f"{saved['algorithm']} there and {group['algorithm']} here"
                )
            for index, parameter in zip(saved["params"], group["params"], strict=False):
                entry = state_dict["state"].get(index, {})
                if entry.get("momentum", parameter).shape != parameter.shape:
                    raise UserError("this is the state of an optimizer for an adapter of another rank or other layers")
                rank = entry["anchor"].shape[-1] if "anchor" in entry else 0
                if rank and len(entry["anchor"]) != sketch_rows(rank):
                    raise UserError("this is the state of an earlier version's optimizer, which cannot be continued")
        super().load_state_dict(state_dict)
        self._graphed = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group.

        Args:
            closure: Re-evaluates the loss and its gradients; run first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            Diverged: If the gradient is not finite. Nothing has been changed then. On a GPU, which is not waited for,
                the error comes with a later step; the one with that gradient changes nothing there, either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            if not self._step_graphed():
                self._step_batched()
        return loss

    def _step_batched(self) -> None:
        """The step in plain torch."""
        pairs = self._pairs_with_gradients()
        together = self._batches(pairs)
        restarted = {id(pair.a) for batch in together for pair in batch.lost() if self._restarted(pair)}
        if restarted:
            together = self._batches([pair for pair in pairs if id(pair.a) not in restarted])
        scale = self._gradient_scale(together)
        if not all(batch.accelerate(scale) for batch in together):
            raise Diverged(_NOT_FINITE)
        for batch in together:
            batch.write()
        for group in self._adamw_groups():
            adamw_step(group, self.state, scale)

    def _batches(self, pairs: list[PairInGroup]) -> list[Batch]:
        """Pairs with gradients and state, in batches that step together."""
        alike: dict[Hashable, list[PairInGroup]] = defaultdict(list)
        for pair in pairs:
            a, _, group, _ = pair
            options = (group["simulate_adam"], group.get("curvature_decay"), group.get("curvature_floor"))
            alike[len(a), a.dtype, a.device, group["algorithm"], options].append(pair)
        return [
            (WhitenedBatch if members[0].group["algorithm"] == "whitened" else Batch)(members, self.state)
            for members in alike.values()
        ]

    def _step_graphed(self) -> bool:
        """The step on a GPU without waiting for it; false, with nothing done, where that cannot be."""
        if self._graphed is not None:
            same = self._graphed.max_tangent_norm == self.max_tangent_norm and self._graphed.unchanged()
            found = self._graphed.found()
            if found.nonfinite or found.changed or not same:
                self._drop_graphed()
                return False  # the plain step knows how to take up what was changed
        else:
            self._graphed = self._new_graphed()
        graphed = self._graphed
        if graphed is None:
            return False
        gradients = [p.grad for group in self._adamw_groups() for p in group["params"] if p.grad is not None]
        graphed.other_square.zero_()
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float64)
            graphed.other_square.copy_(torch.stack(norms).square().sum())
        graphed.step()
        scale = 1.0 if self.max_tangent_norm is None else graphed.gradient_scale
        for group in self._adamw_groups():
            adamw_step(group, self.state, scale, graphed.found_nonfinite)
        return True

    def _drop_graphed(self) -> None:
        """Ends the fast step, and hears what it has not told yet."""
        graphed, self._graphed = self._graphed, None
        if graphed is not None and graphed.found(all_steps=True).nonfinite:
            raise Diverged(f"{_NOT_FINITE} (at an earlier step, which changed nothing)")

    def _new_graphed(self) -> GraphedStep | None:
        """The fast step, if all pairs are on one GPU, in float32, and on the manifold as steps leave them."""
        pairs = self._all_pairs()
        factors = [factor for pair in pairs for factor in (pair.a, pair.b)]
        if not can_be_graphed(factors):
            return None
        if any(p.device != factors[0].device for group in self._adamw_groups() for p in group["params"]):
            return None
        for pair in pairs:
            self._init_state(pair)
        kept = [self.state[factor].get(name) for factor in factors for name in ("momentum", "curvature")]
        if not can_be_graphed([tensor for tensor in kept if tensor is not None]):
            return None
        from lightning_rlora.optim.cuda.graphed import GraphedStep

        graphed = GraphedStep(pairs, self.param_groups, self.state, self.max_tangent_norm)
        return graphed if graphed.ready() else None

    def _adamw_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == "adamw"]

    def _all_pairs(self) -> list[PairInGroup]:
        return [pair for group in self.param_groups if group["algorithm"] != "adamw" for pair in pairs_in_group(group)]

    def _pairs_with_gradients(self) -> list[PairInGroup]:
        found = [pair for pair in self._all_pairs() if pair.a.grad is not None and pair.b.grad is not None]
        for pair in found:
            self._init_state(pair)
        return found

    def _restarted(self, pair: PairInGroup) -> bool:
        """Whether a factor was reset to zero from outside; the pair gets its start then, and skips this step."""
        return start_factors(pair.b, pair.a, pair.group["scaling"], self._generator)

    def _init_state(self, pair: PairInGroup) -> None:
        a, b, group, _ = pair
        for factor in (a, b):
            state = self.state[factor]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(factor)
                state["anchor"] = factor.new_zeros(sketch_rows(len(a)), len(a))
            if group["algorithm"] == "whitened" and "curvature" not in state:
                state["curvature"] = factor.new_zeros(factor.numel() // len(a))
            if group["algorithm"] == "sgd" and group["simulate_adam"] and "norm" not in state:
                state["norm"] = factor.new_zeros(())
                state["step"] = torch.zeros(())

    def _gradient_scale(self, together: list[Batch]) -> float:
        """The factor that clips the gradient of all groups together."""
        squares = []
        for group in self._adamw_groups():
            squares += [p.grad.double().square().sum() for p in group["params"] if p.grad is not None]
        if self.max_tangent_norm is not None:
            squares += [batch.gradient_square() for batch in together]
        norm = math.sqrt(sum(square.item() for square in squares))
        if not math.isfinite(norm):
            raise Diverged(_NOT_FINITE)
        if self.max_tangent_norm is None or norm <= self.max_tangent_norm:
            return 1.0
        return self.max_tangent_norm / norm
