"""The step on a GPU: all pairs of a rank at once, in place, in one CUDA graph that never waits for the host.

The same mathematics as `two_pass`, with the tall matrices read where they are. It holds between steps in which nothing
was changed from outside: factors then have orthogonal columns of known sizes, so the new momentum N is a weighting of
columns of gradient and old momentum, formed on the fly in both passes, and the Gram matrix of [B N] is all that the
small algebra needs. Whitened pairs need no orthogonal columns: see `whitened_bucket`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rlora.optim.cuda.bucket import Bucket, pinned
from lightning_rlora.optim.cuda.whitened_bucket import WhitenedBucket
from lightning_rlora.optim.groups import HYPERPARAMETERS, PairInGroup, has_units


class Found(NamedTuple):
    """What steps met.

    Attributes:
        nonfinite: A gradient, or a momentum, that is not finite.
        changed: Factors that were changed behind autograd's back; their pairs were left out.
    """

    nonfinite: bool
    changed: bool


class GraphedStep:
    """Steps of an optimizer's pairs.

    Args:
        pairs: All pairs, float32, contiguous, on one CUDA device, with their state.
        groups: The optimizer's parameter groups.
        state: The optimizer's state; its anchors and running norms become views of stacked ones.
        max_tangent_norm: Of the optimizer.

    Attributes:
        found_nonfinite: float32 scalar on the device: 1 after a step that was left out for a gradient that is not
            finite.
        gradient_scale: float32 scalar on the device: factor on the gradients of the last step (clipping).
        other_square: float64 scalar on the device, for the caller to set: the squared norm of all other gradients,
            which are clipped together with the pairs'.
        max_tangent_norm: As given; the graph holds it.
    """

    def __init__(
        self,
        pairs: Iterable[PairInGroup],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        max_tangent_norm: float | None,
    ) -> None:
        self._groups, self._state = groups, state
        self.max_tangent_norm = max_tangent_norm
        buckets: dict[tuple[Any, ...], list[PairInGroup]] = {}
        for pair in pairs:
            key = (len(pair.a), *_kind(pair.group))
            buckets.setdefault(key, []).append(pair)
        self._device = next(iter(buckets.values()))[0].a.device
        with self._on_device():
            # numbers of the groups are kept on the device, so that a schedule changes them without a new graph
            self._numbers: list[list[float]] = []
            self._hyperparameters = torch.zeros(
                len(groups), len(HYPERPARAMETERS), dtype=torch.float64, device=self._device
            )
            self._buckets = [
                (WhitenedBucket if members[0].group["algorithm"] == "whitened" else Bucket)(
                    members, groups, state, self._hyperparameters
                )
                for members in buckets.values()
            ]
            self.other_square = torch.zeros((), dtype=torch.float64, device=self._device)
            self.gradient_scale = torch.ones((), device=self._device)
            self.found_nonfinite = torch.zeros((), device=self._device)
            # Reports to the host, of all steps so far. They are read two steps late, and only when surely there: the
            # host need not wait, and the replicas of a parallel run learn the same at the same step.
            self._reports = torch.zeros(2, device=self._device)
            self._seen = [torch.zeros(2, pin_memory=self._device.type == "cuda") for _ in range(2)]
            self._arrived = [torch.cuda.Event() for _ in range(2)] if self._device.type == "cuda" else []
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._aligned: list[bool] = []
        self._fixed = [_fixed(group) for group in groups]
        self._params = self._params_of_groups()
        self._versions = self._versions_of_factors()

    def found(self, *, all_steps: bool = False) -> Found:
        """What the steps up to the one before the last met, or with `all_steps` (which waits for the device) all."""
        which = (self._steps + 1) % 2 if all_steps else self._steps % 2
        if self._arrived and not self._arrived[which].query():
            self._arrived[which].synchronize()  # only where the host is two steps ahead of the device
        return Found(*map(bool, self._seen[which].tolist()))

    def ready(self) -> bool:
        """Whether every factor is as a step takes it, and stands where the last one left it; waits for the device."""
        with self._on_device():
            return all(bucket.ready() for bucket in self._buckets)

    def unchanged(self) -> bool:
        """Whether all is as the last step left it: groups, state and factors, as far as autograd knows."""
        params = self._params_of_groups()
        return (
            self._fixed == [_fixed(group) for group in self._groups]
            and len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and all(bucket.owns(self._state) for bucket in self._buckets)
            and self._versions == self._versions_of_factors()
        )

    def _params_of_groups(self) -> list[Tensor]:
        return [p for group in self._groups if group["algorithm"] != "adamw" for p in group["params"]]

    def _versions_of_factors(self) -> list[int]:
        factors = [factor for bucket in self._buckets for factor in bucket.factors]
        return [factor._version for factor in factors] + [factor.data_ptr() for factor in factors]

    def step(self) -> None:
        """One step of all pairs that have gradients.

        Raises:
            UserError: If a gradient is not float32.
        """
        with self._on_device():
            for bucket in self._buckets:
                bucket.find_gradients()
            aligned = [bucket.passes.aligned for bucket in self._buckets]
            if aligned != self._aligned:
                self._graph, self._warm, self._aligned = None, False, aligned
            numbers = [[float(number(group)) for number in HYPERPARAMETERS.values()] for group in self._groups]
            if numbers != self._numbers:
                self._hyperparameters.copy_(pinned(numbers, torch.float64, self._device), non_blocking=True)
                self._numbers = numbers
            if self._device.type != "cuda" or not self._warm:
                self._launch()  # compiles the kernels
                self._warm = True
            else:
                if self._graph is None:
                    graph = torch.cuda.CUDAGraph()
                    stream = torch.cuda.Stream(self._device)
                    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        self._launch()
                    self._graph = graph
                self._graph.replay()
            self._seen[self._steps % 2].copy_(self._reports, non_blocking=True)
            if self._arrived:
                self._arrived[self._steps % 2].record()
            self._steps += 1

    def _launch(self) -> None:
        scale = torch.ones((), dtype=torch.float64, device=self._device)
        squares = [self.other_square]
        for bucket in self._buckets:
            bucket.begin()
            if self.max_tangent_norm is not None or bucket.simulates_adam:
                squares.append(bucket.measure_gradient())
        if self.max_tangent_norm is not None:
            scale = (torch.stack(squares).sum().rsqrt() * self.max_tangent_norm).clamp_max(1.0)
        finite = torch.isfinite(self.other_square)
        for bucket in self._buckets:
            finite = finite & bucket.solve(scale)
        changed = torch.zeros_like(finite)
        for bucket in self._buckets:
            changed = changed | bucket.write(finite)
        self.gradient_scale.copy_(scale)
        self.found_nonfinite.copy_(~finite)
        self._reports.copy_(torch.maximum(self._reports, torch.stack([~finite, changed]).float()))

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Triton launches on the current device, which need not be the factors'."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                yield
        else:
            yield


def _kind(group: dict[str, Any]) -> tuple[str, bool]:
    """What pairs of a bucket have in common."""
    return group["algorithm"], group["simulate_adam"]


def _fixed(group: dict[str, Any]) -> tuple[Any, ...]:
    """What of a group's options a graph is made for."""
    return *_kind(group), tuple(group["units"]) if has_units(group) else None
