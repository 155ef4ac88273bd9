"""TextData: fine-tuning data for causal language models."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_rlora.data.chat import ChatEncoder
from lightning_rlora.data.examples import (
    AnswerEncoder,
    Encoder,
    Example,
    Examples,
    TextEncoder,
    encode_all,
    warn_at_first_cut,
)
from lightning_rlora.data.loader import Collate, ResumableLoader, StreamLoader, shuffled
from lightning_rlora.data.packing import pack, packed_batch, padded_batch, prompt_batch
from lightning_rlora.data.source_data import SourceData
from lightning_rlora.data.tokenizer import pad_token
from lightning_rlora.errors import UserError


class TextData(SourceData):
    """Text, prompts with answers, or conversations, tokenised and packed for a causal language model.

    A source is a file (.json, .jsonl, .csv, .tsv, .parquet, .txt, .md; all but Parquet also as .gz, .bz2, .xz, .zst), a
    folder of such files, a glob, a data set of the hub ("user/name", or "user/name#split" for another split than the
    one in use), or "embedded:python-topics", the language reference that comes with Python.

    What an example is, is told by one of three: `text`, `prompt` with `answer`, or `messages`. With none of them each
    record's field "text" is learned.

    The batches of every epoch depend on nothing but the data, the seed and the epoch's number. A run resumed from a
    checkpoint goes on with the very next batch. Nothing is drawn from the global random number generators.

    Batches hold `input_ids`, `labels` (-100 where there is no loss) and either `position_ids` (packing) or
    `attention_mask` (padding), int64 of shape (batch_size, length). Batches of predict hold `input_ids` and
    `attention_mask`, padded on the left, and `prompt`, the list of texts.

    Call the model on packed rows with ``use_cache=False``, as training always should be: with a cache, transformers
    ignores the borders between documents without a word.

    Args:
        train: Source or list of sources to train on.
        validation: Source or list of sources to validate on. Without one, a part of the training documents is held out
            (embedded sets have a held-out part of their own; a stream holds out nothing).
        test: Source or list of sources to test on.
        predict: Source or list of sources of prompts to continue.
        hub_config: Configuration name of the hub data sets, as "main" for openai/gsm8k.
        text: Field (or template such as "{title}: {body}") to learn as a whole; long documents become several windows.
        prompt: Field or template such as "Question: {question} Answer:", which is not learned.
        answer: Field or template such as " {answer}", which is learned with the end-of-text token after it.
        messages: Field with a list of {role, content}, rendered by the tokenizer's chat template; what the assistant
            says is learned.
        tokenizer: Hub id, folder, embedded name or a tokenizer object. Without one the model's own is used.
        max_length: Longest row in tokens. Longer prompts with answers and longer conversations lose their end.
        batch_size: Rows per batch and process.
        packing: Whether to fill rows of max_length tokens with as many examples as fit (none sees another) instead of
            padding single examples.
        validation_fraction: Part of the training documents that is held out when there is no validation source.
        streaming: Whether to read the training data as they are needed instead of keeping them in memory.
        shuffle_buffer: How many examples a stream keeps waiting in order to shuffle them.
        prompt_length: Longest prompt of predict in tokens; longer ones lose their beginning. Without it, what
            max_length leaves beside the model's max_new_tokens (or half, if the model names none).
        num_workers: Processes that make batches (0: the training process itself; a stream uses at most one).
        seed: Seeds the held-out part and the order of the examples.

    Raises:
        UserError: An argument is wrong, or a source cannot be read.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        hub_config: str | None = None,
        text: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        messages: str | None = None,
        tokenizer: str | Any | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = True,
        validation_fraction: float = 0.05,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        prompt_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if validation is None and isinstance(train, str) and train.startswith("embedded:"):
            validation = train
        super().__init__(
            {"train": train, "validation": validation, "test": test, "predict": predict},
            hub_config=hub_config,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            num_workers=num_workers,
            seed=seed,
        )
        self.text, self.prompt, self.answer, self.messages = text, prompt, answer, messages
        self.packing = packing
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.prompt_length = prompt_length
        self._check_arguments()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches to train on, from the place at which the trainer stands."""
        if not self.streaming:
            return super().train_dataloader()
        common = self._training()
        encoder = self._encoder()  # one example here, so that wrong input is found before a worker starts
        first = next(encode_all(encoder, self._records("train")), None)
        self._check_some_left("train", encoder, first is not None)
        return StreamLoader(self._stream, **common)

    def predict_dataloader(self) -> DataLoader:
        """Prompts without answers, padded on the left, one process making them all."""
        return DataLoader(
            self._prompts("predict", self._records("predict")),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            collate_fn=partial(prompt_batch, pad=pad_token(self._tokenizer())),
            generator=torch.Generator(),
        )

    def _prompts(self, name: str, records: Iterable[dict[str, Any]]) -> list[tuple[str, list[int]]]:
        """The prompts of some records to generate from, and their tokens; long ones lose their beginning."""
        encoder = self._encoder()
        prompts = [encoder.prompt(record, number) for number, record in enumerate(records, start=1)]
        if not prompts:
            raise UserError(f"{name}: there are no records")
        if not all(ids for _, ids in prompts):
            raise UserError(
                f"{name}: a prompt is empty and the tokenizer puts nothing before it: leave such records out"
            )
        longest = self._longest_prompt()
        cut = sum(len(ids) > longest for _, ids in prompts)
        if cut:
            rank_zero_warn(
                f"{name}: {cut} of {len(prompts)} prompts lost their beginning: they are longer than prompt_length ="
                f" {longest} tokens"
            )
        return [(text, ids[-longest:]) for text, ids in prompts]

    def _check_arguments(self) -> None:
        kinds = {"text": self.text, "prompt/answer": self.prompt or self.answer, "messages": self.messages}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
        if (self.prompt is None) != (self.answer is None):
            raise UserError("`prompt` and `answer` belong together: give both")
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}: a row needs at least 2 tokens, one to predict another")
        for name in ("shuffle_buffer", "prompt_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def _encode(self, name: str, records: Iterable[dict[str, Any]]) -> Examples:
        encoder = self._encoder()
        examples = Examples(encode_all(encoder, records))
        self._check_some_left(name, encoder, len(examples))
        if encoder.truncated or encoder.dropped:
            rank_zero_warn(
                f"{name}: {encoder.truncated} of {len(examples) + encoder.dropped} examples were cut to max_length ="
                f" {self.max_length} tokens; {encoder.dropped} were left out because nothing to learn remained"
            )
        return examples

    def _check_some_left(self, name: str, encoder: Encoder, count: int) -> None:
        if not count and encoder.dropped:
            raise UserError(
                f"{name}: in none of {encoder.dropped} examples anything to learn lies within the first max_length ="
                f" {self.max_length} tokens: raise max_length or check the answers"
            )
        if not count:
            raise UserError(f"{name}: the data set is empty")

    def _stream(self, epoch: int) -> Iterator[Sequence[Example]]:
        """The rows of an epoch of streamed training data."""
        encoder = self._encoder()
        examples = encode_all(encoder, self._records("train"))
        if epoch == 0:
            examples = warn_at_first_cut(encoder, examples)
        examples = shuffled(examples, self.shuffle_buffer, self._random(epoch, 0))
        return pack(examples, len, self.max_length) if self.packing else ([example] for example in examples)

    def _rows(self, examples: Examples, shuffle: bool) -> Sequence[Sequence[int]]:
        """Which examples each row holds.

        Rows are packed once: no example sees its neighbours, so an epoch needs new company no more than a new length,
        and every epoch has the same number of batches, which Lightning asks for only once.
        """
        if not self.packing:
            return np.arange(len(examples))[:, None]  # type: ignore[return-value]
        order = self._random(0, 2).permutation(len(examples)) if shuffle else np.arange(len(examples))
        return list(pack(order.tolist(), examples.lengths.tolist().__getitem__, self.max_length))

    def _longest_prompt(self) -> int:
        if self.prompt_length is not None:
            return self.prompt_length
        new_tokens = getattr(self._module, "max_new_tokens", self.max_length // 2)
        if new_tokens >= self.max_length:
            raise UserError(f"max_length is {self.max_length}: that leaves no prompt beside {new_tokens} new tokens")
        return self.max_length - new_tokens

    def _collate(self) -> Collate:
        if self.packing:
            return partial(packed_batch, row_length=self.max_length, pad=pad_token(self._tokenizer()))
        return partial(padded_batch, pad=pad_token(self._tokenizer()))

    def _encoder(self) -> Encoder:
        tokenizer = self._tokenizer()
        if self.messages is not None:
            return ChatEncoder(tokenizer, self.max_length, self.messages)
        if self.prompt is not None and self.answer is not None:
            return AnswerEncoder(tokenizer, self.max_length, self.prompt, self.answer)
        return TextEncoder(tokenizer, self.max_length, self.text or "text")
