"""Training runs of a tiny language model that give the same global batches to any number of processes."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_rlora.adapters import find_pairs
from lightning_rlora.adapters.pairs import base_weight, gathered, whole
from lightning_rlora.callbacks import LocallyOptimalInit
from lightning_rlora.callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from lightning_rlora.modules import AdaptedModel
from lightning_rlora.optim import RiemannianSGD, Riemannion
from lightning_rlora.strategies import FSDP1Strategy

GLOBAL_BATCH = 6
OPTIMIZERS = {
    "Riemannion": {"optimizer": lambda params: Riemannion(params, lr=0.05, relative=True)},
    "RiemannianSGD": {"optimizer": lambda params: RiemannianSGD(params, lr=0.5)},
    "AdamW": {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01)},
    "LoRA+": {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.002), "lr_ratio": 8.0},
}
STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(),
    "fsdp1": lambda: FSDP1Strategy(),
    "fsdp2": lambda: "fsdp2",  # by name, as 16-mixed wants it
}


class TinyLM(AdaptedModel):
    """GPT-2, since Llama computes some of its layers in float32 whatever its weights are."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        checkpointing: bool = False,
        dropout: float = 0.0,
        dora: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
            tie_word_embeddings=False,
            use_cache=False,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        super().__init__(
            GPT2LMHeadModel(config).to(dtype),
            task_type="CAUSAL_LM",
            adapter={
                "target_modules": ["c_attn", "c_fc"],
                "r": 3,
                "lora_alpha": 6,
                "lora_dropout": dropout,
                "use_dora": dora,
            },
            adapter_path=None,
            optimizer=options.get("optimizer"),
            lr_scheduler=partial(ConstantLR, factor=1),
            lr_ratio=options.get("lr_ratio"),
            gradient_checkpointing=checkpointing,
            compile=False,
        )
        self.losses: list[Tensor] = []

    def forward(self, batch: Tensor) -> Any:
        return self.model(input_ids=batch)

    def loss(self, batch: Tensor, output: Any) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())  # transformers' is float32

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch, self(batch)), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())


class Seeds(pl.Callback):
    """Gives every process another random state when training starts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.manual_seed(self.seed + trainer.global_rank)


def fit(
    strategy: str = "one",
    count: int = 1,
    *,
    folder: Path,
    accelerator: str = "cpu",
    method: str = "Riemannion",
    steps: int = 20,
    first: int = 0,
    loi: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    precision: str | None = None,
    plugins: tuple[Any, ...] = (),
    resume: Path | None = None,
    save: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train in this process, one of `count`, from global batch number `first` on.

    Returns:
        The products c B A, all that trains, the whole bases, the losses of this process, and how many numbers it holds.
    """
    module = TinyLM(**OPTIMIZERS[method], **options)
    start = [LocallyOptimalInit(alpha=0.05, oversampling=2)] if loi else []
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=count,
        strategy=STRATEGIES[strategy](),
        precision=precision,
        plugins=[AtomicCheckpointIO(), *plugins],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[*start, *callbacks],
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rows = torch.randint(0, 40, (100 * GLOBAL_BATCH, 8), generator=torch.Generator().manual_seed(3))
    turns = range(first * GLOBAL_BATCH + int(os.environ.get("RANK", 0)), len(rows), count)
    trainer.fit(module, DataLoader(rows, batch_size=GLOBAL_BATCH // count, sampler=turns), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    pairs = find_pairs(module)
    bases = []
    for pair in pairs:
        with gathered(pair):
            bases.append(whole(base_weight(pair).detach()).cpu().clone())
    return {
        "products": [pair.scaling * (pair.b.detach().double() @ pair.a.detach().double()).cpu() for pair in pairs],
        "trained": [p.detach().cpu().clone() for p in module.parameters() if p.requires_grad],
        "bases": bases,
        "losses": torch.stack(module.losses).cpu(),
        "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters()),
    }


def distance(run: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any entry of two runs' products c B A and base weights."""
    pairs = zip(run["products"], run["bases"], other["products"], other["bases"], strict=True)
    return max(max((x - y).abs().max(), (v - w).abs().max()).item() for x, v, y, w in pairs)


def identical(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all that trains has the same bits."""
    return all(torch.equal(x, y) for x, y in zip(run["trained"], other["trained"], strict=True))
