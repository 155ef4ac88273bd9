"""Memory that training Llama-3-8B's adapters takes with each optimizer.

    python examples/benchmarks/memory.py --ranks 16 64 --out memory.json

The training step is that of train_step.py. "Held" is what stays allocated between two steps, "peak" the most allocated
in a training step, "in step()" the most that the optimizer's step alone allocates beyond what it finds. On a CPU only
the optimizers' state is known.
"""

from collections.abc import Callable, Sequence

import torch
from bench import MIB, ON_GPU, header, parser, show, write
from llama import adapted_llama, llama_3_8b, random_tokens, trained, training_memory
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig

from lightning_rlora.optim import RiemannianSGD, Riemannion


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-4, **{"fused" if ON_GPU else "foreach": True})


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": adamw,
    "Riemannion": lambda model: Riemannion.for_model(model, lr=1e-3),
    "RiemannianSGD": lambda model: RiemannianSGD.for_model(model, lr=1e-3),
}
COLUMNS = {"state": "state", "held": "held", "peak": "peak", "reserved": "reserved", "inside_step": "in step()"}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--ranks", type=int, nargs="+", default=[16, 64] if ON_GPU else [4, 8])
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--length", type=int, default=128)
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    head = header(argv)
    config = llama_3_8b(args.layers, args.shrink)
    results = {rank: measure(adapted_llama(config, rank), config, args.batch, args.length) for rank in args.ranks}
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens, MiB\n")
    rows = []
    for rank, sizes in results.items():
        for name, r in sizes.items():
            shares = (r[key] and r[key] / sizes["AdamW"][key] for key in ("state", "peak"))
            rows.append([rank, name, *(r[key] and f"{r[key] / MIB:.1f}" for key in COLUMNS), *shares])
    show(["rank", "optimizer", *COLUMNS.values(), "state / AdamW's", "peak / AdamW's"], rows)
    write(args.out, head, options={k: str(v) for k, v in vars(args).items()}, results=results)


def measure(model: nn.Module, config: LlamaConfig, batch: int, length: int) -> dict[str, dict[str, int | None]]:
    tokens = random_tokens(config, batch, length)
    return {name: training_memory(model, make, tokens) for name, make in OPTIMIZERS.items()}


if __name__ == "__main__":
    main()
