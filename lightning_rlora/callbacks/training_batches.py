"""Running the loss on the first training batches before the first step, without a trace in the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_rlora.errors import UserError

Loss = Callable[[LightningModule, Any], Tensor]
"""The loss of one batch, differentiable."""


def training_step_loss(module: LightningModule) -> Loss:
    """The loss of `training_step`, for automatic optimization only."""
    if not module.automatic_optimization:
        raise UserError(
            "an initialisation cannot take the loss from a training_step with manual optimization: give it "
            "loss=lambda module, batch: ..."
        )

    # Lightning lets a training_step do without batch_idx
    arguments = (0,) if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else ()

    def loss(module: LightningModule, batch: Any) -> Tensor:
        output = module.training_step(batch, *arguments)
        value = output["loss"] if isinstance(output, dict) else output
        if not isinstance(value, Tensor):
            raise UserError("an initialisation needs a training_step that returns its loss, or a function `loss`")
        return value

    return loss


def first_batches(trainer: Trainer, module: LightningModule, count: int) -> list[Any]:
    """The first batches of the training data as a training step sees them, with the data order left undisturbed."""
    combined = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # one of our own: the trainer's is under way
    with isolate_rng(), _isolated_generators(combined.flattened):
        batches = [batch for batch, _, _ in itertools.islice(iter(combined), count)]
    if not batches:
        raise UserError("an initialisation found no training batch")
    for i, batch in enumerate(batches):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batches[i] = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return batches


@contextmanager
def _isolated_generators(loaders: list[Any]) -> Iterator[None]:
    """Put back the loaders' own generators, from which walking over them draws."""
    holders = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    holders += [*loaders, *(getattr(holder, "sampler", None) for holder in holders)]
    found = {id(g): g for g in (getattr(x, "generator", None) for x in holders) if isinstance(g, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def precision(trainer: Trainer) -> Any:
    """The trainer's forward context; bfloat16 in place of float16, whose gradients would need a scale."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        return torch.autocast(trainer.strategy.root_device.type, torch.bfloat16)
    return plugin.forward_context()


@contextmanager
def quiet(module: LightningModule) -> Iterator[None]:
    """Dropout off, logging silenced, nothing compiled; gradient checkpointing, tied to training mode, stays on."""
    training = {m: m.training for m in module.modules()}
    with ExitStack() as stack:
        for m, mode in training.items():
            stack.callback(setattr, m, "training", mode)
        module.eval()
        # probes have ranks of their own: a compiled model would be compiled anew for every pass
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for m in training:
            if getattr(m, "gradient_checkpointing", False) is True:
                m.training = True
        # self.log(on_step=True) raises outside the training loop
        object.__setattr__(module, "log", lambda *args, **kwargs: None)
        stack.callback(object.__delattr__, module, "log")
        yield
        for m in module.modules():
            if isinstance(m, Metric):
                m.reset()  # what the passes counted must not show in the first epoch
