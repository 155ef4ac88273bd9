"""A small project that subclasses CausalLM: a loss, data and an optimizer of its own."""

import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rlora import CausalLM, RiemannianSGD


class CountingData(LightningDataModule):
    """Sentences that count."""

    def setup(self, stage):
        tokenizer = self.trainer.lightning_module.tokenizer
        texts = [" ".join(str(n) for n in range(start, start + 12)) for start in range(48)]
        rows = [tokenizer(text)["input_ids"][:24] for text in texts]
        self.rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]

    def train_dataloader(self):
        return DataLoader(self.rows[:40], batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.rows[40:], batch_size=8)


class SmoothedLM(CausalLM):
    """Label smoothing in place of the plain cross-entropy, and Riemannian SGD with Adam-like steps."""

    def __init__(self, smoothing: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.smoothing = smoothing

    def loss(self, batch, output):
        logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def configure_optimizers(self):
        return RiemannianSGD.for_model(self.model, lr=0.02, simulate_adam=True)
