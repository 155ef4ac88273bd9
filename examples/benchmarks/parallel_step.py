"""One process of many_gpus.py: train a Llama with random weights under one strategy, and write what a step takes.

torchrun starts it; for one device plain Python does.
"""

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from bench import ON_GPU
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_rlora import CausalLM, Riemannion, WhitenedRiemannion

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "Riemannion": lambda params: Riemannion(params, lr=1e-4),
    "WhitenedRiemannion": lambda params: WhitenedRiemannion(params, lr=1e-4, relative=False),
}
SIZES = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Byte": 1, "Int": 4, "Long": 8, "Bool": 1}


class Stopwatch(pl.Callback):
    """Marks where steps, and the optimizer's part of them, begin and end; profiles one more step.

    Args:
        warm_up: Steps that are not measured.
        steps: Steps that are.
    """

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.marks: dict[str, list[Any]] = defaultdict(list)
        self.sent: dict[str, int] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.warm_up and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if index == self.warm_up + self.steps:
            self.peak = torch.cuda.max_memory_allocated() if ON_GPU else None
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()
        self._mark("start")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._mark("gradients")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._mark("end")
        if index == self.warm_up + self.steps:
            self.profile.stop()
            self.sent = collectives(self.profile)

    def result(self) -> dict[str, Any]:
        """Milliseconds of a step and of its optimizer, bytes given to collectives in a step, peak of memory."""
        if ON_GPU:
            torch.cuda.synchronize()
        first, last = self.warm_up, self.warm_up + self.steps
        optimizer = [_between(self.marks["gradients"][i], self.marks["end"][i]) for i in range(first, last)]
        whole = _between(self.marks["start"][first], self.marks["start"][last])
        return {
            "step_ms": whole / self.steps,
            "optimizer_ms": sum(optimizer) / self.steps,
            "sent": self.sent,
            "peak": self.peak,
        }

    def _mark(self, name: str) -> None:
        mark: Any = perf_counter()
        if ON_GPU:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks[name].append(mark)


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if ON_GPU else 1e3 * (end - start)


def collectives(recorded: profile) -> dict[str, int]:
    """Bytes that this process gave to each kind of collective."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, int] = defaultdict(int)
    for event in events:
        args = event.get("args", {})
        if event.get("name") == "record_param_comms" and "Collective name" in args:
            found[args["Collective name"]] += args["In msg nelems"] * SIZES[args["dtype"]]
    return {name: count for name, count in found.items() if count}


def random_rows(vocabulary: int, length: int, count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--base", required=True, help="folder of the model")
    made.add_argument("--strategy", required=True, help="of the trainer")
    made.add_argument("--devices", type=int, required=True)
    made.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    made.add_argument("--rank", type=int, required=True)
    made.add_argument("--batch", type=int, required=True)
    made.add_argument("--length", type=int, required=True)
    made.add_argument("--quantization")
    made.add_argument("--gradient-checkpointing", action="store_true")
    made.add_argument("--warm-up", type=int, default=6)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--out", type=Path, required=True, help="folder; a file per process")
    args = made.parse_args()
    torch.manual_seed(0)
    module = CausalLM(
        base=args.base,
        adapter={"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear"},
        optimizer=OPTIMIZERS[args.optimizer],
        dtype="bfloat16",
        quantization=args.quantization,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    stopwatch = Stopwatch(args.warm_up, args.steps)
    trainer = pl.Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=args.devices,
        strategy=args.strategy,
        precision="bf16-mixed",
        max_steps=args.warm_up + args.steps + 1,
        callbacks=[stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    vocabulary = module.model.config.vocab_size
    rows = random_rows(vocabulary, args.length, (args.warm_up + args.steps + 1) * args.batch * args.devices)
    trainer.fit(module, DataLoader(rows, batch_size=args.batch))
    rank = int(os.environ.get("RANK", 0))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    (args.out / f"{rank}.json").write_text(json.dumps({**stopwatch.result(), "trained": trained}))


if __name__ == "__main__":
    main()
