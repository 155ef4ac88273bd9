"""Fine-tuning an encoder or a decoder to classify texts, with a PEFT adapter on the fixed-rank manifold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_rlora.adapters import PeftConfig, config_fields, float32_heads
from lightning_rlora.errors import UserError
from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.modules.base_model import load_classifier, load_tokenizer
from lightning_rlora.modules.compilation import explained_compile_errors
from lightning_rlora.modules.glue import GLUE, METRICS, LabelTask, custom_task

_HEADS = {"classifier", "score"}
"""Names of the modules that PEFT trains and saves for every classifier."""


class SequenceClassification(AdaptedModel):
    """A classifier of texts or of pairs of texts; its adapter and its head are trained, the base is frozen.

    The classes are told by one of three: `task`, `num_labels` or `class_names`. The data must keep to them.

    Whatever the base lacks (the head, in some encoders a pooling layer too) starts at random from the global random
    state (`seed_everything`), is trained with the adapter in float32, and is saved with it. Encoders classify by their
    own head's rule, decoders by their last token that is no padding.

    Subclasses change the loss by `loss`, the data by their DataModule, the optimizer by the factory or
    `configure_optimizers`.

    Batches are dictionaries of tensors: `input_ids`, `attention_mask` and for encoders of pairs `token_type_ids`, int64
    of shape (batch, tokens), padded on the right; `labels` (batch,), int64, or float32 for regression. For `predict`
    there is a list `records` in place of the labels.

    Args:
        base: Hub id or folder of the pretrained model, or `embedded:tiny-lm`, the small one in the package.
        task: A task of GLUE (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli): gives the classes and the metrics.
        num_labels: Number of classes, named by their numbers from 0; 1 for regression.
        class_names: Names of the classes, in the order of their numbers.
        adapter: Fields of PEFT's configuration, named as in adapter_config.json: `r`, `lora_alpha`, `lora_dropout`,
            `target_modules` (`all-linear`, without the head, if left out), ... and `peft_type` for something else than
            LORA. From Python also a PeftConfig.
        adapter_path: Folder of a saved PEFT adapter to train further, in place of a new one.
        optimizer: Makes the optimizer from parameter groups; by default WhitenedRiemannion with its own defaults.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, stepped after each optimizer step. None
            stands for LinearWithWarmup over a twentieth of the run, torch's ConstantLR with a factor of 1 for a
            constant rate. If it has a `total_steps` that is None, the trainer's number of steps is filled in.
        lr_ratio: LoRA+: the learning rate of B over that of A, which is the optimizer's (see `lora_plus_groups`; 16 is
            the authors' advice). Goes with optimizers of torch's kind, not with those that move A and B together.
        dtype: Of the base's weights; the adapter's and the head's are float32 in any case.
        quantization: Load the base in 4 bits (NF4) or 8 bits with bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run the model through torch.compile. Locally optimal initialisation runs uncompiled.
        trust_remote_code: Run code that the base's repository brings along.

    Raises:
        UserError: If the classes are not told by exactly one argument, the base cannot be loaded or the adapter does
            not fit it.
    """

    def __init__(
        self,
        base: str = "embedded:tiny-lm",
        task: Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"] | None = None,
        num_labels: int | None = None,
        class_names: list[str] | None = None,
        adapter: dict[str, Any] | PeftConfig | None = None,
        adapter_path: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_ratio: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["4bit", "8bit"] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(adapter, PeftConfig):
            adapter = config_fields(adapter)
        scoring = _scoring(task, num_labels, class_names)
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code, ends_text=False)
        model, lacking = load_classifier(
            base,
            scoring.class_names,
            dtype=dtype,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
        config = model.config.get_text_config()
        config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last other token
        config.use_cache = False
        super().__init__(
            model,
            task_type="SEQ_CLS",
            adapter=adapter if adapter_path else _with_head(adapter or {}, lacking),
            adapter_path=adapter_path,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_ratio=lr_ratio,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        float32_heads(self.model)
        _check_head(self.model, lacking)
        self.tokenizer = tokenizer
        self.task = task
        self.class_names = list(scoring.class_names)
        self._takes_token_types = getattr(config, "type_vocab_size", 0) > 1
        self._sets = ("", *(f"_{name}" for name in scoring.extra_sets))
        self._metrics = nn.ModuleDict(
            {
                f"{stage}{which}": nn.ModuleDict(
                    {"loss": MeanMetric()} | {name: METRICS[name](len(self.class_names)) for name in scoring.metrics}
                )
                for stage in ("val", "test")
                for which in self._sets
            }
        )

    def forward(self, batch: dict[str, Any]) -> Any:
        """The model's output for a batch, with `logits` of shape (batch, classes), or (batch, 1) for regression.

        Raises:
            UserError: If the batch holds no tokens.
        """
        if "input_ids" not in batch:
            raise UserError("a classifier learns from input_ids, which the data do not give")
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * self._takes_token_types
        with explained_compile_errors():
            return self.model(**{name: batch[name] for name in names if name in batch})

    def loss(self, batch: dict[str, Any], output: Any) -> Tensor:
        """The mean cross-entropy in nats, or the mean squared error of a regression."""
        logits, labels = output.logits.float(), batch["labels"]
        if labels.ndim != 1:
            raise UserError("the data label tokens and not texts: a classifier learns from ClassificationData")
        return F.cross_entropy(logits, labels) if self.class_names else F.mse_loss(logits[:, 0], labels.float())

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update val/loss and the task's metrics, such as val/accuracy; MNLI's second set adds `_mismatched`."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update test/loss and the task's metrics."""
        self._evaluate(batch, "test", dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation sets; logged by the steps, those of several miss in a sanity check."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all test sets."""
        self._log_metrics("test")

    def _evaluate(self, batch: dict[str, Any], stage: str, dataloader_idx: int) -> None:
        if dataloader_idx >= len(self._sets):
            raise UserError(f"{dataloader_idx + 1} data sets to evaluate on, where the task has {len(self._sets)}")
        output = self(batch)
        metrics: Any = self._metrics[stage + self._sets[dataloader_idx]]
        metrics["loss"].update(self.loss(batch, output), weight=len(batch["labels"]))
        predictions = output.logits.argmax(-1) if self.class_names else output.logits[:, 0].float()
        for name, metric in metrics.items():
            if name != "loss":
                metric.update(predictions, batch["labels"])

    def _log_metrics(self, stage: str) -> None:
        for which in self._sets:
            metrics: Any = self._metrics[stage + which]
            for name, metric in metrics.items():
                if metric.update_called:  # a set of the task need not be there
                    self.log(f"{stage}/{name}{which}", metric, prog_bar=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """The texts with the most probable `label` and its `probability`, or with a `score` for regression."""
        logits = self(batch).logits.float()
        if not self.class_names:
            scores = [{"score": score} for score in logits[:, 0].tolist()]
            return [record | score for record, score in zip(batch["records"], scores, strict=True)]
        best, labels = logits.softmax(-1).max(-1)
        found = zip(batch["records"], labels.tolist(), best.tolist(), strict=True)
        return [record | {"label": self.class_names[label], "probability": p} for record, label, p in found]


def _scoring(task: str | None, num_labels: int | None, class_names: list[str] | None) -> LabelTask:
    """The classes and metrics that exactly one of the three arguments tells."""
    if [task, num_labels, class_names].count(None) != 2:
        raise UserError("give exactly one of task (of GLUE), num_labels (1 for regression) and class_names")
    if task is not None:
        if task not in GLUE:
            raise UserError(f"unknown task {task!r}: GLUE has {', '.join(GLUE)}; or give num_labels or class_names")
        return GLUE[task]
    if num_labels is not None:
        if num_labels < 1:
            raise UserError(f"num_labels is {num_labels}: give the number of classes, or 1 for regression")
        return custom_task([str(number) for number in range(num_labels)] if num_labels > 1 else [])
    assert class_names is not None
    if len(class_names) < 2 or len(set(class_names)) < len(class_names):
        raise UserError(
            f"class_names = {class_names}: give two or more different names, or num_labels: 1 for regression"
        )
    return custom_task(class_names)


def _with_head(adapter: dict[str, Any], lacking: list[str]) -> dict[str, Any]:
    """The fields of an adapter that also trains and saves what the base lacks beyond the heads that PEFT knows."""
    extra = [name for name in lacking if not _HEADS & set(name.split("."))]
    return adapter | ({"modules_to_save": [*(adapter.get("modules_to_save") or []), *extra]} if extra else {})


def _check_head(model: nn.Module, lacking: list[str]) -> None:
    """Refuse to leave at random what the base lacks, as a saved adapter that was not made for a classifier would."""
    trained = [re.sub(r"\.modules_to_save\.[^.]+", "", key) for key, p in model.named_parameters() if p.requires_grad]
    for name in lacking:
        if not any(f".{name}." in key for key in trained):
            raise UserError(f"neither the base nor the adapter has {name!r}: give an adapter made for classification")
