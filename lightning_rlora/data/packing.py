"""From examples to the rows of a batch: packed without waste, or padded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_rlora.data.examples import Example

T = TypeVar("T")
IGNORED = -100  # the label that the loss of every transformers model leaves out


def pack(items: Iterable[T], length: Callable[[T], int], row_length: int, open_rows: int = 64) -> Iterator[list[T]]:
    """Puts each item into the first open row that has room for it (first fit), in the order given.

    At most ``open_rows`` rows are open at a time, which bounds both time and memory and lets a stream be packed: when a
    new one is needed, the fullest is given out.

    Args:
        items: What to pack.
        length: Tells the length of an item, at most ``row_length``.
        row_length: What a row holds.
        open_rows: How many rows wait for a fitting item.

    Yields:
        The rows; every item is in exactly one.
    """
    rows: list[list[T]] = []
    room: list[int] = []
    for item in items:
        needed = length(item)
        row = next((i for i, free in enumerate(room) if free >= needed), len(rows))
        if row == open_rows:
            fullest = room.index(min(room))
            del room[fullest]
            yield rows.pop(fullest)
            row -= 1
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(item)
        room[row] -= needed
        if not room[row]:
            del room[row]
            yield rows.pop(row)
    yield from rows


def packed_batch(rows: Sequence[Sequence[Example]], row_length: int, pad: int) -> dict[str, Tensor]:
    """Makes a batch of packed rows.

    Positions restart at each example. Without an attention mask transformers takes that as the border between
    documents and lets no token see another document; the padding at a row's end is one more such document. It does so
    only when called with ``use_cache=False``.

    Args:
        rows: The examples of each row.
        row_length: Length of all rows.
        pad: Token that fills the end of a row.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, int64 of shape (rows, row_length).
    """
    shape = (len(rows), row_length)
    tokens, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions = np.empty(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            part = slice(start, start + len(example))
            tokens[i, part] = example.tokens
            labels[i, part] = np.where(example.loss, example.tokens, IGNORED)
            positions[i, part] = np.arange(len(example))
            start = part.stop
        positions[i, start:] = np.arange(row_length - start)
    return {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }


def padded_batch(rows: Sequence[Sequence[Example]], pad: int) -> dict[str, Tensor]:
    """Makes a batch of single examples, padded on the right to the longest.

    Args:
        rows: One example a row.
        pad: Token that fills the end of a row.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, int64 of shape (rows, longest).
    """
    longest = max(len(row[0]) for row in rows)
    batch = packed_batch(rows, longest, pad)
    del batch["position_ids"]
    lengths = torch.tensor([len(row[0]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def prompt_batch(prompts: Sequence[tuple[str, list[int]]], pad: int) -> dict[str, Tensor | list[str]]:
    """Makes a batch to generate from, padded on the left.

    Args:
        prompts: The text of each prompt and its tokens.
        pad: Token that fills the start of a row.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 of shape (prompts, longest), and the texts as ``prompt``.
    """
    longest = max(len(ids) for _, ids in prompts)
    tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in prompts])
    return {"input_ids": tokens, "attention_mask": mask, "prompt": [text for text, _ in prompts]}
