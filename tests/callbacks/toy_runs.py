"""A tiny adapted model, its data, and training runs that can be killed at any hook."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lightning_rlora.callbacks.run_record import RunRecord
from lightning_rlora.data.place import settle
from lightning_rlora.optim import Riemannion

WIDTH = 6


class ToyModule(pl.LightningModule):
    """Regression with a frozen two-layer network and a LoRA adapter of rank 2 on each layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]), layers)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.model(batch) - batch.flip(1)).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = (self.model(batch) - batch.flip(1)).square().mean()
        self.log("val/loss", loss)
        self.log("val/perplexity", math.exp(loss))
        self.log("val/accuracy", 1 / (1 + loss))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Riemannion.for_model(self, lr=0.02)


class Batches:
    """Batches in a fixed order that go on where a checkpoint left off."""

    def __init__(self, count: int, seed: int) -> None:
        self.batches = torch.randn(count, 4, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.served = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        start, self.start = self.start, 0
        return self._serve(start)

    def _serve(self, start: int) -> Iterator[Tensor]:
        for i in range(start, len(self)):
            self.served = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.served = state["served"]


class ToyData(pl.LightningDataModule):
    """The toy's data; with `settles` it puts Lightning's counters right on a resume, as TextDataModule does."""

    def __init__(self, settles: bool = False) -> None:
        super().__init__()
        self.settles = settles

    def train_dataloader(self) -> Batches:
        if self.settles:
            settle(self.trainer)
        return Batches(7, seed=1)

    def val_dataloader(self) -> Batches:
        return Batches(2, seed=2)


class Killed(BaseException):
    """Stands for kill -9."""


class KillAt(Checkpoint):
    """Kill the run in a hook at a step; being a `Checkpoint`, it comes after ModelCheckpoint in each hook."""

    def __init__(self, hook: str, step: int, kill: Any = None) -> None:
        def die(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                if kill is not None:
                    kill()
                raise Killed

        setattr(self, hook, die)


def fit(
    folder: Path,
    *,
    callbacks: list[Any] | None = None,
    record: RunRecord | None = None,
    ckpt_path: str | Path | None = None,
    save_every: int = 1,
    settles: bool = False,
    **options: Any,
) -> pl.Trainer:
    """Train the toy with a record, and a checkpoint every few steps."""
    options = {"num_sanity_val_steps": -1, "log_every_n_steps": 1, "logger": False} | options
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            record or RunRecord(),
            ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=save_every, save_last=True),
            *(callbacks or []),
        ],
        **options,
    )
    trainer.fit(ToyModule(), datamodule=ToyData(settles), ckpt_path=ckpt_path)
    return trainer


def fit_until_killed(folder: Path, killer: KillAt, **options: Any) -> None:
    """Train until the killer strikes."""
    record = RunRecord()
    record.on_exception = lambda *_: None  # type: ignore[method-assign]  # the dead do nothing
    try:
        fit(folder, callbacks=[*options.pop("callbacks", []), killer], record=record, **options)
    except Killed:
        return
    raise AssertionError("the run ended before it was killed")
