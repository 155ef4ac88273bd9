"""The arithmetic that steps are computed in, whatever that of the model is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast and no TF32: factors must keep the digits of their dtype."""
    # read a backend at a time: torch.get_float32_matmul_precision raises where these newer switches were used
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
