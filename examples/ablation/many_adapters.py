"""K trainings of LoRA adapters at once on one frozen base: one forward pass of K times the rows.

The base sees the rows of all runs in one batch; beside each linear layer a batched product adds every run's own B A to
its own rows. Runs share nothing else, so the sum of their losses has all their gradients.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from whitened_step import Layer, Method, Sides

from lightning_rlora.data.packing import IGNORED

Batch = dict[str, Tensor]


class Run(NamedTuple):
    """What differs between trainings that run at once."""

    rate: float
    seed: int


class Adapter:
    """K adapters of one linear layer: factors (K, m, r) and (K, n, r), in float32 or, beside such weights, float64."""

    def __init__(self, linear: nn.Linear, runs: int, rank: int) -> None:
        kind = {"dtype": torch.promote_types(linear.weight.dtype, torch.float32), "device": linear.weight.device}
        self.linear = linear
        self.factors = [torch.zeros(runs, rows, rank, requires_grad=True, **kind) for rows in linear.weight.shape]
        self.offset: Sides | None = None

    def add(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The layer's output with every run's B A x, less the part that the run's base was shifted by."""
        rows = inputs[0].reshape(len(self.factors[0]), -1, inputs[0].shape[-1])
        added = rows @ self.factors[1] @ self.factors[0].mT
        if self.offset is not None:
            added = added - rows @ self.offset[1] @ self.offset[0].mT
        return output + added.view_as(output)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All linear layers but the output embedding, as PEFT's all-linear."""
    head = model.get_output_embeddings()
    return {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear) and x is not head}


def described(linears: dict[str, nn.Linear]) -> list[Layer]:
    last = max(1, len(linears) - 1)
    sizes = [linear.weight.double().square().mean().sqrt().item() for linear in linears.values()]
    return [
        Layer(name, *linear.weight.shape, size, place / last)
        for place, ((name, linear), size) in enumerate(zip(linears.items(), sizes, strict=True))
    ]


@contextmanager
def adapted(model: Any, adapters: Sequence[Adapter]) -> Iterator[None]:
    """The model with adapters beside their layers."""
    hooks = [adapter.linear.register_forward_hook(adapter.add) for adapter in adapters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def losses(model: Any, batches: Sequence[Batch]) -> Tensor:
    """The mean loss of each run's labelled tokens, (K,), from a batch of equally many rows each."""
    ids, positions = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "position_ids"))
    with autocast(model):
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        found = []
        for rows, batch in zip(hidden.chunk(len(batches)), batches, strict=True):  # logits of one run at a time
            logits = model.get_output_embeddings()(rows)[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            found.append(nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED))
    return torch.stack(found)


def autocast(model: Any) -> AbstractContextManager:
    """bfloat16 on a GPU; a CPU computes in the weights' own dtype."""
    return torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext()


def weight_gradients(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """The sum over batches of the loss gradient with respect to every linear layer's weight, in float64."""
    weights = [linear.weight for linear in linear_layers(model).values()]
    total = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        for one, gradient in zip(total, torch.autograd.grad(losses(model, [batch])[0], weights), strict=True):
            one += gradient
    for weight in weights:
        weight.requires_grad_(False)
    return total


def started(
    model: Any, method: Method, runs: Sequence[Run], rank: int, batches: dict[int, list[Batch]]
) -> list[Adapter]:
    """The adapters of every layer, all runs of a seed at the same start."""
    linears = linear_layers(model)
    adapters = [Adapter(linear, len(runs), rank) for linear in linears.values()]
    for seed in {run.seed for run in runs}:
        generator = torch.Generator().manual_seed(seed)
        first = batches[seed][: method.start_batches]
        gradients = weight_gradients(model, first) if first else [None] * len(adapters)
        for adapter, layer, gradient in zip(adapters, described(linears), gradients, strict=True):
            start = method.start(layer, rank, generator, gradient)
            with torch.no_grad():
                for factor, x in zip(adapter.factors, start, strict=True):
                    factor[[run.seed == seed for run in runs]] = x.to(factor)
    if method.start_batches:
        for adapter in adapters:
            adapter.offset = [factor.detach().clone() for factor in adapter.factors]
    return adapters


def train(
    model: Any, method: Method, runs: Sequence[Run], rank: int, batches: dict[int, list[Batch]]
) -> tuple[list[Adapter], Tensor]:
    """Train all runs at once, each on its seed's batches, one a step.

    Returns:
        The adapters, and which runs stayed finite, (K,). One that diverged stands still.
    """
    adapters = started(model, method, runs, rank, batches)
    layers = described(linear_layers(model))
    steps = len(batches[runs[0].seed])
    device = model.device
    rates = torch.tensor([run.rate for run in runs], dtype=torch.float64, device=device)
    units = torch.tensor(method.units(layers, rank), dtype=torch.float64, device=device)
    stacks: dict[torch.Size, list[int]] = defaultdict(list)
    for place, adapter in enumerate(adapters):
        stacks[adapter.linear.weight.shape].append(place)
    states: dict[torch.Size, dict] = {shape: {} for shape in stacks}
    finite = torch.ones(len(runs), dtype=torch.bool, device=device)
    for step in range(steps):
        with adapted(model, adapters):
            found = losses(model, [batches[run.seed][step] for run in runs])
        factors = [factor for adapter in adapters for factor in adapter.factors]
        gradients = torch.autograd.grad(found.sum(), factors)
        finite &= found.detach().isfinite()
        for gradient in gradients:
            finite &= gradient.isfinite().all(2).all(1)
        rate = rates * method.multiplier(step, steps)
        with torch.no_grad():
            for shape, places in stacks.items():
                old = [torch.cat([adapters[place].factors[side] for place in places]) for side in (0, 1)]
                whole = [torch.cat([gradients[2 * place + side] for place in places]) for side in (0, 1)]
                alive = finite.repeat(len(places))[:, None, None]
                new = method.step(
                    old,
                    [torch.where(alive, gradient, 0) for gradient in whole],
                    states[shape],
                    rate.repeat(len(places))[:, None, None],
                    units[places].repeat_interleave(len(runs))[:, None, None],
                    step / steps,
                )
                for side in (0, 1):
                    moved = torch.where(alive, new[side].to(old[side]), old[side]).split(len(runs))
                    for place, factor in zip(places, moved, strict=True):
                        adapters[place].factors[side].copy_(factor)
    return adapters, finite


@torch.no_grad()
def validation_losses(model: Any, adapters: Sequence[Adapter], batches: Sequence[Batch]) -> Tensor:
    """The mean loss per labelled token of every run over the same batches, (K,)."""
    runs = len(adapters[0].factors[0])
    tokens = torch.tensor([int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]).to(model.device)
    with adapted(model, adapters):
        found = torch.stack([losses(model, [batch] * runs) for batch in batches])
    return (found * tokens[:, None]).sum(0) / tokens.sum()
