"""Sharding strategies that leave adapters whole: the base is sharded, and gradients are averaged once a step.

The optimizer of every process sees whole factors, as under DDP, and takes the same step as the others: nothing else is
communicated. Checkpoints are those of a single process, too: one file with the adapter and the optimizer's state, that
goes on under any other strategy and number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from lightning_rlora.collectives import average_gradients, take_first

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class WholeAdapters(Strategy):
    """What is common to strategies that shard the base and leave whole what trains."""

    # All that a checkpoint holds is whole in every process: Lightning's ways for single devices are right for it.
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def trained(self) -> list[nn.Parameter]:
        """All parameters that train."""
        assert self.lightning_module is not None
        return [p for p in self.lightning_module.parameters() if p.requires_grad]

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step with the mean of all processes' gradients, which is formed after the last backward pass before it."""

        def averaged() -> Any:
            result = closure()
            average_gradients([p for group in optimizer.param_groups for p in group["params"]])
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)


class FSDP2Strategy(WholeAdapters, ModelParallelStrategy):
    """FSDP2 for adapted models: the frozen base is sharded over all processes, block by block.

    Modules of this package shard themselves; one of your own calls `shard_base(self, self.trainer.strategy.mesh)` in
    its `configure_model`.

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
        """Move the model, and make all processes start where the first one does."""
        super().model_to_device()
        take_first(self.trained())


for _name in ("fsdp2", "fsdp2strategy"):  # Lightning looks names up in lower case, class names too
    StrategyRegistry.register(_name, FSDP2Strategy, "FSDP2 of the frozen base, with whole adapters")
