"""A Lightning project as it may stand before this package is known to it: its own module around a PEFT model."""

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["first", "second"])
        config.modules_to_save = ["head"]
        self.model = get_peft_model(Network(), config)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss, on_step=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(256, 32, generator=generator)
        y = (x @ torch.randn(32, 5, generator=generator)).argmax(1)
        return DataLoader(TensorDataset(x, y), batch_size=16)
