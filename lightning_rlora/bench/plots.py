"""The pictures of a comparison: final losses, curves, and the sweeps over the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from lightning_rlora.bench.curves import mean_curve
from lightning_rlora.bench.labels import label_ends
from lightning_rlora.bench.plan import PILOT, Plan
from lightning_rlora.bench.results import Curve, Result
from lightning_rlora.bench.table import Row

# six of Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that paper swallows and the
# black that is the reference's; the last, a violet, is none of theirs
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))


def figures(rows: Sequence[Row], results: Iterable[Result], plan: Plan) -> dict[str, Figure]:
    """The pictures of a task, by name.

    Args:
        rows: The task's table.
        results: All results; the task's are picked.
        plan: Of the comparison.
    """
    rows = [row for row in rows if math.isfinite(row.loss)]
    if not rows:
        return {}
    ended = [result for result in results if result.status != "failed"]
    groups = {
        _key(row): [r for r in ended if (r.task, r.method, r.steps) == (row.task, row.method, row.steps)]
        for row in rows
    }
    styles = _styles(rows, plan)
    sweep = {"rates": rates(rows, groups, styles, plan)}
    if rows[0].task == PILOT:  # the rest is told of all tasks
        return sweep
    drawn = {
        "final_losses": final_losses(rows, groups, styles, plan),
        "curves": curves(rows, groups, styles, plan),
        **sweep,
    }
    if any(score for row in rows for score in row.scores.values()):
        drawn["scores"] = scores(rows, groups, styles, plan)
    return drawn


Key = tuple[str, int]
Groups = Mapping[Key, Sequence[Result]]
Styles = Mapping[Key, dict]


def final_losses(rows: Sequence[Row], groups: Groups, styles: Styles, plan: Plan) -> Figure:
    """One line a method: its final losses at the best rate, a ring a seed, a bar for the mean."""
    figure = Figure(figsize=(8.5, 1.3 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = styles[_key(row)]["color"]
        losses = [result.loss for result in groups[_key(row)] if result.rate == row.rate]
        axes.plot([row.loss] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(losses, [place] * len(losses), "o", markerfacecolor="none", markeredgecolor=colour, markersize=6)
        axes.annotate(
            f"{row.loss:.4f}",
            (max(losses), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
        )
    reference = _reference(rows, plan)
    if reference:
        axes.axvline(reference.loss, color="black", linewidth=0.9, linestyle=":", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{_label(row, plan)}   rate {row.rate:g}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("validation loss at the end")
    key = "Bars: mean at the best rate; rings: seeds" + (f"; dotted: {plan.reference}" if reference else "")
    figure.suptitle(key, x=0.01, ha="left", fontsize=10)
    _tidy(axes, grid="x")
    return figure


def curves(rows: Sequence[Row], groups: Groups, styles: Styles, plan: Plan) -> Figure:
    """Loss against steps at each method's best rate, and its difference to the reference's."""
    reference = _reference(rows, plan)
    figure = Figure(figsize=(13 if reference else 8.5, max(5.2, 0.27 * len(rows) + 1.6)), layout="constrained")
    panels = figure.subplots(1, 2 if reference else 1, squeeze=False)[0]
    by_seed = {_key(row): _best_curves(row, groups) for row in rows}
    means = {key: mean_curve(list(found.values())) for key, found in by_seed.items()}
    _draw_curves(panels[0], rows, by_seed, styles, plan)
    early = sorted(next(loss for step, loss in mean if step >= 0.15 * mean[-1][0]) for mean in means.values())
    lowest = min(loss for found in by_seed.values() for curve in found.values() for _, loss in curve)
    top = early[len(early) // 2]  # what lies above is the same steep fall for all
    panels[0].set_ylim(lowest - 0.06 * (top - lowest), top + 0.06 * (top - lowest))
    panels[0].set_ylabel("validation loss")
    panels[0].set_title("Validation loss at each method's best rate", loc="left", fontsize=11)
    beside = []
    if reference:
        shifted = {key: _differences(found, by_seed[_key(reference)]) for key, found in by_seed.items()}
        beside = [row for row in rows if row.steps == reference.steps and shifted[_key(row)]]
        _draw_curves(panels[1], beside, shifted, styles, plan)
        late = [
            difference
            for row in beside
            for curve in shifted[_key(row)].values()
            for step, difference in curve
            if step >= 0.4 * reference.steps
        ]
        low = min(*late, -0.01)
        high = max(min(max(late), 2 * abs(low)), 0.01)
        panels[1].set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        panels[1].set_ylabel(f"validation loss minus that of {plan.reference}")
        panels[1].set_title(
            f"Difference to {plan.reference} at the same step: below zero is ahead", loc="left", fontsize=11
        )
        label_ends(panels[1], [_label(row, plan) for row in beside])
    few = len(rows) <= 6  # of many the names at the right tell enough
    label_ends(panels[0], [_label(row, plan) for row in rows if few or row not in beside])
    for axes in panels:
        _tidy(axes, grid="y")
    if any(row.seeds > 1 for row in rows):
        figure.supxlabel(
            "Lines: mean over seeds; bands: lowest to highest seed; differences between runs of the same seed",
            fontsize=9,
            color="#444444",
        )
    return figure


def scores(rows: Sequence[Row], groups: Groups, styles: Styles, plan: Plan) -> Figure:
    """Every score against steps, at the rate that the loss chose."""
    names = [name for name in plan.scores if any(row.scores[name] for row in rows)]
    figure = Figure(figsize=(1 + 6 * len(names), max(5.2, 0.27 * len(rows) + 1.6)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        by_seed = {
            _key(row): {r.seed: r.scores[name] for r in groups[_key(row)] if r.rate == row.rate and r.scores.get(name)}
            for row in rows
        }
        measured = [row for row in rows if mean_curve(list(by_seed[_key(row)].values()))]
        _draw_curves(axes, measured, by_seed, styles, plan)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=11)
        label_ends(axes, [_label(row, plan) for row in measured])
        _tidy(axes, grid="y")
    return figure


def rates(rows: Sequence[Row], groups: Groups, styles: Styles, plan: Plan) -> Figure:
    """One panel a method: final loss against the learning rate, with the diverged runs at the top."""
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.7 * lines + 0.7), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    lowest = min(result.loss for row in rows for result in groups[_key(row)])  # of single seeds
    worst_best = max(row.loss for row in rows)
    finite = [loss for row in rows for loss in row.by_rate.values() if math.isfinite(loss)]
    seeds = [result.loss for row in rows for result in groups[_key(row)] if result.rate == row.rate]
    best = min(finite)  # of a rate with fewer seeds, perhaps
    top = min(max(finite + seeds), max(worst_best + 0.5 * (worst_best - best), 1.06 * best))
    span = max(top - best, 1e-3)
    reference = _reference(rows, plan)
    for axes, row in zip(panels.flat, rows, strict=False):
        colour = styles[_key(row)]["color"]
        if reference:
            axes.axhline(reference.loss, color="black", linewidth=0.9, linestyle=":", zorder=1)
        if row.window is not None:
            axes.axvspan(row.window.low, row.window.high, color=colour, alpha=0.13, linewidth=0)
        shown = [(rate, loss) for rate, loss in row.by_rate.items() if math.isfinite(loss)]
        axes.plot(*zip(*shown, strict=True), color=colour, linewidth=1.8, zorder=3)
        for result in groups[_key(row)]:
            if result.status == "finished" and result.loss <= top + 0.04 * span:
                axes.plot(result.rate, result.loss, "o", color=colour, markersize=3.5, alpha=0.75, zorder=3)
        axes.plot(row.rate, row.loss, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour, zorder=4)
        out = [rate for rate, loss in row.by_rate.items() if math.isinf(loss)]
        axes.plot(out, [top + 0.07 * span] * len(out), "x", color=colour, markersize=7, markeredgewidth=2)
        above = [rate for rate, loss in row.by_rate.items() if top + 0.04 * span < loss < math.inf]
        axes.plot(above, [top + 0.07 * span] * len(above), "^", color=colour, markersize=6)
        low, high = min(row.by_rate), max(row.by_rate)
        margin = (high / low) ** 0.05 if high > low else 2.0  # a single rate stands in the middle
        axes.set_xlim(low / margin, high * margin)
        axes.set_xscale("log")
        axes.set_ylim(lowest - 0.08 * span, top + 0.14 * span)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_some(list(row.by_rate)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        title = f"{_label(row, plan)}\n{row.loss:.4f} at {row.rate:g}"
        axes.set_title(title, fontsize=9.5, color=colour, loc="left")
        _tidy(axes, grid="y")
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supylabel("validation loss at the end", fontsize=10)
    figure.get_layout_engine().set(hspace=0.06)  # type: ignore[union-attr, call-arg]
    key = "Ring: best rate; shaded: within 1 % of it"
    if plan.pilot and rows[0].task != PILOT:
        key = "Line: the pilot's seeds; ring: the best rate that it kept, all seeds; shaded: within 1 % of the lowest"
    key += "; x: diverged; triangle: off the scale" + (f"; dotted: {plan.reference} at its best" if reference else "")
    figure.supxlabel(f"learning rate\n{key}", fontsize=9)
    return figure


def _draw_curves(
    axes: Axes, rows: Sequence[Row], by_seed: Mapping[Key, Mapping[int, Curve]], styles: Styles, plan: Plan
) -> None:
    """For each row the mean over seeds and, of several, a band from the lowest to the highest."""
    for row in rows:
        found = list(by_seed[_key(row)].values())
        mean = mean_curve(found)
        steps = [step for step, _ in mean]
        axes.plot(steps, [value for _, value in mean], **styles[_key(row)], label=_label(row, plan))
        at = [[dict(curve)[step] for curve in found] for step in steps]
        band = [min(values) for values in at], [max(values) for values in at]
        axes.fill_between(steps, *band, color=styles[_key(row)]["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(row.steps for row in rows))


def _best_curves(row: Row, groups: Groups) -> dict[int, Curve]:
    """Validation losses by seed, at the best rate."""
    return {result.seed: result.validation for result in groups[_key(row)] if result.rate == row.rate}


def _differences(curves: Mapping[int, Curve], reference: Mapping[int, Curve]) -> dict[int, Curve]:
    """What each curve has more than the reference's of the same seed, after step 0."""
    differences = {}
    for seed in sorted(curves.keys() & reference.keys()):
        base = dict(reference[seed])
        differences[seed] = [(step, value - base[step]) for step, value in curves[seed] if step in base and step > 0]
    return differences


def _styles(rows: Sequence[Row], plan: Plan) -> dict[Key, dict]:
    """A colour for each method, the same on all tasks; black for the reference; dashes where colours repeat."""
    others = [name for name in plan.methods if name != plan.reference]
    styles = {}
    for row in rows:
        budgets = plan.methods[row.method].steps
        width = 2.2 if row.method == plan.reference else 1.7
        place = 0 if row.method == plan.reference else others.index(row.method)
        styles[_key(row)] = {
            "color": "black" if row.method == plan.reference else COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
            "linewidth": width - 0.5 * budgets.index(row.steps) if row.steps in budgets else width,
        }
    return styles


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.25, linewidth=0.7)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)


def _some(values: Sequence[float], most: int = 5) -> list[float]:
    """At most so many of sorted values, evenly picked, the last one included."""
    stride = math.ceil(len(values) / most)
    return list(values[::-1][::stride][::-1])


def _key(row: Row) -> Key:
    return row.method, row.steps


def _label(row: Row, plan: Plan) -> str:
    return row.method if row.steps == plan.steps[0] else f"{row.method}, {row.steps} steps"


def _reference(rows: Sequence[Row], plan: Plan) -> Row | None:
    return next((row for row in rows if _key(row) == (plan.reference, plan.steps[0])), None)
