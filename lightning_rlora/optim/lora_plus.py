"""LoRA+: learning rates of their own for A, B and embeddings, as parameter groups for any optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_rlora.errors import UserError
from lightning_rlora.optim.fixed_rank import FixedRankOptimizer
from lightning_rlora.optim.peers.per_pair import PerPairOptimizer


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, embedding_lr: float = 1e-6
) -> list[dict[str, Any]]:
    """The trainable parameters of a model at the rates of LoRA+ (arXiv 2402.12354): rate of B = ratio x rate of A.

    In a network of width n features are learnt efficiently if the rate of A falls like 1 / n and that of B stays of
    order 1; with one rate for both, either A or B learns too slowly. Sorted as by the authors' helper:

    | parameters | rate | weight decay |
    | --- | --- | --- |
    | A, and every other matrix (heads) | lr | the optimizer's |
    | factors of adapted embeddings | embedding_lr | the optimizer's |
    | B, and other vectors (DoRA's magnitudes, VeRA's scales) | ratio x lr | the optimizer's |
    | biases and norms | ratio x lr | none |

    The optimizer's own weight decay applies, since only the last group brings one. (PEFT's `create_loraplus_optimizer`
    gives every group a decay of 0 unless told otherwise by `loraplus_weight_decay`, so that a plain `weight_decay` is
    lost; and of norms it knows only LayerNorm.)

        torch.optim.AdamW(lora_plus_groups(model, lr=2e-4, ratio=16), weight_decay=0.01)

    What ratio is best depends on model, task and initialisation; as B's rate grows with it, a larger ratio wants a
    smaller lr (half of LoRA's, say). The authors found 2^4 for RoBERTa where B is random and A zero at the start, 2^2
    to 2^3 with PEFT's start (A random, B zero), and 2^1 to 2^2 for Llama; harder tasks gain more from a large one.

    Args:
        model: An adapted model, or a module that contains one.
        lr: Learning rate of A.
        ratio: Rate of B over rate of A.
        embedding_lr: Learning rate of the factors of adapted embeddings.

    Returns:
        Groups with `params` and `lr`, and `weight_decay` 0 for the last kind; kinds without parameters are left out.

    Raises:
        UserError: If nothing in the model is trainable, or a rate is negative.
    """
    if not (lr >= 0 and ratio > 0 and embedding_lr >= 0):
        raise UserError(f"LoRA+ needs rates >= 0 and a positive ratio, not {lr}, {embedding_lr} and {ratio}")
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    a: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_embedding_" in f".{name}":
            embeddings.append(parameter)
        elif ".lora_B." not in f".{name}" and parameter.ndim != 1:
            a.append(parameter)
        elif name.rpartition(".")[0] in norms or "bias" in name:
            undecayed.append(parameter)
        else:
            b.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": a, "lr": lr},
        {"params": embeddings, "lr": embedding_lr},
        {"params": b, "lr": ratio * lr},
        {"params": undecayed, "lr": ratio * lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has nothing to train: adapt it with PEFT first, and leave the adapter unfrozen")
    return groups


def lora_plus(model: nn.Module, make_optimizer: Callable[[Any], Optimizer], ratio: float = 16.0) -> Optimizer:
    """An optimizer at the rates of LoRA+ from a factory; the rate that the factory gives is that of A.

    Raises:
        UserError: If it is an optimizer that moves A and B together: their rates are not apart.
    """
    # of a parameter of its own, since a Riemannian optimizer gives factors a start; torch's ignore the algorithm
    probe = make_optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))], "algorithm": "adamw"}])
    if isinstance(probe, FixedRankOptimizer | PerPairOptimizer):
        raise UserError(
            f"{type(probe).__name__} moves A and B together and has no rates of each: leave out lr_ratio, or take "
            "torch.optim.AdamW"
        )
    return make_optimizer(lora_plus_groups(model, probe.defaults["lr"], ratio))
