"""Fine-tuning a causal language model with a PEFT adapter on the fixed-rank manifold."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_rlora.adapters import (
    PeftConfig,
    adapt,
    adapter_config,
    check_adapter,
    config_fields,
    keep_adapter,
    load_adapter,
    scan,
    track_offsets,
)
from lightning_rlora.errors import UserError
from lightning_rlora.modules.base_model import load_base, load_tokenizer
from lightning_rlora.modules.compilation import compile_in_place, explained_compile_errors
from lightning_rlora.modules.finite_loss import FiniteLoss
from lightning_rlora.modules.packing import check_packing
from lightning_rlora.optim import FixedRankOptimizer, LinearWithWarmup, Riemannion, lora_plus, parameter_groups

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that carry no loss."""


class CausalLM(LightningModule):
    """A causal language model whose adapter is trained; the base is frozen and never stored in a checkpoint.

    Subclasses change the loss by `loss`, the data by their DataModule, the optimizer by the factory or
    `configure_optimizers`.

    Batches are dictionaries of int64 tensors (batch, tokens): `input_ids`, `labels` (-100 where no loss is taken; not
    shifted) and `attention_mask` or, for packed rows, `position_ids` that restart at each document.

    Args:
        base: Hub id or folder of the pretrained model, or `embedded:tiny-lm`, the small one in the package.
        adapter: Fields of PEFT's configuration, named as in adapter_config.json: `r`, `lora_alpha`, `lora_dropout`,
            `target_modules` (`all-linear` if left out), `use_rslora`, `use_dora`, `rank_pattern`, `modules_to_save`,
            ... and `peft_type` for something else than LORA. From Python also a PeftConfig.
        adapter_path: Folder of a saved PEFT adapter to train further, in place of a new one.
        optimizer: Makes the optimizer from parameter groups; by default Riemannion with its own defaults.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, stepped after each optimizer step. If it has
            a `total_steps` that is None, the trainer's number of steps is filled in.
        lr_ratio: LoRA+: the learning rate of B over that of A, which is the optimizer's (see `lora_plus_groups`; 16 is
            the authors' advice). Goes with any optimizer but those on the manifold, which have no separate rates.
        dtype: Of the base's weights; the adapter's are float32 in any case.
        quantization: Load the base in 4 bits (NF4) or 8 bits with bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run the model through torch.compile: the same losses and faster steps, after a pause at the first
            training batch and at the first evaluated one. Generation and locally optimal initialisation run uncompiled.
        max_new_tokens: Length of generated answers (`predict`).
        trust_remote_code: Run code that the base's repository brings along.

    Raises:
        UserError: If the base cannot be loaded or the adapter does not fit it.
    """

    def __init__(
        self,
        base: str = "embedded:tiny-lm",
        adapter: dict[str, Any] | PeftConfig | None = None,
        adapter_path: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_ratio: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["4bit", "8bit"] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(adapter, PeftConfig):
            adapter = config_fields(adapter)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.strict_loading = False  # checkpoints leave the base out; check_adapter looks after the rest
        self.max_new_tokens = max_new_tokens
        self.lr_ratio = lr_ratio
        self._optimizer_factory = optimizer
        self._scheduler_factory = lr_scheduler
        self._rng_to_restore: dict[str, Any] | None = None
        self._optimizers_resumed: list[str] | None = None
        self._packing_checked = False
        self._finite_loss = FiniteLoss()

        self.tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        model = load_base(base, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code)
        if adapter_path is not None:
            if adapter is not None:
                raise UserError("give either adapter (a new one) or adapter_path (a saved one), not both")
            self.model = load_adapter(model, adapter_path)
        else:
            config = adapter_config({"task_type": "CAUSAL_LM"} | (adapter or {}))
            if getattr(config, "target_modules", ...) is None:
                config.target_modules = "all-linear"  # type: ignore[attr-defined]
            self.model = adapt(model, config)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # the embeddings' outputs need no gradients then, and a hook that asks for them breaks a compiled graph
            self.model.disable_input_require_grads()
        track_offsets(scan(self.model).pairs)
        if compile:
            compile_in_place(self.model)

        vocabulary = model.config.get_text_config().vocab_size
        self._metrics = torch.nn.ModuleDict(
            {
                stage: torch.nn.ModuleDict(
                    {
                        "loss": MeanMetric(),
                        "perplexity": Perplexity(ignore_index=IGNORED),
                        "accuracy": MulticlassAccuracy(vocabulary, average="micro", ignore_index=IGNORED),
                    }
                )
                for stage in ("val", "test")
            }
        )

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """The base model's output (logits, loss) for a batch."""
        if "position_ids" in batch and not self._packing_checked:
            check_packing(self.model)
            self._packing_checked = True
        with explained_compile_errors():
            return self.model(**batch, use_cache=False)

    def loss(self, batch: dict[str, Tensor], output: Any) -> Tensor:
        """The loss to train on, a scalar: by default the mean cross-entropy of the labelled tokens in nats."""
        return output.loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, logged as train/loss; one that is not finite ends the run (see `FiniteLoss`)."""
        loss = self.loss(batch, self(batch))
        self._finite_loss.note(loss, self.trainer.global_step)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        """Put the model in training mode, since Lightning keeps the evaluation mode that pretrained models come in.

        Raises:
            UserError: If the run is resumed with another optimizer; torch would load its state without a word.
        """
        self.model.train()
        self._finite_loss = FiniteLoss()
        if self.trainer.ckpt_path is None:  # loaded for another run: not one to go on with
            self._optimizers_resumed = self._rng_to_restore = None
        optimizers = self._optimizer_names()
        if self._optimizers_resumed not in (None, optimizers):
            raise UserError(
                f"the checkpoint was made with the optimizer {', '.join(self._optimizers_resumed)}, and this run has "
                f"{', '.join(optimizers)}: resume with the run's own configuration"
            )

    def _scalings(self) -> dict[str, float]:
        return {pair.name: pair.scaling for pair in scan(self.model).pairs}

    def _optimizer_names(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.trainer.optimizers]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of a resumed run at the latest moment, when nothing draws any more."""
        if self._rng_to_restore is not None:
            _restore_rng(self._rng_to_restore)
            self._rng_to_restore = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update val/loss, val/perplexity and val/accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update test/loss, test/perplexity and test/accuracy."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output = self(batch)
        logits, targets = output.logits[:, :-1].float(), batch["labels"][:, 1:]
        metrics = self._metrics[stage]
        metrics["loss"](self.loss(batch, output), weight=(targets != IGNORED).sum())  # type: ignore[index]
        metrics["perplexity"](logits, targets)  # type: ignore[index]
        metrics["accuracy"](logits.flatten(0, 1), targets.flatten())  # type: ignore[index]
        for name, metric in metrics.items():  # type: ignore[operator]
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name != "accuracy")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Greedy continuations of a batch of prompts: dictionaries with `prompt` and `completion`."""
        prompts = batch["prompt"]
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, new, strict=True)]

    def configure_optimizers(self) -> Any:
        """The optimizer of the adapter and all else that trains, and its schedule over the run."""
        make = self._optimizer_factory or Riemannion
        if self.lr_ratio is None:
            optimizer = make(parameter_groups(self.model))
        else:
            optimizer = lora_plus(self.model, make, self.lr_ratio)
        if isinstance(optimizer, FixedRankOptimizer) and self.trainer.precision == "16-mixed":
            for group in optimizer.param_groups:
                group["min_singular_value"] = max(group["min_singular_value"], 1e-6)
        if self._scheduler_factory is None:
            return optimizer
        scheduler = self._scheduler_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Tell a schedule over the whole run how long the run is; a resumed one knows."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LinearWithWarmup) and scheduler.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if not 1 <= steps < float("inf"):
                raise UserError("the schedule needs the length of the run, which the data do not tell: set max_steps")
            scheduler.set_total_steps(int(steps))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Map the trainer's clipping to the norm of the tangent vector; factor gradients have no meaningful norm."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(inner, FixedRankOptimizer):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            if gradient_clip_algorithm == "value":
                raise UserError(
                    "clipping by value breaks the gradient's products on the manifold: use "
                    "gradient_clip_algorithm='norm'"
                )
            inner.max_tangent_norm = float(gradient_clip_val) or None

    def on_train_end(self) -> None:
        """Look at the last training loss."""
        self._finite_loss.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out, and keep the random state for an exact resume.

        Raises:
            UserError: If the last training loss turns out not to be finite: such a state must not be saved.
        """
        self._finite_loss.check()
        checkpoint["state_dict"] = keep_adapter(self, checkpoint["state_dict"])
        checkpoint["scalings"] = self._scalings()
        checkpoint["optimizer_names"] = self._optimizer_names()
        checkpoint["rng"] = self._rng_to_restore or _save_rng()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter that does not fit before anything is loaded."""
        check_adapter(self, checkpoint["state_dict"])
        if checkpoint.get("scalings", self._scalings()) != self._scalings():
            raise UserError("the checkpoint's adapter has another scaling: give the lora_alpha it was trained with")
        self._optimizers_resumed = checkpoint.get("optimizer_names")
        self._rng_to_restore = checkpoint.get("rng")


def _save_rng() -> dict[str, Any]:
    """The states that dropout and Python code draw from; data order has generators of its own."""
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, list(state), gauss),
    }


def _restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))
