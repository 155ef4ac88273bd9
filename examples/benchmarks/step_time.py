"""`optimizer.step()` alone: Riemannion against AdamW on adapters of Llama-3-8B's seven projections.

    python examples/benchmarks/step_time.py --out step_time.json            # ranks 4 to 128, and the variants at 16
    python examples/benchmarks/step_time.py --model quickstart              # the quickstart's shapes, on a CPU
    python examples/benchmarks/step_time.py --growth --out growth.json      # over rank, width and number of adapters
    python examples/benchmarks/step_time.py --plot growth.json growth.png   # draws that
    python examples/benchmarks/step_time.py --profile                       # synchronisations, launches, allocations

AdamW is `fused=True` on a GPU and `foreach=True` on a CPU. "Latency" is a step from an idle device to an idle device,
"back to back" one of ten that are queued at once; gradients move to other addresses before each measurement. The floor
is the time that the device's memory needs for two passes over factors, gradients and momenta, at the bandwidth of a
large copy measured in the same run.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import MIB, ON_GPU, TO_MS, copy_bandwidth, header, parser, show, write
from contestant import ADAMW, RIEMANNION, VARIANTS, compare, floor_bytes
from growth import growth, plot
from llama import llama_3_8b, projection_shapes, quickstart
from profile_step import profile_step


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    if args.plot:
        plot(*args.plot)
        return
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.model == "quickstart":
        config, adapter = quickstart()
        ranks = args.ranks or [adapter["r"]]
    else:
        config = llama_3_8b(args.layers, args.shrink)
        ranks = args.ranks or ([4, 8, 16, 32, 64, 128] if ON_GPU else [4, 8, 16])
    shapes = projection_shapes(config)
    variants_at = 16 if 16 in ranks else ranks[0]
    head = header(argv)
    if args.profile:
        write(args.out, head, profile=profile_step(shapes, variants_at))
        return
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n")
    if args.growth:
        write(args.out, head, growth=growth(shapes, ranks, args.repeats, args.seconds, bandwidth))
        return
    print(f"{len(shapes)} adapters, milliseconds (medians of {args.repeats})\n")
    ladder = {rank: compare(ADAMW | RIEMANNION, shapes, rank, args.repeats, args.seconds) for rank in ranks}
    floors = {rank: floor_bytes(shapes, rank) / bandwidth * TO_MS for rank in ranks}
    show_ladder(ladder, floors)
    print(f"all optimizers at rank {variants_at}\n")
    variants = compare(ADAMW | RIEMANNION | VARIANTS, shapes, variants_at, args.repeats, args.seconds)
    show_variants(variants)
    write(args.out, head, bandwidth=bandwidth, ranks=ladder, floor_ms=floors, variants=variants)


def options(argv: Sequence[str] | None) -> Namespace:
    made = parser(__doc__)
    made.add_argument("--model", choices=["llama", "quickstart"], default="llama")
    made.add_argument("--ranks", type=int, nargs="+")
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--seconds", type=float, default=20, help="limit for one optimizer set, rank and timing")
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--growth", action="store_true")
    mode.add_argument("--profile", action="store_true")
    mode.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PNG"))
    return made.parse_args(argv)


def show_ladder(ladder: dict[int, dict[str, Any]], floors: dict[int, float]) -> None:
    for key in ("latency_ms", "back_to_back_ms"):
        print(key.removesuffix("_ms").replace("_", " "))
        rows = []
        for rank, results in ladder.items():
            adamw, ours = (results[name][key] for name in ("AdamW", "Riemannion"))
            repeats = results["Riemannion"][f"{key}_repeats"]
            rows.append([rank, adamw, ours, ours / adamw, floors[rank], ours / floors[rank], repeats])
        show(["rank", "AdamW", "Riemannion", "ratio", "floor", "Riemannion / floor", "repeats"], rows)
    rows = []
    for rank, results in ladder.items():
        adamw, ours = (results[name]["state_bytes"] for name in ("AdamW", "Riemannion"))
        rows.append([rank, adamw / MIB, ours / MIB, ours / adamw, results["Riemannion"]["construction_s"]])
    show(["rank", "AdamW's state, MiB", "Riemannion's state, MiB", "ratio", "Riemannion(...), s"], rows)


def show_variants(variants: dict[str, Any]) -> None:
    adamw = variants["AdamW"]
    rows = [
        [name, *(value for k in ("latency_ms", "back_to_back_ms", "state_bytes") for value in (r[k], r[k] / adamw[k]))]
        for name, r in variants.items()
    ]
    show(["optimizer", "latency", "/ AdamW", "back to back", "/ AdamW", "state, bytes", "/ AdamW"], rows)


if __name__ == "__main__":
    main()
