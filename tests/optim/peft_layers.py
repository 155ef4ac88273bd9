"""A small model with every kind of layer that PEFT adapts, and loss gradients handed to its adapters."""

import torch
from dense_steps import Dense, dense_start, dense_step, relative
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_rlora.adapters import LoraPair, find_pairs, matrix


class Layers(nn.Module):
    """An embedding, a convolution, a linear layer and GPT-2's transposed one; a head that trains as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.convolution = nn.Conv2d(1, 10, 3, padding=1)
        self.linear = nn.Linear(12, 16)
        self.conv1d = Conv1D(14, 16)
        self.other_linear = nn.Linear(12, 16)
        self.head = nn.Linear(14, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.convolution(x.unsqueeze(1)).mean(1)
        return self.head(self.conv1d(torch.tanh(self.linear(x) + self.other_linear(x))))


def adapted(dtype=torch.float32, seed=0, r=3, **config) -> nn.Module:
    """The adapted model, with random factors that make products of size 1."""
    torch.manual_seed(seed)
    targets = ["embedding", "convolution", "linear", "conv1d", "other_linear"]
    settings = {"r": r, "lora_alpha": 6, "target_modules": targets, "modules_to_save": ["head"]} | config
    model = get_peft_model(Layers(), LoraConfig(**settings)).to(dtype)
    for pair in find_pairs(model):
        nn.init.normal_(pair.a, std=pair.shape[1] ** -0.5)
        nn.init.normal_(pair.b, std=pair.shape[0] ** -0.5)
    return model


def product(pair: LoraPair) -> Tensor:
    return pair.scaling * matrix(pair.b).detach().double() @ matrix(pair.a).detach().double()


def products(model: nn.Module) -> list[Tensor]:
    return [product(pair) for pair in find_pairs(model)]


def random_gradients(pairs: list[LoraPair], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(*pair.shape[:2], generator=generator, dtype=torch.float64) for pair in pairs]


def hand_over(pairs: list[LoraPair], gradients: list[Tensor]) -> None:
    """What autograd would leave in .grad for these loss gradients with respect to the products."""
    for pair, g in zip(pairs, gradients, strict=True):
        a, b = matrix(pair.a).detach().double(), matrix(pair.b).detach().double()
        pair.b.grad = (pair.scaling * g @ a.mT).to(pair.b.dtype).reshape(pair.b.shape)
        pair.a.grad = (pair.scaling * b.mT @ g).to(pair.a.dtype).reshape(pair.a.shape)


@torch.no_grad()
def refactor(pair: LoraPair, s: Tensor) -> None:
    """(A, B) -> (S A, B S^-1)."""
    a, b = matrix(pair.a).double(), matrix(pair.b).double()
    pair.a.copy_((s @ a).reshape(pair.a.shape))
    pair.b.copy_((b @ torch.linalg.inv(s)).reshape(pair.b.shape))


def mixing(r: int, condition: float, generator: torch.Generator) -> Tensor:
    p, q = (torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return p * condition ** torch.linspace(0, -1, r, dtype=torch.float64) @ q


def dense_run(starts: list[Tensor], r: int, gradients, direction, **options) -> list[Dense]:
    """The dense iteration of every product; `gradients` is a list (of steps) of lists (of pairs)."""
    points = [dense_start(x, r) for x in starts]
    for step in gradients:
        points = [dense_step(d, g, direction, **options) for d, g in zip(points, step, strict=True)]
    return points


def worst_error(got: list[Tensor], expected: list[Dense]) -> float:
    return max(relative(x, d.x) for x, d in zip(got, expected, strict=True))
