"""Stacking by shape against the function called on one matrix after another."""

import pytest
import torch

from lightning_rlora.geometry.stacks import stacked_by_shape


@pytest.mark.parametrize("chunk", [1, 25, 10**6])
def test_stacked_by_shape(chunk, monkeypatch):
    monkeypatch.setattr("lightning_rlora.geometry.stacks._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4, 2), (3, 2), (3, 3), (3, 2)]
    xs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ys = [torch.randn(shape[0], generator=generator, dtype=torch.float64) for shape in shapes]
    xs[2] = xs[2].float()  # never stacked with another dtype
    calls = []

    def both(x, y):
        calls.append(len(x))
        return x.mT @ x, y.to(x).sum(-1)

    found = stacked_by_shape(both, xs, ys)
    for x, y, (gram, total) in zip(xs, ys, found, strict=True):
        torch.testing.assert_close(gram, x.mT @ x)
        torch.testing.assert_close(total, y.to(x).sum())
    assert sorted(calls) == {1: [1] * 5, 25: [1, 1, 1, 2], 10**6: [1, 1, 1, 2]}[chunk]
