"""What each ingredient of whitened Riemannion is worth: a table of the baseline with one thing changed at a time.

Every ingredient is trained at several rates, so that none is judged at another's, and from several seeds, all at once
on one frozen base. Writes rows.jsonl and table.md, and goes on where it was stopped.

    python examples/ablation/ablation.py --quick --output runs/ablation
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from ingredients import BASELINE, INGREDIENTS, Ingredient
from many_adapters import Batch, Run, train, validation_losses
from whitened_step import AdamW

from lightning_rlora.data import TextData
from lightning_rlora.errors import UserError
from lightning_rlora.files import write_atomically
from lightning_rlora.modules.base_model import load_base, load_tokenizer
from lightning_rlora.modules.packing import check_packing

QUICK = {"rank": 4, "steps": 20, "rows": 4, "max_length": 64, "validation_batches": 4}
QUICK |= {"rates": [0.07, 0.14, 0.28], "adamw_rates": [0.006, 0.012, 0.024], "seeds": [0]}
Row = dict[str, Any]


def template(text: str) -> str:
    return text.replace("\\n", "\n")  # which a shell leaves as it is


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="embedded:tiny-lm", help="folder, hub id or embedded name of a causal LM")
    parser.add_argument("--train", default="embedded:python-topics", help="a source as TextData takes it")
    parser.add_argument("--validation", help="another one; embedded sources bring their own")
    parser.add_argument("--prompt", type=template, help="of what is not learned, with --answer; \\n is a new line")
    parser.add_argument("--answer", type=template, help="of what is learned; without both, the field text is")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--max-length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--validation-batches", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.14, 0.2, 0.28, 0.4], help="relative ones")
    parser.add_argument("--adamw-rates", type=float, nargs="+", default=[0.006, 0.009, 0.012, 0.018])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of start and order of the data")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these ingredients, and the baseline")
    parser.add_argument("--quick", action="store_true", help="other defaults: shows that it runs, and tells nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.validation is None and not args.train.startswith("embedded:"):
        parser.error("give --validation beside --train: every seed would hold out other documents")
    if unknown := set(args.only or []) - {ingredient.name for ingredient in INGREDIENTS}:
        parser.error(f"no ingredient is called {sorted(unknown)[0]!r}; ingredients.py lists them")
    return args


class Data:
    """Training batches of every seed and validation batches, on a device.

    Args:
        args: The command line.
        steps: Training batches of a seed.
        device: Where they are wanted.
    """

    def __init__(self, args: argparse.Namespace, steps: int, device: torch.device) -> None:
        tokenizer = load_tokenizer(args.base, trust_remote_code=False)
        modules = {
            seed: TextData(
                train=args.train,
                validation=args.validation,
                prompt=args.prompt,
                answer=args.answer,
                tokenizer=tokenizer,
                max_length=args.max_length,
                batch_size=args.rows,
                seed=seed,
            )
            for seed in args.seeds
        }
        self.train = {seed: on(device, islice(full_batches(module), steps)) for seed, module in modules.items()}
        validation = modules[args.seeds[0]].val_dataloader()
        self.validation = on(device, islice(validation, args.validation_batches))


def on(device: torch.device, batches: Iterable[Batch]) -> list[Batch]:
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def full_batches(data: TextData) -> Iterator[Batch]:
    """Training batches, epoch after epoch, without the short ones: runs of all seeds have equally many rows."""
    loader = data.train_dataloader()
    if len(loader.dataset) < data.batch_size:
        raise UserError(f"the training data fill {len(loader.dataset)} rows, less than a batch: lower --rows")
    for epoch in count():
        for batch in loader.batches(epoch, 0):
            if len(batch["input_ids"]) == data.batch_size:
                yield batch


def trained(model: Any, ingredient: Ingredient, data: Data, args: argparse.Namespace) -> list[Row]:
    """The rows of one ingredient: all its rates and seeds at once."""
    start = perf_counter()
    rates = args.adamw_rates if isinstance(ingredient.method, AdamW) else args.rates
    runs = [Run(rate, seed) for rate in rates for seed in args.seeds]
    steps = ingredient.budgets * args.steps
    batches = {seed: found[:steps] for seed, found in data.train.items()}
    adapters, finite = train(model, ingredient.method, runs, args.rank, batches)
    found = torch.where(finite, validation_losses(model, adapters, data.validation), math.nan).tolist()
    seconds = round(perf_counter() - start, 1)
    return [
        {"ingredient": ingredient.name, "steps": steps, "rate": run.rate, "seed": run.seed, "seconds": seconds}
        | {"loss": loss if math.isfinite(loss) else None}  # null: it diverged
        for run, loss in zip(runs, found, strict=True)
    ]


def best(rows: Sequence[Row]) -> tuple[float, list[float]] | None:
    """The rate of the least mean loss over the seeds, and the losses there; a rate at which one diverged is none."""
    losses: dict[float, list[float | None]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        losses[row["rate"]].append(row["loss"])
    whole = {rate: [x for x in found if x is not None] for rate, found in losses.items() if None not in found}
    return min(whole.items(), key=lambda item: statistics.fmean(item[1])) if whole else None


def spread(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def table(rows: Sequence[Row]) -> str:
    """The ingredients at their best rates, in Markdown."""
    of = {x.name: [row for row in rows if row["ingredient"] == x.name] for x in INGREDIENTS}
    baseline = best(of[BASELINE.name])
    lines = [
        "Mean and standard deviation over the seeds; differences are taken seed by seed. *: the best rate is at an end",
        "of those that were tried, so a better one may lie beyond.\n",
        "| ingredient | idea | best rate | validation loss | minus the baseline's | diverged |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, idea, *_ in INGREDIENTS:
        if not of[name]:
            continue
        diverged = f"{sum(row['loss'] is None for row in of[name])} of {len(of[name])}"
        rates = [row["rate"] for row in of[name]]
        if (found := best(of[name])) is None:
            lines.append(f"| {name} | {idea} | | | | {diverged} |")
            continue
        rate, losses = found
        edge = "*" if rate in (min(rates), max(rates)) else ""
        less = ""
        if baseline is not None and name != BASELINE.name:
            differences = [one - other for one, other in zip(losses, baseline[1], strict=True)]
            less = f"{statistics.fmean(differences):+.4f}{spread(differences)}"
        loss = f"{statistics.fmean(losses):.4f}{spread(losses)}"
        lines.append(f"| {name} | {idea} | {rate:g}{edge} | {loss} | {less} | {diverged} |")
    return "\n".join(lines) + "\n"


def rows_so_far(args: argparse.Namespace) -> list[Row]:
    """What an earlier run left, if it was asked for the same."""
    settings = {name: x for name, x in vars(args).items() if name not in ("output", "only", "quick")}
    kept, done = args.output / "settings.json", args.output / "rows.jsonl"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise UserError(f"{args.output} holds an ablation with other settings: give another --output")
    write_atomically(kept, (json.dumps(settings, indent=2) + "\n").encode())
    return [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []


def wanted(args: argparse.Namespace, rows: Sequence[Row]) -> list[Ingredient]:
    """The ingredients that are asked for and have no rows yet."""
    done = {row["ingredient"] for row in rows}
    asked = [x for x in INGREDIENTS if args.only is None or x is BASELINE or x.name in args.only]
    return [ingredient for ingredient in asked if ingredient.name not in done]


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rows = rows_so_far(args)
    if left := wanted(args, rows):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        model = load_base(args.base, dtype=dtype, quantization=None, trust_remote_code=False)
        model.eval().requires_grad_(False).to(device)
        check_packing(model)
        data = Data(args, max(ingredient.budgets for ingredient in left) * args.steps, device)
    for ingredient in left:
        new = trained(model, ingredient, data, args)
        rows += new
        write_atomically(args.output / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_atomically(args.output / "table.md", table(rows).encode())
        print(f"{ingredient.name}: {new[0]['seconds']:g} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
