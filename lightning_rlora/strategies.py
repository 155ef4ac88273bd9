"""Sharding strategies that leave adapters whole: the base is sharded, and gradients are averaged once a step.

The optimizer of every process sees whole factors, as under DDP, and takes the same step as the others: nothing else is
communicated. Checkpoints are those of a single process, too: one file with the adapter and the optimizer's state, that
goes on under any other strategy and number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from lightning_rlora.adapters import keep_adapter, wrap_base
from lightning_rlora.collectives import average_gradients, take_first

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class WholeAdapters(Strategy):
    """What is common to strategies that shard the base and leave whole what trains."""

    # All that a checkpoint holds is whole in every process: Lightning's ways for single devices are right for it.
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is whole: what trains, and the offset of the base."""
        assert self.lightning_module is not None
        return keep_adapter(self.lightning_module, self.lightning_module.state_dict())

    def start_alike(self) -> None:
        """Make all processes start where the first one does, as DDP does; the base is read from one place anyway."""
        take_first(self.lightning_module_state_dict().values())

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step with the mean of all processes' gradients, which is formed after the last backward pass before it.

        A scaler of 16-mixed looks at the mean: one process's overflow makes all of them leave the step out.
        """

        def averaged() -> Any:
            result = closure()
            average_gradients([p for group in optimizer.param_groups for p in group["params"]])
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)


class FSDP2Strategy(WholeAdapters, ModelParallelStrategy):
    """FSDP2 for adapted models: the frozen base is sharded over all processes, block by block.

    Modules of this package shard themselves; one of your own calls `shard_base(self, self.trainer.strategy.mesh)` in
    its `configure_model`. Precision 16-mixed wants the strategy by its name, `fsdp2` (known once this file has been
    imported): Lightning refuses it to every instance of its own class, of which this is a subclass.

    Args:
        process_group_backend: nccl or gloo; by default what suits the device.
        timeout: How long a process waits for the others.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    @property
    def mesh(self) -> DeviceMesh:
        """The processes, in one dimension."""
        return self.device_mesh["data_parallel"]

    def setup_environment(self) -> None:
        """Share the data, and the base, among all processes; Lightning's default is tensor parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move what is not there yet, and start alike."""
        super().model_to_device()
        self.start_alike()


class FSDP1Strategy(WholeAdapters, FSDPStrategy):
    """FSDP1 for adapted models: the frozen base is sharded over all processes, block by block.

    The command line takes it for `--trainer.strategy fsdp`. Weights keep their dtype, adapters theirs: mixed precision
    is autocast, as under DDP.

    Args:
        process_group_backend: nccl or gloo; by default what suits the device.
        timeout: How long a process waits for the others.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    @property  # type: ignore[override]
    def precision_plugin(self) -> Precision:
        """The same as under DDP: weights keep their dtype; norms and overflows are those of whole gradients."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # FSDPPrecision, which Lightning chooses, is for sharded gradients, and so is its scaler
        self._precision_plugin = self._unsharded(plugin) if isinstance(plugin, FSDPPrecision) else plugin

    def _unsharded(self, plugin: FSDPPrecision) -> Precision:
        precision: Any = plugin.precision
        if precision == "32-true":
            return Precision()
        if precision in ("16-true", "bf16-true"):
            return HalfPrecision(precision)
        return MixedPrecision(precision, "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        wrap_base(model, device_id=self.root_device)
        model.to(self.root_device)
        self.start_alike()
        return model


# Lightning looks names up in lower case, class names too
for _strategy, _names in ((FSDP2Strategy, ("fsdp2", "fsdp2strategy")), (FSDP1Strategy, ("fsdp1", "fsdp1strategy"))):
    for _name in _names:
        StrategyRegistry.register(_name, _strategy, "the frozen base sharded, the adapter whole in every process")
