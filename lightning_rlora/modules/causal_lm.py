"""Fine-tuning a causal language model with a PEFT adapter on the fixed-rank manifold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_rlora.adapters import PeftConfig, config_fields, is_sharded, root_gathered
from lightning_rlora.errors import UserError
from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.modules.answers import gathered, judged
from lightning_rlora.modules.base_model import load_base, load_tokenizer
from lightning_rlora.modules.compilation import explained_compile_errors
from lightning_rlora.modules.packing import check_packing
from lightning_rlora.scoring import accuracies

IGNORED = -100
"""Label of tokens that carry no loss."""


class CausalLM(AdaptedModel):
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
        optimizer: Makes the optimizer from parameter groups; by default WhitenedRiemannion with its own defaults.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, stepped after each optimizer step. None
            stands for LinearWithWarmup over a twentieth of the run, torch's ConstantLR with a factor of 1 for a
            constant rate. If it has a `total_steps` that is None, the trainer's number of steps is filled in.
        lr_ratio: LoRA+: the learning rate of B over that of A, which is the optimizer's (see `lora_plus_groups`; 16 is
            the authors' advice). Goes with optimizers of torch's kind, not with those that move A and B together.
        dtype: Of the base's weights; the adapter's are float32 in any case.
        quantization: Load the base's linear layers in 4 bits (NF4) or 8 bits with bitsandbytes; the rest is in dtype.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run the model through torch.compile: the same losses and faster steps, after a pause at the first
            training batch and at the first evaluated one. Generation and locally optimal initialisation run uncompiled.
        max_new_tokens: Length of generated answers (`predict`, and `test` on questions).
        trust_remote_code: Run code that the base's repository brings along.

    Raises:
        UserError: If the base cannot be loaded, the adapter does not fit it, or no tokens are to be generated.
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
        if isinstance(adapter, PeftConfig):
            adapter = config_fields(adapter)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        model = load_base(base, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code)
        super().__init__(
            model,
            task_type="CAUSAL_LM",
            adapter=adapter,
            adapter_path=adapter_path,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_ratio=lr_ratio,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._packing_checked = False

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
        """The base model's output (logits, loss) for a batch.

        Raises:
            UserError: If the batch holds no tokens.
        """
        if "input_ids" not in batch:
            raise UserError("a language model learns from input_ids, which the data do not give")
        if "position_ids" in batch and not self._packing_checked:
            check_packing(self.model)
            self._packing_checked = True
        with explained_compile_errors():
            return self.model(**batch, use_cache=False)

    def loss(self, batch: dict[str, Tensor], output: Any) -> Tensor:
        """The loss to train on, a scalar: by default the mean cross-entropy of the labelled tokens in nats."""
        return output.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update val/loss, val/perplexity and val/accuracy."""
        self._evaluate(batch, "val")

    def on_test_start(self) -> None:
        """No question is answered yet."""
        self.answers: list[dict[str, Any]] = []

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update test/loss, test/perplexity and test/accuracy, or answer a batch of questions (with `gold`)."""
        if "gold" in batch:
            self.answers += judged(batch, self._complete(batch))
        else:
            self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Score the answers: test/accuracy/<task>, and their mean over the tasks as test/accuracy."""
        self.answers = gathered(self.answers)
        shares = accuracies(self.answers)
        for task, share in shares.items():
            self.log(f"test/accuracy/{task}", share)
        if shares:
            self.log("test/accuracy", sum(shares.values()) / len(shares))

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
        completions = self._complete(batch)
        return [
            {"prompt": prompt, "completion": text} for prompt, text in zip(batch["prompt"], completions, strict=True)
        ]

    def _complete(self, batch: dict[str, Any]) -> list[str]:
        with root_gathered(self.model):
            ids = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                synced_gpus=is_sharded(self.model),  # the others wait for those whose answers are longer
            )
        return self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
