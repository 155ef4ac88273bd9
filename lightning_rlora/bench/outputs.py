"""The table as Markdown, CSV and JSON, and results in the layout of PEFT's method_comparison."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any

from lightning_rlora.bench.curves import interpolate
from lightning_rlora.bench.pilot import explain_choice
from lightning_rlora.bench.plan import Plan
from lightning_rlora.bench.rates import RateWindow
from lightning_rlora.bench.results import Result
from lightning_rlora.bench.table import Row, Score

Cells = dict[str, str]


def cells(row: Row, reference: Row | None) -> Cells:
    """What a row shows, by column.

    Args:
        row: The row.
        reference: The reference's row, for the share of its steps.
    """
    to_reference = "not reached" if reference else ""
    if row.steps_to_reference is not None and reference is not None and reference.steps_to_reference is not None:
        to_reference = f"{row.steps_to_reference:.0f}"
        if row is not reference and row.steps_to_reference > 0:
            to_reference += f" ({reference.steps_to_reference / row.steps_to_reference:.2f}x)"
    window = row.window
    diverged_everywhere = math.isinf(row.loss)
    return {
        "method": row.method,
        "steps": str(row.steps),
        "best rate": "" if diverged_everywhere else f"{row.rate:g}" + (" (edge)" if row.edge else ""),
        "validation loss": "diverged" if diverged_everywhere else number_with_spread(row),
        **{name.replace("_", " "): _shown(name, score) for name, score in row.scores.items()},
        "rates within 1 %": ""
        if diverged_everywhere or window is None
        else ("≥ " if window.open_low or window.open_high else "") + f"x{window.ratio:.2g}",
        "steps to reference": to_reference,
        "seconds to reference": _number(row.seconds_to_reference),
        "ms per step": _number(row.seconds_per_step, 1000),
        "peak memory": _size(row.peak_memory),
        "trained parameters": "" if row.parameters is None else f"{row.parameters:,}",
        "adapter": _size(row.adapter_bytes),
        "diverged": f"{row.diverged} of {row.runs}",
    }


def number_with_spread(row: Row) -> str:
    """A loss with its standard deviation over seeds, how many these were, and whether all rates have as many."""
    spread = "" if row.spread is None else f" ± {row.spread:.4f}"
    return f"{row.loss:.4f}{spread} (n={row.seeds}{'' if row.complete else ', incomplete'})"


def reference_row(rows: Iterable[Row], plan: Plan) -> Row | None:
    """The row whose loss the others are to reach, if it has one yet."""
    found = [row for row in rows if (row.method, row.steps) == (plan.reference, plan.steps[0])]
    return found[0] if found and math.isfinite(found[0].loss) else None


def markdown(tables: dict[str, list[Row]], results: Iterable[Result], plan: Plan) -> str:
    """All tables, ready for a README, with the failed runs named below each."""
    failed = Counter((result.task, result.method) for result in results if result.status == "failed")
    parts = []
    for task, rows in tables.items():
        parts.append(f"### {task}\n")
        if rows:
            reference = reference_row(rows, plan)
            lines = [cells(row, reference) for row in rows]
            parts.append("| " + " | ".join(lines[0]) + " |")
            parts.append("| " + " | ".join("---" for _ in lines[0]) + " |")
            parts += ["| " + " | ".join(line.values()) + " |" for line in lines]
        parts.append("")
        left_out = [
            f"{method} ({count} run{'s' * (count > 1)})" for (of, method), count in failed.items() if of == task
        ]
        if left_out:
            parts.append(f"Failed, to be tried again at the next start: {', '.join(left_out)}.\n")
    return "\n".join([*parts, explanation(plan), ""])


def explanation(plan: Plan) -> str:
    """What the columns mean, in a few sentences."""
    choice = (
        "at the best of the rates tried by that very mean; incomplete: some rates have fewer seeds yet, and are left "
        "out of the choice; (edge): no rate was compared below or above."
    )
    window = ""
    if plan.pilot is not None:
        choice = (
            f"at the rate that a pilot chose: {explain_choice(plan)}; incomplete: seeds are missing yet; (edge): the "
            "pilot tried no rate below or above."
        )
        window = " They are the pilot's, and empty where it was not, or is not done."
    return (
        "Validation loss: cross-entropy in nats (per token, of language models), or the mean squared error of "
        "diffusion models, at the last step, mean and standard deviation over n "
        f"seeds, {choice} Scores such as the accuracy (of classes "
        "or, of language models, next tokens) are of the same runs. Rates within 1 %: highest over lowest rate around "
        f"the best whose loss is at most 1 % above the best (≥: as far as was tried).{window} Reference: the "
        f"loss at the end of {plan.reference} with its best rate and {plan.steps[0]} steps; in brackets its steps over "
        "the method's; each run decays its rate over its own budget. Seconds of training leave validations out; where "
        "several runs shared a device, they slowed each other down."
    )


def as_csv(tables: dict[str, list[Row]]) -> str:
    """All rows as numbers, one table."""
    text = io.StringIO(newline="")
    flat = [_flat(row) for rows in tables.values() for row in rows]
    if flat:
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()


def as_json(tables: dict[str, list[Row]]) -> str:
    """All rows with their losses by rate; an infinite loss is null."""
    content = {
        task: [
            _flat(row) | {"loss_by_rate": [[rate, _finite(loss)] for rate, loss in row.by_rate.items()]} for row in rows
        ]
        for task, rows in tables.items()
    }
    return json.dumps(content, indent=1, allow_nan=False)


def peft_layout(result: Result) -> dict[str, Any]:
    """A run in the layout of the result files of PEFT's method_comparison.

    Where that layout has the accuracy of generated answers, which is not measured here, there is null; validation
    losses stand beside it as `valid loss`. Memory on a CPU is the process's.
    """
    config, cost = result.config, result.cost
    model = config["model"].get("init_args", {})
    data = config.get("data", {}).get("init_args", {})
    trainer = config.get("trainer", {})
    optimizer = dict(model["optimizer"].get("init_args", {}))
    base = model.get("base") or model.get("pipeline") or "embedded:tiny-lm"
    scheduler = (model.get("lr_scheduler") or {}).get("class_path", "LinearWithWarmup")
    seconds = [(0, 0.0), *((step, value) for step, value in cost.get("seconds", []))]
    metrics: list[dict[str, Any]] = []
    samples = cost.get("samples", 0) / result.steps
    for (before, _), (step, loss) in pairwise(result.validation):
        losses = [value for at, value in result.train if before < at <= step]
        metrics.append(
            {
                "step": step,
                "valid accuracy": None,
                "valid loss": loss,
                "train loss": statistics.fmean(losses) if losses else None,
                "train samples": round(samples * step),
                "train time": interpolate(seconds, step) - interpolate(seconds, before),
                "elapsed time": interpolate(seconds, step),
            }
        )
    metrics.append(
        {
            "step": result.steps,
            "test accuracy": None,
            "valid loss": result.loss,
            "train loss": metrics[-1]["train loss"] if metrics else None,
            "train samples": cost.get("samples", 0),
            "train total tokens": cost.get("tokens", 0),
        }
    )
    versions = result.meta["versions"]
    packages = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    return {
        "run_info": {
            "created_at": result.meta["created"],
            "total_time": result.meta["total_seconds"],
            "experiment_name": f"{result.task}/{result.method}-steps{result.steps}-lr{result.rate:g}-seed{result.seed}",
            "peft_branch": None,
            "train_config": {
                "model_id": base,
                "dtype": model.get("dtype", "float32"),
                "max_seq_length": data.get("max_length"),
                "batch_size": data.get("batch_size"),
                "max_steps": result.steps,
                "eval_steps": trainer.get("val_check_interval"),
                "compile": model.get("compile", False),
                "use_gc": model.get("gradient_checkpointing", False),
                "seed": result.seed,
                "grad_norm_clip": trainer.get("gradient_clip_val") or 0,
                "optimizer_type": model["optimizer"]["class_path"],
                "optimizer_kwargs": optimizer,
                "lr_scheduler": scheduler,
                "use_amp": "mixed" in str(trainer.get("precision", "")),
            },
            "peft_config": result.adapter.get("config", {}) | {"base_model_name_or_path": base},
            "error_msg": result.note,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": cost.get("memory_reserved_mean"),
            "accelerator_memory_max": cost.get("peak_memory"),
            "accelerator_memory_reserved_99th": cost.get("memory_reserved_99th"),
            "train_time": seconds[-1][1],
            "file_size": result.adapter.get("bytes"),
            "num_trainable_params": cost.get("trainable_parameters"),
            "num_total_params": cost.get("parameters"),
            "status": "success" if result.status == "finished" else "failed",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{name}-version": versions.get(name) for name in packages}
            | {"lightning-rlora-version": versions.get("lightning-rlora")},
            "system_info": result.meta["system"] | {"accelerator": cost.get("device")},
            "pytorch_info": None,
        },
    }


def _flat(row: Row) -> dict[str, Any]:
    """A row's numbers without its nested parts; an infinite loss is None."""
    values = {name: value for name, value in asdict(row).items() if name not in ("by_rate", "window", "scores")}
    for name, score in row.scores.items():
        values |= {name: score and score.mean, f"{name}_spread": score and score.spread}
    window = {f"window_{field.name}": getattr(row.window, field.name, None) for field in fields(RateWindow)}
    return values | {"loss": _finite(row.loss)} | window


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, factor: int = 1) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{factor * value:.0f}" if factor * value >= 100 else f"{factor * value:.3g}"


def _shown(name: str, score: Score | None) -> str:
    """Accuracies in per cent, other scores as they are."""
    if score is None:
        return ""
    percent = name == "accuracy"
    mean = f"{score.mean:.2%}" if percent else f"{score.mean:.4f}"
    return mean + (
        "" if score.spread is None else f" ± {100 * score.spread:.2f}" if percent else f" ± {score.spread:.4f}"
    )


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
