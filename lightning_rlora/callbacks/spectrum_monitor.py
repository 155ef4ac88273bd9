"""Watching the singular values of every adapter, and the size of its update and of its gradient."""

import csv
import io
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlora.adapters import LoraPair, group_by_shape, matrix, offset_factors, scan
from lightning_rlora.callbacks.run_folder import cut_back
from lightning_rlora.errors import UserError
from lightning_rlora.files import write_plot

RANK_DEFICIENT = 1e-12
"""A factor whose R, of its QR, has a diagonal entry of at most this share of the largest counts as rank deficient."""

_ROWS = 60
"""Layers in one column of the figure, at most."""


class Spectrum(NamedTuple):
    """What is measured of one adapter, X = c B A.

    Attributes:
        singular_values: Of X, descending.
        update_norm: Frobenius norm of X - X0, the change of the pristine base; X0 is the base's offset.
        tangent_norm: Frobenius norm of P_X(G), the loss gradient as a tangent vector at X; NaN without a gradient or
            where a factor is rank deficient.
    """

    singular_values: list[float]
    update_norm: float
    tangent_norm: float

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of s / sum(s): r for equal singular values, 1 for a single one, NaN for X = 0."""
        total = sum(self.singular_values)
        if total == 0:
            return math.nan
        shares = [s / total for s in self.singular_values]
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@torch.no_grad()
def measure_pairs(pairs: list[LoraPair]) -> dict[str, Spectrum]:
    """Measure every pair, by the name of its layer, from the factors and their gradients alone.

    With B = Qb Rb and A^T = Qa Ra, X = Qb (c Rb Ra^T) Qa^T. Autograd's grad_B = c G A^T and grad_A = c B^T G give
    G Qa = grad_B Ra^-1 / c and G^T Qb = grad_A^T Rb^-1 / c, and |P_X(G)|^2 = |(I - Qb Qb^T) G Qa|^2 + |G^T Qb|^2. No
    balance of the factors is assumed. All in float64; pairs of one shape go as one batch.
    """
    measured: dict[str, Spectrum] = {}
    several = Counter(pair.name for pair in pairs)  # adapters that train on one layer
    names = {id(pair): f"{pair.name}.{pair.adapter}" if several[pair.name] > 1 else pair.name for pair in pairs}
    for group in group_by_shape(pairs):
        c = group[0].scaling
        b = torch.stack([matrix(pair.b) for pair in group]).double()
        at = torch.stack([matrix(pair.a).mT for pair in group]).double()
        qb, rb = torch.linalg.qr(b)
        ra = torch.linalg.qr(at, mode="r").R
        s = torch.linalg.svdvals(c * rb @ ra.mT)

        grad_b = torch.stack([_gradient(pair.b) for pair in group])
        grad_at = torch.stack([_gradient(pair.a).mT for pair in group])
        g_qa = torch.linalg.solve_triangular(ra, grad_b, upper=True, left=False) / c
        gt_qb = torch.linalg.solve_triangular(rb, grad_at, upper=True, left=False) / c
        tangent = torch.hypot(_norm(g_qa - qb @ (qb.mT @ g_qa)), _norm(gt_qb))
        tangent[_deficient(rb) | _deficient(ra)] = math.nan

        update = _norm(s.unsqueeze(-1))
        for i, pair in enumerate(group):
            offset = offset_factors(pair)
            if offset is not None:
                left = torch.cat([c * b[i], -offset[0].double()], 1)
                right = torch.cat([at[i], offset[1].double().mT], 1)
                update[i] = _norm(torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right, mode="r").R.mT)
        for pair, *values in zip(group, s.tolist(), update.tolist(), tangent.tolist(), strict=True):
            measured[names[id(pair)]] = Spectrum(*values)
    return {name: measured[name] for name in names.values()}


def _gradient(factor: Tensor) -> Tensor:
    """A factor's gradient as a matrix, NaN if it has none."""
    gradient = torch.full_like(factor, math.nan) if factor.grad is None else factor.grad
    return matrix(gradient).double()


def _deficient(root: Tensor) -> Tensor:
    """Whether a QR's R shows that a column depends on those before it."""
    diagonal = root.diagonal(dim1=-2, dim2=-1).abs()
    return diagonal.amin(-1) <= RANK_DEFICIENT * diagonal.amax(-1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x)


class SpectrumMonitor(Callback):
    """Log the singular values of every adapter, its effective rank, and the norms of its update and of its gradient.

    Measured right before an optimizer step (accumulated and reduced gradients, unscaled, not yet clipped), and once
    more at the end of the training, then without the gradient. It goes to every logger of the trainer as
    `spectrum/<layer>/effective_rank`, `s_max`, `s_min`, `update_norm` and `tangent_norm`; to spectrum.csv in the
    trainer's `default_root_dir`, a row for each step and layer with all singular values; and at the end to
    spectrum.png. `step` is the number of optimizer steps taken before. A resumed run cuts spectrum.csv back to its
    checkpoint's step and goes on with it. Needs whole factors: not for adapters that are sharded over processes.

    Measuring costs up to half a training step for 224 adapters of rank 16 on a Llama of 8B parameters, several steps
    for rank 64: measure more rarely there.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next; None measures nothing, and writes no files.

    Raises:
        UserError: If `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int | None = 10) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps = {every_n_steps} of SpectrumMonitor must be positive")
        self.every_n_steps = every_n_steps
        self._pairs: list[LoraPair] = []
        self._start = 0
        self._last: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters."""
        self._pairs = scan(pl_module).pairs if self.every_n_steps is not None else []
        self._start = trainer.global_step
        self._last = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if it is time."""
        interval = self.every_n_steps
        if interval is not None and trainer.global_step % interval == 0 and trainer.is_global_zero:
            self._record(trainer, measure_pairs(self._pairs))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the training arrived at, and draw it."""
        measured = measure_pairs(self._pairs)
        # gradients that are still there are the last step's, of another point
        self._record(trainer, {name: spectrum._replace(tangent_norm=math.nan) for name, spectrum in measured.items()})
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what was measured so far."""
        self._draw(trainer)

    def _record(self, trainer: Trainer, measured: dict[str, Spectrum]) -> None:
        step = trainer.global_step
        if step == self._last or not measured or not trainer.is_global_zero:
            return
        metrics = {}
        for name, spectrum in measured.items():
            metrics[f"spectrum/{name}/effective_rank"] = spectrum.effective_rank
            metrics[f"spectrum/{name}/s_max"] = spectrum.singular_values[0]
            metrics[f"spectrum/{name}/s_min"] = spectrum.singular_values[-1]
            metrics[f"spectrum/{name}/update_norm"] = spectrum.update_norm
            metrics[f"spectrum/{name}/tangent_norm"] = spectrum.tangent_norm
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in metrics.items() if not math.isnan(v)}, step=step)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._append(_path(trainer), step, measured)
        self._last = step

    def _append(self, path: Path, step: int, measured: dict[str, Spectrum]) -> None:
        rank = max(pair.shape[2] for pair in self._pairs)
        columns = ["step", "layer", "effective_rank", "update_norm", "tangent_norm"]
        columns += [f"s_{i + 1}" for i in range(rank)]
        if self._last is None:  # not earlier: until now the file may be an older run's, to be set aside
            cut_back(path, ",".join(columns) + "\n", self._start)
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for name, spectrum in measured.items():
                norms = [spectrum.effective_rank, spectrum.update_norm, spectrum.tangent_norm]
                padding = [""] * (rank - len(spectrum.singular_values))
                writer.writerow([step, name, *norms, *spectrum.singular_values, *padding])

    def _draw(self, trainer: Trainer) -> None:
        recorded = trainer.is_global_zero and self._last is not None
        if recorded and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            draw_spectra(_path(trainer))


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "spectrum.csv"


def draw_spectra(path: Path) -> None:
    """Draw spectrum.csv as spectrum.png beside it: the last singular values, and the effective ranks over the steps."""
    from matplotlib.figure import Figure

    effective_ranks: dict[str, dict[int, float]] = defaultdict(dict)
    last: dict[str, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if row[0] != "step":
                effective_ranks[row[1]][int(row[0])] = float(row[2])
                last[row[1]] = [math.log10(float(s)) if s and float(s) > 0 else math.nan for s in row[5:]]
    names, steps = list(last), sorted({step for ranks in effective_ranks.values() for step in ranks})
    labels = short_labels(names)
    table = [[effective_ranks[name].get(step, math.nan) for step in steps] for name in names]

    columns = -(-len(names) // _ROWS)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.5 + 5.2 * columns, 1.0 + 0.17 * max(rows, 14)), layout="constrained")
    grid = figure.subplots(1, 2 * columns, squeeze=False)[0]
    scales: list[dict[str, Any]] = [_range(last.values()), _range(table)]
    for column in range(columns):
        part = slice(column * rows, (column + 1) * rows)
        left, right = grid[2 * column], grid[2 * column + 1]
        spectra, rank_history = [last[name] for name in names[part]], table[part]
        images = [
            left.imshow(spectra, aspect="auto", interpolation="nearest", cmap="viridis", **scales[0]),
            right.imshow(rank_history, aspect="auto", interpolation="nearest", cmap="magma", **scales[1]),
        ]
        for axes in (left, right):
            axes.set_facecolor("lightgrey")  # zero, or not measured
            axes.set_ylim(rows - 0.5, -0.5)
        left.set_yticks(range(len(spectra)), labels[part], fontsize=7)
        left.set_xticks(*_ticks([str(i + 1) for i in range(len(spectra[0]))], 8), fontsize=7)
        left.set_xlabel("singular value", fontsize=8)
        right.set_yticks([])
        right.set_xticks(*_ticks([str(step) for step in steps], 4), fontsize=7)
        right.set_xlabel("optimizer step", fontsize=8)
        left.set_title(f"spectrum at step {steps[-1]}", fontsize=9)
        right.set_title("effective rank", fontsize=9)
    for image, label in zip(images[::-1], ("effective rank", "log10(s)"), strict=True):
        figure.colorbar(image, ax=list(grid), aspect=40, pad=0.01, label=label)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_plot(path.with_suffix(".png"), content.getvalue())


def _range(table: Any) -> dict[str, float]:
    finite = [value for row in table for value in row if math.isfinite(value)]
    return {"vmin": min(finite), "vmax": max(finite)} if finite else {}


def _ticks(labels: list[str], at_most: int) -> tuple[list[int], list[str]]:
    """Evenly spaced ticks."""
    positions = list(range(0, len(labels), -(-len(labels) // at_most)))
    return positions, [labels[i] for i in positions]


def short_labels(names: list[str]) -> list[str]:
    """Layer names without what all share, and without the words that only announce an index (layers.3 becomes 3)."""
    split = [name.split(".") for name in names]
    while all(len(words) > 1 and words[0] == split[0][0] for words in split):
        split = [words[1:] for words in split]
    short = [
        ".".join(w for i, w in enumerate(words) if i == 0 or i >= len(words) - 2 or not words[i + 1].isdigit())
        for words in split
    ]
    return short if len(set(short)) == len(short) else [".".join(words) for words in split]
