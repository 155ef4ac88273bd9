"""Which learning rates of A and B are best as a network gets wider: the analysis of LoRA+ (arXiv 2402.12354) in small.

Two models are trained for a few steps from LoRA's start (A random, B zero) over a grid of (rate of A, rate of B), at
several widths and from several seeds, all cells of a grid at once:

- linear: f(x) = (W* + b a^T) x with one output, rank one and one example, by gradient descent, as in the paper's toy;
- two-layer: f(x) = w^T relu((W + B A) relu(V x)), where A and B train by Adam and all else is frozen, with entries of w
  of order n^-1/2, as networks are usually started, and of order n^-1, where features are learnt at every width.

What is compared is the mean loss over the steps, so it counts how soon it falls.

Writes a table to standard output and the heat maps to a PNG.

    python examples/lora_plus/toy.py --output examples/lora_plus/rates.png
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Losses (len(rates_a), len(rates_b)): mean over steps, geometric mean over seeds; infinite where one diverged."""

    model: str
    width: int
    rates_a: Tensor
    rates_b: Tensor
    losses: Tensor

    def best(self) -> tuple[int, int]:
        return divmod(int(self.losses.argmin()), len(self.rates_b))

    def at_one_rate(self) -> float:
        """The best loss with one rate for both."""
        equal = (self.rates_a[:, None] / self.rates_b - 1).abs() < 1e-6
        return float(self.losses[equal].min())

    def good_ratios(self) -> Tensor:
        """The ratios of all cells whose loss is at most 1.05 times the best one."""
        return (self.rates_b / self.rates_a[:, None])[self.losses <= 1.05 * self.losses.min()]


def powers(low: int, high: int) -> Tensor:
    return 2.0 ** torch.arange(low, high + 1, dtype=torch.float64)


def linear(width: int, seeds: int, steps: int = 10) -> Grid:
    """Gradient descent on (f(x) - y)^2 / 2 for one x with entries of order 1, W* x and y of order 1."""
    rates_a, rates_b = powers(-18, 0), powers(-8, 4)
    rate_a, rate_b = rates_a.view(1, -1, 1, 1), rates_b.view(1, 1, -1, 1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, a = normal(seeds, 1, 1, width), normal(seeds, 1, 1, width) / math.sqrt(width)
    pretrained = (normal(seeds, 1, 1, width) / math.sqrt(width) * x).sum(-1, keepdim=True)
    y = normal(seeds, 1, 1, 1)
    # a only ever moves along x, so the whole grid needs two numbers a cell: a^T x and b
    projection, square = (a * x).sum(-1, keepdim=True), x.square().sum(-1, keepdim=True)
    shape = (seeds, len(rates_a), len(rates_b), 1)
    projection, b = projection.expand(shape).clone(), torch.zeros(shape, dtype=torch.float64)
    total = torch.zeros(shape, dtype=torch.float64)
    for _ in range(steps):
        error = pretrained + b * projection - y
        total += error.square() / 2
        projection, b = projection - rate_a * b * square * error, b - rate_b * projection * error
    return Grid("linear", width, rates_a, rates_b, geometric_mean(total.squeeze(-1) / steps))


def two_layer(
    width: int, seeds: int, *, output_power: float, steps: int = 50, rank: int = 4, inputs: int = 5, examples: int = 64
) -> Grid:
    """Adam on the mean square error against y = sin(sum x / sqrt(inputs)); frozen weights of variance 1 / fan-in."""
    rates_a, rates_b = powers(-13, -2), powers(-9, 2)
    cells = len(rates_a) * len(rates_b)
    rate_a = rates_a.float().repeat_interleave(len(rates_b)).view(-1, 1, 1)
    rate_b = rates_b.float().repeat(len(rates_a)).view(-1, 1, 1)
    losses = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(rows, columns, generator=generator)

        x = normal(inputs, examples)
        y = torch.sin(x.sum(0) / math.sqrt(inputs))
        hidden = torch.relu(normal(width, inputs) / math.sqrt(inputs) @ x)
        pretrained = normal(width, width) / math.sqrt(width) @ hidden
        out = normal(1, width) / width**output_power
        a = (normal(rank, width) / math.sqrt(width)).expand(cells, rank, width).clone()
        b = torch.zeros(cells, width, rank)
        moments = [torch.zeros_like(p) for p in (a, a, b, b)]
        total = torch.zeros(cells)
        for step in range(1, steps + 1):
            down = a @ hidden
            active = torch.baddbmm(pretrained, b, down).relu_()
            error = out @ active - y  # (cells, 1, examples)
            total += error.square().mean((1, 2))
            # the gradient with respect to what relu was given
            active = active.sign_().mul_(error / examples).mul_(out.mT)
            gradients = (b.mT @ active) @ hidden.mT, active @ down.mT
            for p, rate, gradient, m, v in zip(
                (a, b), (rate_a, rate_b), gradients, moments[::2], moments[1::2], strict=True
            ):
                m.lerp_(gradient, 0.1)
                v.lerp_(gradient.square(), 0.001)
                p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-12)
        losses.append((total / steps).view(len(rates_a), len(rates_b)))
    return Grid(f"two-layer, w ~ n^-{output_power:g}", width, rates_a, rates_b, geometric_mean(torch.stack(losses)))


def geometric_mean(losses: Tensor) -> Tensor:
    """Over the seeds, the first dimension; the floor keeps one exact fit from counting without bound."""
    mean = losses.double().nan_to_num(nan=math.inf).clamp_min(1e-8).log().mean(0).exp()
    return mean.where(losses.isfinite().all(0), math.inf)


def table(grids: list[Grid]) -> str:
    rows = [
        "| model | width | best rate of A | best rate of B | best ratio | ratios within 5 % of the best loss | "
        "loss there | best loss at ratio 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for grid in grids:
        i, j = grid.best()
        ratios = grid.good_ratios()
        rows.append(
            f"| {grid.model} | {grid.width} | {grid.rates_a[i]:.2g} | {grid.rates_b[j]:.2g} | "
            f"{grid.rates_b[j] / grid.rates_a[i]:g} | {ratios.min():g} to {ratios.max():g} | "
            f"{grid.losses[i, j]:.2e} | {grid.at_one_rate():.2e} |"
        )
    return "\n".join(rows)


def slope(grids: list[Grid]) -> float:
    """The power of the width that the best ratio grows with, by least squares."""
    widths = torch.tensor([math.log(grid.width) for grid in grids])
    ratios = torch.stack([(grid.rates_b[j] / grid.rates_a[i]).log() for grid in grids for i, j in [grid.best()]])
    widths = widths - widths.mean()
    return float((widths * ratios).sum() / widths.square().sum())


def draw(rows: list[list[Grid]], path: Path) -> None:
    """One heat map a model and width; the best cell is marked, and the lines are ratios 1 and 16."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(3.4 * columns, 3.4 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(all_axes, rows, strict=True):
        finite = torch.cat([grid.losses[grid.losses.isfinite()] for grid in row]).log10()
        for axes, grid in zip(axes_row, row, strict=True):
            x, y = grid.rates_a.log2(), grid.rates_b.log2()
            image = axes.pcolormesh(
                x, y, grid.losses.log10().mT, vmin=float(finite.min()), vmax=min(1.0, float(finite.max())), cmap="magma"
            )
            i, j = grid.best()
            axes.plot(x[i], y[j], "*", color="cyan", markersize=14)
            for ratio, style in ((1, "-"), (16, "--")):
                axes.plot(x, x + math.log2(ratio), style, color="white", linewidth=1)
            axes.set(title=f"{grid.model}: width {grid.width}", xlabel="log2 rate of A", xlim=(x[0] - 0.5, x[-1] + 0.5))
            axes.set(ylim=(y[0] - 0.5, y[-1] + 0.5), facecolor="0.6")
        axes_row[0].set_ylabel("log2 rate of B")
        figure.colorbar(image, ax=axes_row[-1], label="log10 loss")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("rates.png"), help="the heat maps")
    parser.add_argument(
        "--seeds", type=int, default=4, help="of the two-layer network; the linear one takes 512 times as many"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="of the two-layer network"
    )
    args = parser.parse_args()
    rows = [
        [linear(width, 512 * args.seeds) for width in (64, 256, 1024, 2048, 4096)],
        *([two_layer(width, args.seeds, output_power=p) for width in args.widths] for p in (0.5, 1.0)),
    ]
    for row in rows:
        print(table(row))
        print(f"\n{row[0].model}: the ratio grows like width^{slope(row):.2f}\n")
    draw(rows, args.output)


if __name__ == "__main__":
    main()
