"""From a record to tokens and the tokens that count in the loss."""

import string
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlora.data.sources import Record
from lightning_rlora.errors import UserError


@dataclass(frozen=True)
class Example:
    """The tokens of one document (or of one window of it), at most ``max_length`` of them.

    Attributes:
        tokens: Token ids, int32 of shape (length,).
        loss: Which tokens the model is trained to predict, bool of shape (length,). The first one never counts: nothing
            stands before it, and in a packed row it would be predicted from another document.
    """

    tokens: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class Examples(Sequence[Example]):
    """All examples of a split in three flat arrays (five bytes a token), which worker processes share."""

    def __init__(self, examples: Iterable[Example]) -> None:
        tokens, loss, ends = array("i"), bytearray(), array("q", [0])
        for example in examples:
            tokens.frombytes(example.tokens.astype(np.int32).tobytes())
            loss += example.loss.astype(np.bool_).tobytes()
            ends.append(len(tokens))
        self.tokens = np.frombuffer(tokens, dtype=np.int32)
        self.loss = np.frombuffer(loss, dtype=np.bool_)
        self.ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Gives a view of one example."""
        part = slice(self.ends[index], self.ends[index + 1])
        return Example(self.tokens[part], self.loss[part])

    @property
    def checksum(self) -> int:
        """A number that other data would hardly have."""
        return zlib.crc32(self.tokens.data)

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of tokens, int64 of shape (examples,)."""
        return np.diff(self.ends)


class Template:
    """Text made from the fields of a record: the name of one field, or a format such as "Q: {question}"."""

    def __init__(self, template: str) -> None:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise UserError(f"the template {template!r} is broken ({error}): write {{{{ and }}}} for braces") from error
        if any(not name.isidentifier() for name in names):
            raise UserError(f"the template {template!r} may only name fields, as in 'Question: {{question}}'")
        self.is_field = "{" not in template and "}" not in template
        self.template = template
        self.names = [template] if self.is_field else names

    def __call__(self, record: Record, number: int) -> str:
        """Fills in the fields of a record (``number`` counts from 1 and is for error messages only)."""
        for name in self.names:
            value = field(record, name, number)
            if not isinstance(value, str) and (self.is_field or type(value) not in (int, float)):
                raise UserError(f"record {number}: the field {name!r} is a {type(value).__name__}, not a string")
        return str(record[self.template]) if self.is_field else self.template.format_map(record)


def field(record: Record, name: str, number: int) -> Any:
    """Looks up a field.

    Raises:
        UserError: There is no such field; the message lists those there are.
    """
    if name not in record:
        raise UserError(f"record {number} has no field {name!r}: its fields are {', '.join(map(str, record))}")
    return record[name]


class Encoder(ABC):
    """Turns records into examples and prompts with one tokenizer.

    Attributes:
        truncated: How many examples lost their end so far.
        dropped: How many examples had no token left to learn so far.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0
        self.dropped = 0
        opening = self.tokenizer("")["input_ids"]
        closes = opening[-1:] == [tokenizer.eos_token_id] and opening != [tokenizer.bos_token_id]
        self.opening: list[int] = opening[:-1] if closes else opening
        self.closing: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @abstractmethod
    def encode(self, records: Sequence[Record], first: int) -> Iterator[Example]:
        """Yields the examples of some records, the first of which is number ``first`` of its source (from 1)."""

    @abstractmethod
    def prompt(self, record: Record, number: int) -> tuple[str, list[int]]:
        """Gives the text after which the model is to write, and its tokens."""

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenises several texts without special tokens at the ends."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def finish(self, tokens: Sequence[int], loss: np.ndarray) -> Iterator[Example]:
        """Cuts an example to length and yields it unless nothing to learn is left."""
        self.truncated += len(tokens) > self.max_length
        loss = loss[: self.max_length].copy()
        loss[:1] = False
        if loss.any():
            yield Example(np.asarray(tokens[: self.max_length], dtype=np.int32), loss)
        else:
            self.dropped += 1


class TextEncoder(Encoder):
    """Plain text: every token counts; long documents become several windows."""

    def __init__(self, tokenizer: Any, max_length: int, text: str) -> None:
        super().__init__(tokenizer, max_length)
        self.text = Template(text)

    def encode(self, records: Sequence[Record], first: int) -> Iterator[Example]:
        """Yields the windows of each document.

        Neighbouring windows share one token, which the first of them predicts and the second starts from: so every
        token of a document but its first counts exactly once.
        """
        texts = [self.text(record, number) for number, record in enumerate(records, start=first)]
        for ids in self.ids([text for text in texts if text.strip()]):
            tokens = self.opening + ids + self.closing
            for start in range(0, len(tokens) - 1, self.max_length - 1):
                window = tokens[start : start + self.max_length]
                yield from self.finish(window, np.ones(len(window), dtype=np.bool_))

    def prompt(self, record: Record, number: int) -> tuple[str, list[int]]:
        """The text itself, to be continued."""
        text = self.text(record, number)
        return text, self.opening + self.ids([text])[0]


class AnswerEncoder(Encoder):
    """A prompt and its answer: the answer and the closing eos count.

    The two are tokenised apart, so that the prompt's tokens are those that generation starts from.
    """

    def __init__(self, tokenizer: Any, max_length: int, prompt: str, answer: str) -> None:
        super().__init__(tokenizer, max_length)
        self.prompt_text = Template(prompt)
        self.answer_text = Template(answer)

    def encode(self, records: Sequence[Record], first: int) -> Iterator[Example]:
        """Yields one example a record."""
        numbered = list(enumerate(records, start=first))
        prompts = self.ids([self.prompt_text(record, number) for number, record in numbered])
        answers = self.ids([self.answer_text(record, number) for number, record in numbered])
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = self.opening + prompt + answer + self.closing
            yield from self.finish(tokens, np.arange(len(tokens)) >= len(self.opening) + len(prompt))

    def prompt(self, record: Record, number: int) -> tuple[str, list[int]]:
        """The filled in prompt; the answer's fields need not exist."""
        text = self.prompt_text(record, number)
        return text, self.opening + self.ids([text])[0]


T_co = TypeVar("T_co", covariant=True)


class Encodes(Protocol[T_co]):
    """What makes examples of records."""

    def encode(self, records: Sequence[Record], first: int) -> Iterator[T_co]:
        """Yields the examples of some records, the first of which is number ``first`` of its source (from 1)."""


def encode_all(encoder: Encodes[T_co], records: Iterable[Record], chunk: int = 256) -> Iterator[T_co]:
    """Encodes a stream of records, ``chunk`` at a time because tokenizers are quick in batches."""
    waiting: list[Record] = []
    first = 1
    for record in records:
        waiting.append(record)
        if len(waiting) == chunk:
            yield from encoder.encode(waiting, first)
            first += chunk
            waiting = []
    yield from encoder.encode(waiting, first)


def warn_at_first_cut(encoder: Encoder, examples: Iterable[Example]) -> Iterator[Example]:
    """Warns once if examples of a stream are cut; how many will be is not known then."""
    warned = False
    for example in examples:
        if not warned and (encoder.truncated or encoder.dropped):
            rank_zero_warn(f"train: examples longer than max_length = {encoder.max_length} tokens lose their end")
            warned = True
        yield example
