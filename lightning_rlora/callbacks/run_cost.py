"""What a run costs: seconds, memory, tokens and trainable parameters."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_rlora.files import write_atomically


class RunCost(Callback):
    """Write cost.json into the run folder, the trainer's `default_root_dir`, when training ends.

    It holds `seconds`, pairs of a step and the seconds of training up to it, at every validation and at the end; the
    validations themselves do not count, but what earlier callbacks leave to `on_train_start` does (as a locally optimal
    start does, if this callback stands before it). `samples` and `tokens` count rows and tokens with their padding, if
    batches hold `input_ids`.

    Memory is in bytes. `peak_memory` on a GPU is the most that PyTorch had allocated on it between the start of the run
    and its end, validations left out, beyond what was there before and is no part of the module; on a CPU it is the
    peak of the whole process, validations included (Linux only, None elsewhere). `memory_reserved_mean` and
    `memory_reserved_99th` are of what the process held after each step, memory that a validation has left to
    PyTorch's reserve included.

    All this is of one process: of a run on several devices, `samples`, `tokens` and memory are those of the first.

    A resumed run counts from its resumption on.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget earlier peaks of memory."""
        self._seconds: list[tuple[int, float]] = []
        self._memory: list[int] = []
        self._samples = self._tokens = 0
        self._held_before = self._peak = 0
        self._since: float | None = None
        self._elapsed = 0.0
        if _on_cuda(trainer):
            torch.cuda.init()  # the statistics do not exist before
            torch.cuda.reset_peak_memory_stats()
            # a quantized base is on the device by now, one in bfloat16 comes later: both belong to the run
            held_by_module = _bytes_of(pl_module, trainer.strategy.root_device)
            self._held_before = max(0, torch.cuda.memory_allocated() - held_by_module)
        else:
            _forget_peak_of_process()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and note the peak of what came before."""
        if _on_cuda(trainer):
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
        if self._since is not None:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation's peak; let the clock go on, unless this was the validation before training."""
        if _on_cuda(trainer):
            torch.cuda.reset_peak_memory_stats()
        if self._seconds:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and look at the memory."""
        self._memory.append(_memory_held(trainer))
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if isinstance(ids, Tensor):
            self._samples += len(ids)
            self._tokens += ids.numel()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop for good."""
        if self._since is not None:
            self._stop(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        memory = sorted(self._memory) or [0]
        cost = {
            "device": torch.cuda.get_device_name() if _on_cuda(trainer) else "cpu",
            "seconds": self._seconds,
            "peak_memory": self._peak_memory(trainer),
            "memory_reserved_mean": sum(memory) // len(memory),
            "memory_reserved_99th": memory[int(0.99 * (len(memory) - 1))],
            "samples": self._samples,
            "tokens": self._tokens,
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
        }
        write_atomically(Path(trainer.default_root_dir) / "cost.json", json.dumps(cost).encode())

    def _stop(self, trainer: Trainer) -> None:
        assert self._since is not None
        if _on_cuda(trainer):
            torch.cuda.synchronize()
        self._elapsed += time.perf_counter() - self._since
        self._since = None
        if not self._seconds or self._seconds[-1][0] < trainer.global_step:
            self._seconds.append((trainer.global_step, self._elapsed))

    def _peak_memory(self, trainer: Trainer) -> int | None:
        if _on_cuda(trainer):
            return max(self._peak, torch.cuda.max_memory_allocated()) - self._held_before
        return _status_of_process("VmHWM")


def _on_cuda(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _bytes_of(module: nn.Module, device: torch.device) -> int:
    """What a module's parameters and buffers take on a device, with the state that quantized weights carry."""
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    tensors = [*parameters, *module.buffers()]
    states = [getattr(tensor, "quant_state", None) for tensor in tensors]
    states += [getattr(state, "state2", None) for state in states]  # of scales that are quantized themselves
    owners = tensors + [state for state in states if state is not None]
    held = tensors + [value for owner in owners for value in vars(owner).values() if isinstance(value, Tensor)]
    storages = [value.untyped_storage() for value in held if value.device == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _memory_held(trainer: Trainer) -> int:
    return torch.cuda.memory_reserved() if _on_cuda(trainer) else _status_of_process("VmRSS") or 0


def _status_of_process(field: str) -> int | None:
    """A size in bytes out of Linux's account of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return next(
        (1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)), None
    )


def _forget_peak_of_process() -> None:
    """Let Linux count the peak of this process's memory from here on."""
    with suppress(OSError):  # no Linux, or not allowed: the peak is that of all the process's life
        Path("/proc/self/clear_refs").write_text("5")
