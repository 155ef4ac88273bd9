"""Texts, or pairs of texts, with a label: from records to batches for a classifier."""

import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rlora.data.examples import Template, field
from lightning_rlora.data.sources import Record
from lightning_rlora.data.tokenizer import pad_token
from lightning_rlora.errors import UserError


@dataclass(frozen=True)
class LabelledText:
    """The tokens of one text or pair of texts, and its label.

    Attributes:
        tokens: Token ids, int32 of shape (length,).
        types: Which of the two texts each token belongs to (0 or 1), as the tokenizer counts it; int8 (length,).
        label: Number of the class, or the number to predict; nan where it is not known.
    """

    tokens: np.ndarray
    types: np.ndarray
    label: float


class LabelledTexts(Sequence[LabelledText]):
    """All examples of a split in flat arrays, which worker processes share."""

    def __init__(self, examples: Iterable[LabelledText]) -> None:
        tokens, types, labels, ends = array("i"), bytearray(), array("d"), array("q", [0])
        for example in examples:
            tokens.frombytes(example.tokens.astype(np.int32).tobytes())
            types += example.types.astype(np.int8).tobytes()
            labels.append(example.label)
            ends.append(len(tokens))
        self.tokens = np.frombuffer(tokens, dtype=np.int32)
        self.types = np.frombuffer(types, dtype=np.int8)
        self.labels = np.frombuffer(labels, dtype=np.float64)
        self.ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Gives a view of one example."""
        part = slice(self.ends[index], self.ends[index + 1])
        return LabelledText(self.tokens[part], self.types[part], float(self.labels[index]))

    @property
    def checksum(self) -> int:
        """A number that other data would hardly have."""
        return zlib.crc32(self.labels.data, zlib.crc32(self.tokens.data))


class LabelledTextEncoder:
    """Turns records into labelled texts with one tokenizer, by its own rules for single texts and pairs.

    Attributes:
        full: How many texts fill max_length tokens, and so may have lost their end.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, texts: Sequence[str], label: str, class_names: Sequence[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.texts = [Template(text) for text in texts]
        self.label = label
        self.numbers = {name: number for number, name in enumerate(class_names)}
        self.named_by_numbers = any(name.isdigit() for name in class_names)
        self.full = 0

    def encode(self, records: Sequence[Record], first: int) -> Iterator[LabelledText]:
        """Yields the examples of some records, the first of which is number ``first`` of its source (from 1)."""
        labels = [self._label(record, number) for number, record in enumerate(records, start=first)]
        for (tokens, types), label in zip(self.tokens(records, first), labels, strict=True):
            yield LabelledText(tokens, types, label)

    def tokens(self, records: Sequence[Record], first: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The token ids of some records and the text each belongs to; an empty text is one padding token."""
        if not records:
            return []
        numbered = list(enumerate(records, start=first))
        columns = [[text(record, number) for number, record in numbered] for text in self.texts]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        ids = [row or [pad_token(self.tokenizer)] for row in encoded["input_ids"]]
        types = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
        self.full += sum(len(row) == self.max_length for row in ids)
        return [
            (np.asarray(row, dtype=np.int32), np.asarray(kinds or [0], dtype=np.int8))
            for row, kinds in zip(ids, types, strict=True)
        ]

    def shown(self, record: Record) -> Record:
        """The fields of a record that its texts are made of."""
        return {name: record[name] for text in self.texts for name in text.names}

    def _label(self, record: Record, number: int) -> float:
        """The label as a number: a class is told by its name, or by its number where no class is named by one."""
        value = field(record, self.label, number)
        if not self.numbers:
            return _finite(value, number)
        if str(value) in self.numbers:
            return self.numbers[str(value)]
        if not self.named_by_numbers and str(value).isdigit() and int(value) < len(self.numbers):
            return int(value)
        known = ", ".join(self.numbers)
        raise UserError(
            f"record {number}: the label {value!r} is none of the model's {len(self.numbers)} classes ({known}): make "
            "the model's task, num_labels or class_names those of the data"
        )


def labelled_batch(
    rows: Sequence[Sequence[LabelledText]], pad: int, token_types: bool, classes: bool
) -> dict[str, Any]:
    """Makes a batch of labelled texts, padded on the right to the longest.

    Args:
        rows: One example a row.
        pad: Token that fills the end of a row.
        token_types: Whether the model is told which text a token belongs to.
        classes: Whether labels are classes, not numbers to predict.

    Returns:
        ``labels``, int64 or float32 of shape (rows,), and what `text_batch` returns.
    """
    batch = text_batch([(row[0].tokens, row[0].types) for row in rows], pad, token_types)
    labels = [row[0].label for row in rows]
    return {**batch, "labels": torch.tensor(labels, dtype=torch.int64 if classes else torch.float32)}


def text_batch(texts: Sequence[tuple[np.ndarray, np.ndarray]], pad: int, token_types: bool) -> dict[str, Tensor]:
    """Makes a batch of texts, padded on the right to the longest.

    Args:
        texts: The tokens of each text, and which of two texts each belongs to.
        pad: Token that fills the end of a row.
        token_types: Whether the model is told which text a token belongs to.

    Returns:
        ``input_ids``, ``attention_mask`` and, if asked for, ``token_type_ids``, int64 of shape (texts, longest).
    """
    lengths = torch.tensor([len(tokens) for tokens, _ in texts])
    shape = (len(texts), int(lengths.max()))
    ids, types = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, (tokens, kinds) in enumerate(texts):
        ids[i, : len(tokens)] = tokens
        types[i, : len(tokens)] = kinds
    mask = (torch.arange(shape[1]) < lengths[:, None]).long()
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": mask}
    return batch | ({"token_type_ids": torch.from_numpy(types)} if token_types else {})


def _finite(value: Any, number: int) -> float:
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        raise UserError(f"record {number}: the label {value!r} is no number, which the model is to predict")
    return label
