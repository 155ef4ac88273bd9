"""What every module of this package is: a pretrained model whose adapter is trained, in a LightningModule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_rlora.adapters import (
    adapt,
    adapter_config,
    adapter_keys,
    check_adapter,
    is_sharded,
    keep_adapter,
    leave_casts_to_autocast,
    load_adapter,
    merge_adapter,
    scan,
    shard_base,
    track_offsets,
)
from lightning_rlora.adapters.offset import NAME as OFFSET
from lightning_rlora.collectives import gathered, rank
from lightning_rlora.errors import UserError
from lightning_rlora.modules.compilation import compile_in_place
from lightning_rlora.modules.finite_loss import FiniteLoss
from lightning_rlora.modules.random_state import restore_random_state, save_random_state
from lightning_rlora.optim import (
    FixedRankOptimizer,
    LinearWithWarmup,
    WhitenedRiemannion,
    lora_plus,
    parameter_groups,
)
from lightning_rlora.strategies import FSDP2Strategy, WholeAdapters

Made = TypeVar("Made")


class AdaptedModel(LightningModule, ABC):
    """A pretrained model whose adapter is trained; the base is frozen and never stored in a checkpoint.

    Subclasses load the base model, say how it is called on a batch (`forward`) and what is trained on (`loss`), and add
    their evaluation. They save their own hyperparameters, from which `load_from_checkpoint` makes them again.

    Args:
        model: The pretrained model.
        task_type: PEFT's name of what the model does, such as `CAUSAL_LM`; None if it has none.
        adapter: Fields of PEFT's configuration of a new adapter; `target_modules` is `all-linear` if left out.
        adapter_path: Folder of a saved PEFT adapter to train further, in place of a new one.
        optimizer: Makes the optimizer from parameter groups; by default WhitenedRiemannion with its own defaults.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, stepped after each optimizer step; None
            stands for `LinearWithWarmup` over a twentieth of the run (in manual optimization, for none), and
            `torch.optim.lr_scheduler.ConstantLR` with a factor of 1 for a constant rate.
        lr_ratio: LoRA+: the learning rate of B over that of A.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run the model through torch.compile.

    Raises:
        UserError: If the adapter does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task_type: str | None,
        adapter: dict[str, Any] | None,
        adapter_path: str | None,
        optimizer: Callable[[Iterable], Optimizer] | None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
        lr_ratio: float | None,
        gradient_checkpointing: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints leave the base out; check_adapter looks after the rest
        self._optimizer_factory = optimizer or WhitenedRiemannion
        self._scheduler_factory = lr_scheduler
        self.lr_ratio = lr_ratio
        self._rng_to_restore: list[dict[str, Any]] = []
        self._resumed: dict[str, list[str] | None] = {}
        self._finite_loss = FiniteLoss()

        if adapter_path is not None:
            if adapter is not None:
                raise UserError("give either adapter (a new one) or adapter_path (a saved one), not both")
            self.model = load_adapter(model, adapter_path)
        else:
            # null stands for PEFT's default
            given = {name: value for name, value in (adapter or {}).items() if value is not None}
            config = adapter_config({"task_type": task_type} | given)
            if getattr(config, "target_modules", ...) is None:
                config.target_modules = "all-linear"  # type: ignore[attr-defined]
            self.model = adapt(model, config)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # the embeddings' outputs need no gradients then, and a hook that asks for them breaks a compiled graph
            self.model.disable_input_require_grads()
        track_offsets(scan(self.model).pairs)
        if compile:
            compile_in_place(self.model)  # which also does away with needless casts
        else:
            leave_casts_to_autocast(self.model)

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """The model's output for a batch."""

    @abstractmethod
    def loss(self, batch: Any, output: Any) -> Tensor:
        """The loss to train on, a scalar."""

    def merged(self) -> list[Any]:
        """An ordinary model with the adapter merged in, and what is saved with it. The module is used up."""
        return [merge_adapter(self.model), self.tokenizer]

    def configure_model(self) -> None:
        """Shard the frozen base where the strategy shards, and keep its buffers out of what DDP sends in every pass.

        Raises:
            UserError: If the strategy is Lightning's own for sharding, which would shard the adapter, too.
        """
        if self._trainer is None:
            return  # loaded from a checkpoint
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            shard_base(self.model, strategy.mesh)
        elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy) and not isinstance(strategy, WholeAdapters):
            raise UserError(
                f"{type(strategy).__name__} would shard the adapter, too, which must stay whole: use strategy fsdp2, "
                "or fsdp1 (FSDP2Strategy and FSDP1Strategy of lightning_rlora)"
            )
        keys = adapter_keys(self)
        unchanged = [name for name, _ in self.named_buffers() if name not in keys or f".{OFFSET}." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, unchanged)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, logged as train/loss; one that is not finite ends the run (see `FiniteLoss`)."""
        loss = self.loss(batch, self(batch))
        self._finite_loss.note(loss, self.trainer.global_step)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        """Put the model in training mode, since Lightning keeps the evaluation mode that pretrained models come in.

        Raises:
            UserError: If the run is resumed with another optimizer or schedule; torch would load states without a word.
        """
        self.model.train()
        self._finite_loss = FiniteLoss()
        if self.trainer.ckpt_path is None:  # loaded for another run: not one to go on with
            self._resumed, self._rng_to_restore = {}, []
        for kind, names in self._moved_by().items():
            before = self._resumed.get(kind)
            if before in (None, names) or (not before and names == ["ConstantLR"]):
                continue
            if not before:
                raise UserError(
                    f"the checkpoint was made without a {kind}: set lr_scheduler to "
                    "torch.optim.lr_scheduler.ConstantLR with a factor of 1 to go on as it began"
                )
            raise UserError(
                f"the checkpoint was made with the {kind} {', '.join(before)}, and this run has "
                f"{', '.join(names) or 'none'}: resume with the run's own configuration"
            )

    def _scalings(self) -> dict[str, float]:
        return {pair.name: pair.scaling for pair in scan(self.model).pairs}

    def _moved_by(self) -> dict[str, list[str]]:
        """The names of what must be the same in a run that goes on."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return {
            "optimizer": [type(optimizer).__name__ for optimizer in self.trainer.optimizers],
            "schedule": [type(schedule).__name__ for schedule in schedules],
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of a resumed run at the latest moment, when nothing draws any more.

        Processes beyond those of the run that is resumed go on with their own.
        """
        if rank() < len(self._rng_to_restore):
            restore_random_state(self._rng_to_restore[rank()])
        self._rng_to_restore = []

    def configure_optimizers(self) -> Any:
        """The optimizer of the adapter and all else that trains, and its schedule over the run."""
        make = _with_refusals(self._optimizer_factory, "optimizer")
        if self.lr_ratio is None:
            optimizer = make(parameter_groups(self.model))
        else:
            optimizer = lora_plus(self.model, make, self.lr_ratio)
        if isinstance(optimizer, FixedRankOptimizer):
            optimizer.measure_base(self.model)
            if self.trainer.precision == "16-mixed":
                for group in optimizer.param_groups:
                    group["min_singular_value"] = max(group["min_singular_value"], 1e-6)
        schedule = self._scheduler_factory
        if schedule is None:
            if not self.automatic_optimization:
                return optimizer
            schedule = partial(LinearWithWarmup, warmup=0.05)
        scheduler = _with_refusals(schedule, "learning-rate scheduler")(optimizer)
        if isinstance(scheduler, LinearWithWarmup) and scheduler.total_steps is None:
            scheduler.set_total_steps(self._length_of_run())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _length_of_run(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if not 1 <= steps < float("inf"):
            raise UserError(
                "the schedule needs the length of the run, which the data do not tell: set max_steps, or lr_scheduler "
                "to torch.optim.lr_scheduler.ConstantLR with a factor of 1"
            )
        return int(steps)

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

    def on_predict_start(self) -> None:
        """Refuse to predict with a sharded base, for which all processes need equally many batches."""
        if is_sharded(self.model) and self.trainer.world_size > 1:
            raise UserError("a sharded base is not there to predict with: use strategy ddp, or one process")

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
        # whose subclass it may be: a class in somebody's script cannot be imported again
        checkpoint["module"] = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith(__package__))
        checkpoint["scalings"] = self._scalings()
        checkpoint |= {f"{kind}_names": names for kind, names in self._moved_by().items()}
        checkpoint["rng"] = self._rng_to_restore or gathered(save_random_state(self.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter that does not fit before anything is loaded."""
        check_adapter(self, checkpoint["state_dict"])
        if checkpoint.get("scalings", self._scalings()) != self._scalings():
            raise UserError("the checkpoint's adapter has another scaling: give the lora_alpha it was trained with")
        had_none = checkpoint.get("lr_schedulers") == []  # all that is known of one in which schedules have no names
        self._resumed = {
            "optimizer": checkpoint.get("optimizer_names"),
            "schedule": checkpoint.get("schedule_names", [] if had_none else None),
        }
        states = checkpoint.get("rng")
        self._rng_to_restore = states if isinstance(states, list) else []  # earlier versions kept the first one's only


def _with_refusals(make: Callable[[Any], Made], what: str) -> Callable[[Any], Made]:
    """A factory whose ValueErrors, by which torch refuses options, are wrong input and no bug."""

    def made(argument: Any) -> Made:
        try:
            return make(argument)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"the {what} refuses its options: {error}") from error

    return made
