"""A Lightning project of somebody else's: a small network that PEFT adapted, in a LightningModule of its own."""

from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_rlora.adapters import find_pairs, matrix
from lightning_rlora.optim import Riemannion

IN, HIDDEN, OUT = 12, 16, 10


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.first(x))))


class Project(pl.LightningModule):
    """Logs on every step, keeps a metric, and has dropout: what an initialisation must not disturb."""

    def __init__(
        self, r: int = 2, dtype: torch.dtype = torch.float32, make_optimizer: Any = None, **fields: Any
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        base = Network()
        with torch.no_grad():
            for p in base.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["first", "last"], **fields)
        torch.manual_seed(1)
        self.network = get_peft_model(base.to(dtype), config)
        for pair in find_pairs(self.network):
            pair.a.data, pair.b.data = pair.a.data.float(), pair.b.data.float()
        self.metric = MeanMetric()
        self.make_optimizer = make_optimizer or (lambda module: Riemannion.for_model(module, lr=0.02))
        self.seen: list[Tensor] = []

    def loss(self, batch: Tensor) -> Tensor:
        x, y = batch[:, :IN], batch[:, IN:]
        dtype = next(self.network.parameters()).dtype
        return (self.network(x.to(dtype)).float() - y).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.metric(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"also": loss})
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(batch.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self)


class Rows(Dataset):
    def __init__(self, count: int = 48) -> None:
        self.rows = torch.randn(count, IN + OUT, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.rows[i]


def loader(shuffle: bool = False, **options: Any) -> DataLoader:
    return DataLoader(Rows(), batch_size=8, shuffle=shuffle, **options)


def trainer(tmp_path: Any, callbacks: list[pl.Callback], max_steps: int = 4, **options: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_steps": max_steps,
    }
    return pl.Trainer(callbacks=callbacks, **(settings | options))


def products(module: nn.Module) -> list[Tensor]:
    return [p.scaling * matrix(p.b).detach().double() @ matrix(p.a).detach().double() for p in find_pairs(module)]


def bases(module: nn.Module) -> list[Tensor]:
    return [p.layer.get_base_layer().weight.detach().clone() for p in find_pairs(module)]


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


class AtStart(pl.Callback):
    """Does something when training starts."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.action(trainer, pl_module)


class AfterEveryBatch(pl.Callback):
    def __init__(self, action: Any) -> None:
        self.action = action

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.action(trainer, pl_module)
