"""Calling batched functions on lists of matrices of many shapes."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_CHUNK = 2**25
"""Most entries of one stack: 256 MiB in float64."""


def stacked_by_shape(function: Callable[..., tuple[Tensor, ...]], *lists: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Call a batched function with the entries of lists stacked wherever shapes, dtypes and devices agree.

    Args:
        function: From batches (L, ...), one from each list, to a tuple of batches (L, ...).
        lists: Lists of equal length.

    Returns:
        For every position the tuple of its results.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, entries in enumerate(zip(*lists, strict=True)):
        groups[tuple((entry.shape, entry.dtype, entry.device) for entry in entries)].append(i)
    results: list[tuple[Tensor, ...]] = [()] * len(lists[0])
    for members in groups.values():
        at_once = max(1, _CHUNK // max(entries[members[0]].numel() for entries in lists))
        for start in range(0, len(members), at_once):
            chunk = members[start : start + at_once]
            found = function(*(torch.stack([entries[i] for i in chunk]) for entries in lists))
            for i, *result in zip(chunk, *found, strict=True):
                results[i] = tuple(result)
    return results
