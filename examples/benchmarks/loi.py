"""Locally optimal initialisation of Llama-3-8B's adapters (random weights), beside the backward passes it consists of.

    python examples/benchmarks/loi.py --rank 16 --batches 4 --power-steps 1 --out loi.json

The passes alone are 2 (power steps + 1) forward and backward passes of the adapted model over every batch. LOI is timed
as it is by default, which shifts the base by the start, and with the base left alone. These three take turns. PEFT's
LoRA-GA, whose preparation stores the whole gradient of every adapted weight from one pass over the same batches, is
timed afterwards, preparation and start together. Peak memory stands beside that of a training step with AdamW.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bench import MIB, ON_GPU, TO_MS, header, interleaved, latency, parser, show, write
from llama import PROJECTIONS, Batch, adapted_llama, backward, llama_3_8b, random_tokens, training_memory
from memory import adamw
from torch import nn

from lightning_rlora.adapters import find_pairs, get_offset
from lightning_rlora.init import locally_optimal_init

Results = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--rank", type=int, default=16 if ON_GPU else 4)
    made.add_argument("--batches", type=int, default=4)
    made.add_argument("--batch", type=int, default=8 if ON_GPU else 2, help="texts of a batch")
    made.add_argument("--length", type=int, default=128 if ON_GPU else 32, help="tokens of a text")
    made.add_argument("--power-steps", type=int, default=1)
    made.add_argument("--oversampling", type=int, default=16)
    made.add_argument("--repeats", type=int, default=3)
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    head = header(argv)
    config = llama_3_8b(args.layers, args.shrink)
    model = adapted_llama(config, args.rank)
    batches = [random_tokens(config, args.batch, args.length) for _ in range(args.batches)]
    pairs = len(find_pairs(model))
    step_peak = training_memory(model, adamw, batches[0])["peak"]

    results = compare(model, batches, args.repeats, args.power_steps, args.oversampling)
    base = model.unload()  # type: ignore[operator]
    results["PEFT's LoRA-GA"] = lora_ga(base, batches, args.rank, args.repeats)

    passes = 2 * (args.power_steps + 1) * args.batches
    print(f"{pairs} adapters, rank {args.rank}, {args.batches} batches of {args.batch} x {args.length} tokens\n")
    plain = results["passes"]["ms"]
    rows = []
    for name, result in results.items():
        if "failed" in result:
            rows.append([name, result["failed"], None, None, None, None])
            continue
        peak = result["peak"]
        rows.append(
            [
                f"{passes} passes" if name == "passes" else name,
                result["ms"] / TO_MS,
                f"{min(result['all_ms']) / TO_MS:.3f}-{max(result['all_ms']) / TO_MS:.3f}",
                result["ms"] / plain,
                peak and peak / MIB,
                peak and peak / step_peak,
            ]
        )
    show(["", "seconds", "range", "/ passes", "peak, MiB", "/ training step's"], rows)
    if step_peak:
        print(f"peak of a training step with AdamW: {step_peak / MIB:,.0f} MiB")
    write(args.out, head, options={k: str(v) for k, v in vars(args).items()}, step_peak=step_peak, results=results)


class Measured:
    """Runs things between idle and idle, and keeps their times and peaks."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.times: list[float] = []

    def run(self, thing: Callable[[], object]) -> float:
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.times.append(latency(thing))
        if ON_GPU:
            self.peaks.append(torch.cuda.max_memory_allocated())
        return self.times[-1]

    def result(self) -> dict[str, Any]:
        peak = max(self.peaks, default=None)
        return {"ms": statistics.median(self.times), "all_ms": self.times, "peak": peak}


def compare(model: nn.Module, batches: list[Batch], repeats: int, power_steps: int, oversampling: int) -> Results:
    """The passes alone and LOI, with and without a shift of the base, in turn."""

    def backward_all() -> None:
        for tokens in batches:
            backward(model, tokens)

    def passes() -> None:
        for _ in range(2 * (power_steps + 1)):
            backward_all()
            model.zero_grad(set_to_none=True)

    def loi(subtract: bool) -> None:
        locally_optimal_init(
            model,
            backward_all,
            oversampling=oversampling,
            power_steps=power_steps,
            subtract=subtract,
            generator=torch.Generator().manual_seed(0),
        )

    things: dict[str, Callable[[], None]] = {
        "passes": passes,
        "LOI": lambda: loi(True),
        "LOI, base left alone": lambda: loi(False),
    }
    measured: dict[str, Measured] = {}

    def timed(name: str) -> float:
        with as_adapted(model):
            return measured[name].run(things[name])

    for rounds in (1, repeats):  # a warm-up first, which is not kept
        measured = {name: Measured() for name in things}
        interleaved({name: lambda name=name: timed(name) for name in things}, rounds)
    return {name: kept.result() for name, kept in measured.items()}


@contextmanager
def as_adapted(model: nn.Module) -> Iterator[None]:
    """B = 0, as PEFT starts it; afterwards the base is shifted back (not to the last bit)."""
    pairs = find_pairs(model)
    with torch.no_grad():
        for pair in pairs:
            pair.b.zero_()
    try:
        yield
    finally:
        for pair in pairs:
            if (offset := get_offset(pair)) is not None:
                offset.remove()


def lora_ga(base: nn.Module, batches: list[Batch], rank: int, repeats: int) -> dict[str, Any]:
    """LoRA-GA's preparation and start; where it does not run, why."""
    measured = Measured()
    try:
        from peft import LoraConfig, LoraGAConfig, get_peft_model
        from peft.tuners.lora.loraga import preprocess_loraga

        def start() -> None:
            config = LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=PROJECTIONS,
                init_lora_weights="lora_ga",
                lora_ga_config=LoraGAConfig(),
            )
            preprocess_loraga(base, config, lambda: [backward(base, tokens) for tokens in batches])
            get_peft_model(base, config).unload()

        for _ in range(repeats):
            measured.run(start)
    except Exception as error:  # another package's; whatever the reason, the rest of the table stands
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return measured.result()


if __name__ == "__main__":
    main()
