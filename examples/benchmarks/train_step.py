"""A whole training step of Llama-3-8B (random weights, bfloat16, LoRA on all projections): Riemannion against AdamW.

    python examples/benchmarks/train_step.py --rank 16 --out train_step.json
    python examples/benchmarks/train_step.py --model sd2 --rank 8 --batch 4

The other models are UNets of Stable Diffusion 1.5, 2 and XL with LoRA on their attention layers.

Forward and backward under bfloat16 autocast, `optimizer.step()` and `zero_grad()`. One model carries an adapter for
each optimizer, and blocks of a few steps take turns. Launching a model of this size from Python takes about as long as
its kernels run, so that the host's load, not the optimizer, decides most of the noise; a second comparison therefore
replays forward and backward from a CUDA graph. Memory is measured for one optimizer after the other, alone.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench import MIB, ON_GPU, header, interleaved, latency, parser, show, write
from llama import Batch, adapted_llama, backward, llama_3_8b, random_tokens, training_memory, training_step
from memory import OPTIMIZERS
from peft import PeftModel
from torch.optim import Optimizer

COMPARED = {name: OPTIMIZERS[name] for name in ("AdamW", "Riemannion")}


class Side:
    """One optimizer's training, of an adapter of its own."""

    def __init__(self, model: PeftModel, name: str, make: Callable[[PeftModel], Optimizer], batch: Batch) -> None:
        self.model, self.name, self.batch = model, name, batch
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
        self.optimizer = make(model)
        self.graph: Any = None

    def block(self, steps: int) -> float:
        """Milliseconds of a step."""
        self.model.set_adapter(self.name)
        return latency(lambda: [self.step() for _ in range(steps)]) / steps

    def step(self) -> None:
        if self.graph is None:
            self.loss = training_step(self.model, self.optimizer, self.batch)
        else:
            self.graph.replay()  # the gradients stay where they are, and are written anew
            self.optimizer.step()

    def capture(self) -> None:
        """Replay forward and backward from now on."""
        self.model.set_adapter(self.name)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = backward(self.model, self.batch)


def compare(sides: dict[str, Side], blocks: int, steps: int) -> dict[str, Any]:
    """Medians of the sides' steps, and of the ratios of neighbouring blocks."""
    runs = {name: lambda side=side: side.block(steps) for name, side in sides.items()}
    interleaved(runs, 2)  # warm-up
    times = interleaved(runs, blocks)
    for name, side in sides.items():
        assert float(side.loss) < 1e4, f"{name} diverged"
    ratios = [ours / theirs for ours, theirs in zip(times["Riemannion"], times["AdamW"], strict=True)]
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {"step_ms": medians, "ratio": statistics.median(ratios), "ratios": ratios, "blocks_ms": times}


def made_model(args: argparse.Namespace) -> tuple[PeftModel, Batch, str]:
    """The model, what it is trained on, and both in words."""
    if args.model == "llama":
        config = llama_3_8b(args.layers, args.shrink)
        batch: Batch = random_tokens(config, args.batch, args.length)
        return adapted_llama(config, args.rank), batch, f"{args.layers} layers, {args.batch} x {args.length} tokens"
    from unet import adapted_unet, random_latents, stable_diffusion  # the others do without diffusers

    unet = stable_diffusion(args.model, args.shrink)
    size = unet["sample_size"]
    what = f"{args.model}'s UNet, {args.batch} latents of {size} x {size}"
    return adapted_unet(unet, args.rank), random_latents(unet, args.batch), what


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--model", choices=["llama", "sd15", "sd2", "sdxl"], default="llama")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--blocks", type=int, default=12)
    made.add_argument("--steps", type=int, default=5, help="steps of a block")
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    head = header(argv)
    model, batch, what = made_model(args)
    memory = {name: training_memory(model, make, batch) for name, make in COMPARED.items()}

    sides = {name: Side(model, name, make, batch) for name, make in COMPARED.items()}
    results = {"launched from Python": compare(sides, args.blocks, args.steps)}
    if ON_GPU:
        for side in sides.values():
            side.capture()
        results["replayed"] = compare(sides, args.blocks, args.steps)

    print(f"{what}, rank {args.rank}, {args.blocks} blocks each\n")
    rows = [
        [how, *r["step_ms"].values(), r["ratio"], f"{min(r['ratios']):.4f}-{max(r['ratios']):.4f}"]
        for how, r in results.items()
    ]
    show(["forward and backward", *(f"{name}, ms" for name in COMPARED), "ratio of neighbours, median", "range"], rows)
    rows = [[name, m["state"] / MIB, m["peak"] and m["peak"] / MIB] for name, m in memory.items()]
    show(["optimizer", "state, MiB", "peak of a step, MiB"], rows)
    write(args.out, head, options={k: str(v) for k, v in vars(args).items()}, results=results, memory=memory)


if __name__ == "__main__":
    main()
