"""Starts that look at the training data first: EVA and CorDA, by PEFT's own preparations."""

from copy import copy
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_rlora.adapters.pairs import LoraPair, base_weight
from lightning_rlora.adapters.starts import Passes, Start, check_linear, keep_base
from lightning_rlora.errors import UserError


class EVA(Start):
    """A holds the directions in which a layer's inputs vary the most, and B is zero (arXiv 2410.07170).

    Every layer keeps its rank: EVA's redistribution of ranks (rho above 1) would change parameters that the optimizer
    already holds. PEFT goes over the batches again and again until the directions have settled.

    Args:
        batches: Number of training batches.
        tau: Cosine similarity of a direction before and after a batch from which it counts as settled.
        whiten: Divide each direction by the root of its singular value.
    """

    shifts_base = False

    def __init__(self, batches: int = 8, tau: float = 0.99, whiten: bool = False) -> None:
        self.batches = batches
        self._tau, self._whiten = tau, whiten

    @torch.no_grad()
    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Decompose the inputs of every layer."""
        if not isinstance(model, PeftModel):
            raise UserError("EVA needs a model made by PEFT's get_peft_model")
        ranks = {pair.shape[2] for pair in pairs}
        inputs = [_keywords(batch) for batch in passes.batches]
        labels_per_token = inputs[0].get("labels", inputs[0]["input_ids"]).shape == inputs[0]["input_ids"].shape
        if len(ranks) > 1:
            raise UserError("EVA needs one rank for all layers here: leave rank_pattern out")
        if max(_tokens(batch, labels_per_token) for batch in inputs) < max(ranks):
            raise UserError(f"EVA needs at least r = {max(ranks)} labelled tokens in a batch: raise batch_size")
        adapter = pairs[0].adapter
        config = model.peft_config[adapter]
        temporary: Any = copy(config)  # PEFT notes its results there
        model.peft_config[adapter] = temporary
        temporary.init_lora_weights = "eva"
        temporary.eva_config = EvaConfig(rho=1.0, tau=self._tau, whiten=self._whiten, use_label_mask=labels_per_token)
        try:
            initialize_lora_eva_weights(
                model,
                inputs,
                forward_fn=lambda _, batch: passes.forward(batch),
                adapter_name=adapter,
                gather_distributed_inputs=False,  # each process looks at batches of its own, and the first one's count
                show_progress_bar=False,
            )
        finally:
            model.peft_config[adapter] = config
        for pair in pairs:
            pair.b.zero_()


class CorDA(Start):
    """Singular vectors of the base weight times the covariance of its inputs (arXiv 2406.05223).

    PEFT keeps an n x n covariance for every layer with n inputs, and runs a sequence at a time.

    Args:
        batches: Number of training batches; fewer tokens than inputs of a layer make a singular covariance, which PEFT
            damps.
        method: `ipm` adapts what the data use the most, `kpm` what they use the least, to keep the knowledge they show.
    """

    def __init__(self, batches: int = 8, method: Literal["ipm", "kpm"] = "ipm") -> None:
        self.batches = batches
        self._config = CordaConfig(corda_method=method)

    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Measure the covariances and decompose every weight."""
        check_linear(pairs, "CorDA")
        if any(isinstance(base_weight(pair), DTensor) for pair in pairs):
            raise UserError("CorDA decomposes whole weights, and the base is sharded: start it under strategy ddp")

        def run_model() -> None:
            for batch in map(_keywords, passes.batches):
                for row in range(len(batch["input_ids"])):
                    passes.forward(_sequence(batch, row))

        preprocess_corda(model, _targets(pairs, init_lora_weights="corda", corda_config=self._config), run_model)
        for pair in pairs:
            keep_base(pair, lambda layer, adapter: layer.corda_init(adapter, "corda"))


def _targets(pairs: list[LoraPair], **fields: Any) -> LoraConfig:
    """A configuration that names the base layers of an adapted model, where PEFT expects those of a plain one."""
    ranks = {f"{pair.name}.base_layer": pair.shape[2] for pair in pairs}
    return LoraConfig(target_modules=list(ranks), rank_pattern=ranks, **fields)


def _keywords(batch: Any) -> dict[str, torch.Tensor]:
    if not isinstance(batch, dict) or "input_ids" not in batch:
        raise UserError("this start needs batches that are dictionaries with input_ids, as transformers' models take")
    return batch


def _tokens(batch: dict[str, torch.Tensor], labels_per_token: bool) -> int:
    """How many tokens of a batch EVA looks at."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    if labels_per_token and "labels" in batch:
        mask = mask & (batch["labels"] != -100)
    return int(mask.sum())


def _sequence(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    shape = batch["input_ids"].shape
    real = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
    return {
        name: value[row : row + 1][:, real] if value.shape == shape else value[row : row + 1]
        for name, value in batch.items()
    }
