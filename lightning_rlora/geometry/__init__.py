"""The fixed-rank manifold and its small linear algebra: pure functions on batched tensors, torch only."""

from lightning_rlora.geometry.fixed_rank import (
    RANK_TOLERANCE,
    Point,
    Tangent,
    inner,
    norm,
    orthogonalize,
    point_to_dense,
    project,
    random_point,
    random_tangent,
    retract,
    tangent_to_dense,
    transport,
)
from lightning_rlora.geometry.randomized_svd import Svd, randomized_svd

__all__ = [
    "RANK_TOLERANCE",
    "Point",
    "Svd",
    "Tangent",
    "inner",
    "norm",
    "orthogonalize",
    "point_to_dense",
    "project",
    "random_point",
    "random_tangent",
    "randomized_svd",
    "retract",
    "tangent_to_dense",
    "transport",
]
