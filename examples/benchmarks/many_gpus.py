"""Training steps of Llama-3-8B (random weights, bfloat16) through Lightning on one GPU and on several.

    python examples/benchmarks/many_gpus.py --devices 2 --out many_gpus.json

Every process takes batches of the same size, so that a perfect strategy takes as long as one GPU does. The optimizer's
part is what lies between the gradients' mean and the end of the step. Bytes are those that one process gives to
collectives: all that is sent for the adapter is its gradients, once a step. A run that fails is named at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import DEVICE, MIB, ON_GPU, header, parser, show, write
from llama import llama_3_8b
from parallel_step import OPTIMIZERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlora.assets import resolve

HERE = Path(__file__).parent
ALONE = "auto"
"""Strategy of a single process."""


def in_words(optimizer: str, strategy: str) -> str:
    return f"{optimizer}, {'one' if strategy == ALONE else strategy}"


def write_model(folder: Path, layers: int, shrink: int) -> None:
    """A Llama with random weights, made on the device, with the tokenizer of the embedded model."""
    config = llama_3_8b(layers, shrink)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("embedded:tiny-lm")).save_pretrained(folder)


def measure(strategy: str, devices: int, optimizer: str, base: Path, more: Sequence[str]) -> list[dict[str, Any]]:
    """What every process of one run measured."""
    with tempfile.TemporaryDirectory() as out:
        launch = [sys.executable]
        if devices > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
        subprocess.run(
            [
                *launch,
                HERE / "parallel_step.py",
                *("--strategy", strategy, "--devices", str(devices), "--optimizer", optimizer),
                *("--base", base, "--out", out, *more),
            ],
            check=True,
        )
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(devices)]


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--devices", type=int, default=2)
    made.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2", "fsdp1"])
    made.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["Riemannion"])
    made.add_argument("--rank", default="16")
    made.add_argument("--batch", default="8")
    made.add_argument("--length", default="2048" if ON_GPU else "64")
    made.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--quantization")
    made.add_argument("--folder", type=Path, help="keep the model here, and take it from here the next time")
    args = made.parse_args(argv)
    head = header(argv)
    more = ["--rank", args.rank, "--batch", args.batch, "--length", args.length]
    more += ["--quantization", args.quantization] if args.quantization else []
    more += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        base = args.folder or Path(temporary) / "model"
        if not (base / "config.json").exists():
            write_model(base, args.layers, args.shrink)
        for optimizer in args.optimizers:
            for strategy, devices in [(ALONE, 1), *((strategy, args.devices) for strategy in args.strategies)]:
                try:
                    runs[optimizer, strategy] = measure(strategy, devices, optimizer, base, more)
                except subprocess.CalledProcessError:
                    failed.append(in_words(optimizer, strategy))
    rows = []
    for (optimizer, strategy), processes in runs.items():
        alone = runs.get((optimizer, ALONE))
        step = max(process["step_ms"] for process in processes)
        share = max(process["optimizer_ms"] for process in processes)
        peak = max(process["peak"] or 0 for process in processes)
        sent = ", ".join(f"{kind} {count / MIB:,.0f}" for kind, count in processes[0]["sent"].items())
        scaling = alone[0]["step_ms"] / step if alone else None
        rows.append(
            [in_words(optimizer, strategy), len(processes), step, scaling, share, 100 * share / step, peak / MIB, sent]
        )
    columns = ["run", "GPUs", "step, ms", "scaling", "optimizer, ms", "of the step, %", "peak of a GPU, MiB"]
    show([*columns, "given to collectives in a step, MiB"], rows)
    for trained in {processes[0]["trained"] for processes in runs.values()}:
        print(f"trained: {trained:,} numbers\n")
    named = {in_words(*run): processes for run, processes in runs.items()}
    write(args.out, head, options={k: str(v) for k, v in vars(args).items()}, runs=named, failed=failed)
    if failed:
        sys.exit(f"failed, see above: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
