"""The report: one HTML file that needs nothing beside it, and the same pictures as PNG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml
from matplotlib import rc_context

from lightning_rlora.bench.outputs import cells, explanation, reference_row
from lightning_rlora.bench.plan import Plan
from lightning_rlora.bench.plots import figures
from lightning_rlora.bench.results import Result
from lightning_rlora.bench.table import Row
from lightning_rlora.files import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.7em; margin-bottom: .2em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #555; padding: .3em .7em; }
td { border-bottom: 1px solid #e4e4e4; padding: .3em .7em; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.reference td { background: #f2f2f2; } img { width: 100%; margin: 1em 0; } figure { margin: 0; }
figure.narrow { max-width: 800px; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; }
dt { color: #666; } dd { margin: 0; } pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12.5px; }
p.note { color: #555; font-size: 13px; } summary { cursor: pointer; }
"""
CAPTIONS = {
    "final_losses": "Final validation loss of each method at its best rate.",
    "curves": "Validation loss against optimizer steps at each method's best rate.",
    "rates": "Final validation loss against the learning rate, a panel for each method.",
    "scores": "What else validations measured, against optimizer steps, at the rate that the loss chose.",
}


def write_report(
    output: Path,
    plan: Plan,
    results: Sequence[Result],
    means: Sequence[Result],
    tables: dict[str, list[Row]],
    planned: int,
) -> None:
    """Write report.html and, for each task, its pictures as PNG files.

    Args:
        output: Folder of the comparison.
        plan: Of the comparison.
        results: All that the plan asks for and that exist, failed ones too.
        means: What `mean_of_tasks` made of them, if the plan asks for it.
        tables: Rows by task.
        planned: How many runs the plan asks for.
    """
    parts = [_header(plan, results, planned)]
    for task, rows in tables.items():
        parts.append(f"<h2>{escape(task)}</h2>")
        if not rows:
            parts.append("<p>No run of this task has ended yet.</p>")
            continue
        parts.append(_table(rows, plan))
        with rc_context({"svg.hashsalt": "rlora", "font.family": "DejaVu Sans"}):  # the same file for the same results
            for name, figure in figures(rows, [*results, *means], plan).items():
                png, svg = io.BytesIO(), io.BytesIO()
                figure.savefig(png, format="png", dpi=140)
                figure.savefig(svg, format="svg", metadata={"Date": None})
                write_atomically(output / f"{task}_{name}.png", png.getvalue())
                data = base64.b64encode(svg.getvalue()).decode()
                narrow = ' class="narrow"' if figure.get_figwidth() < 10 else ""
                parts.append(
                    f'<figure{narrow}><img alt="{CAPTIONS[name]}" src="data:image/svg+xml;base64,{data}"></figure>'
                )
    parts.append(f'<p class="note">{escape(explanation(plan))}</p>')
    parts.append(_details(plan, results))
    title = f"Comparison: {plan.name}"
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_atomically(output / "report.html", page.encode())


def _header(plan: Plan, results: Sequence[Result], planned: int) -> str:
    """What was compared, on what, and how much of it is done."""
    count = {status: sum(r.status == status for r in results) for status in ("finished", "diverged", "failed")}
    budgets = sorted({steps for method in plan.methods.values() for steps in method.steps})
    side_by_side = sorted({r.meta["side_by_side"] for r in results if "side_by_side" in r.meta})
    ended = [r for r in results if r.cost]
    days = sorted({r.meta["created"][:10] for r in results if r.meta})
    facts = {
        "Runs": ", ".join(f"{number} {status}" for status, number in count.items()) + f" of {planned} planned",
        "Methods": f"{len(plan.methods)}: {', '.join(plan.methods)}",
        "Tasks": ", ".join(plan.tasks),
        "Budget": f"{', '.join(map(str, budgets))} optimizer steps, each run with its own full schedule",
        "Seeds": ", ".join(map(str, plan.seeds)),
        "Reference": f"{plan.reference} at its best rate",
        "Device": ", ".join(sorted({r.cost["device"] for r in ended}))
        + (f"; {' or '.join(map(str, side_by_side))} run(s) side by side on it" if side_by_side else ""),
        "Versions": "; ".join(
            sorted({", ".join(f"{name} {v}" for name, v in r.meta["versions"].items()) for r in results if r.meta})
        ),
        "Dates": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
    }
    facts |= plan.sources
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text)
    return f"<p>{escape(plan.description)}</p><dl>{entries}</dl>"


def _table(rows: Sequence[Row], plan: Plan) -> str:
    reference = reference_row(rows, plan)
    lines = [cells(row, reference) for row in rows]
    head = "".join(f"<th>{escape(column)}</th>" for column in lines[0])
    body = "".join(
        f"<tr{' class=reference' if row is reference else ''}>"
        + "".join(f"<td>{escape(text)}</td>" for text in line.values())
        + "</tr>\n"
        for row, line in zip(rows, lines, strict=True)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(plan: Plan, results: Sequence[Result]) -> str:
    """Configurations, and the runs that failed."""
    parts = [("Common configuration", plan.common)]
    parts += [(f"Task {name}", config) for name, config in plan.tasks.items()]
    parts += [
        (f"Method {method.name}: rates {', '.join(f'{rate:g}' for rate in method.rates)}", method.config)
        for method in plan.methods.values()
    ]
    text = "".join(
        f"<h4>{escape(name)}</h4><pre>{escape(yaml.safe_dump(config, sort_keys=False))}</pre>" for name, config in parts
    )
    failed = [r for r in results if r.status == "failed"]
    text_failed = "".join(
        f"<li>{escape(r.task)}, {escape(r.method)}, rate {r.rate:g}, seed {r.seed}: {escape(r.note)}</li>"
        for r in failed
    )
    html = f"<details><summary>Configurations</summary>{text}</details>"
    return html + (f"<h2>Failed runs</h2><ul>{text_failed}</ul>" if failed else "")
