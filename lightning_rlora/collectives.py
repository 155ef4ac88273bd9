"""What the processes of a run do together; where there is only one, it is left as it is."""

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process on its node, from 0; known before the processes have met."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; plain data or tensors on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the means over all processes in the place of gradients, which travel together, once.

    A gradient that is None counts as zero: to ask the others whether they have one would make the host wait for the
    device. All processes get the very same bits, since each sum is formed in one place.
    """
    if world_size() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for together in _alike(gradients):
        buffer = torch.cat([gradient.flatten() for gradient in together])
        distributed.all_reduce(buffer)
        _spread(buffer.div_(world_size()), together)


@torch.no_grad()
def take_first(tensors: Iterable[Tensor]) -> None:
    """Put the first process's values in the place of tensors."""
    if world_size() == 1:
        return
    for together in _alike(tensors):
        buffer = torch.cat([tensor.flatten() for tensor in together])
        distributed.broadcast(buffer, 0)
        _spread(buffer, together)


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of one dtype and device together."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype, tensor.device].append(tensor)
    return list(found.values())


def _spread(buffer: Tensor, tensors: list[Tensor]) -> None:
    parts = buffer.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
