"""Conversations: rendered by the tokenizer's chat template; only what the assistant says counts in the loss."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lightning_rlora.data.examples import Encoder, Example, field
from lightning_rlora.data.sources import Record
from lightning_rlora.errors import UserError

Message = dict[str, str]
Span = tuple[int, int]  # characters of the rendered conversation: first, one past the last


class ChatEncoder(Encoder):
    """A field with a list of {role, content}: the assistant's turns count, with the token that ends each of them."""

    def __init__(self, tokenizer: Any, max_length: int, messages: str) -> None:
        super().__init__(tokenizer, max_length)
        self.messages = messages
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: take one that has, or use `prompt` and `answer`")
        if not tokenizer.is_fast:
            raise UserError("conversations need a fast tokenizer (one of the tokenizers library)")
        self.template = tokenizer.get_chat_template()
        self.has_markers = re.search(r"{%-?\s*generation\s*-?%}", self.template) is not None

    def encode(self, records: Sequence[Record], first: int) -> Iterator[Example]:
        """Yields one example a conversation."""
        rendered = [self._spans(self._turns(record, n), n) for n, record in enumerate(records, start=first)]
        if not rendered:
            return
        texts = [text for text, _ in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            starts = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            loss = np.zeros(len(ids), dtype=np.bool_)
            for begin, end in spans:
                loss |= (starts >= begin) & (starts < end)
            yield from self.finish(ids, loss)

    def prompt(self, record: Record, number: int) -> tuple[str, list[int]]:
        """The conversation up to the assistant's last turn, which is left out if it is there."""
        turns = self._turns(record, number)
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        text = self._render(turns, number, add_generation_prompt=True)
        return text, self.ids([text])[0]

    def _spans(self, turns: list[Message], number: int) -> tuple[str, list[Span]]:
        """Renders a conversation and finds the characters that the assistant wrote."""
        if self.has_markers:
            return self._marked_spans(turns, number)
        text = self._render(turns, number)
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(turns[:i], number, add_generation_prompt=True) if i else ""
            after = self._render(turns[: i + 1], number)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"record {number}: the chat template renders earlier turns differently once later ones follow, so"
                    " the assistant's tokens cannot be found: take a template with {% generation %} markers"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _marked_spans(self, turns: list[Message], number: int) -> tuple[str, list[Span]]:
        """Takes the spans from the template's {% generation %} markers.

        They are those behind ``return_assistant_tokens_mask``. The mask itself ends at the first span that begins with
        a space, if the tokenizer leaves spaces out of its offsets; the spans do not.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors(number):
            rendered: Any = render_jinja_template(
                conversations=[turns],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        (text,), (spans,) = rendered
        return text, [(begin, end) for begin, end in spans]

    def _render(self, turns: list[Message], number: int, add_generation_prompt: bool = False) -> str:
        with _template_errors(number):
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )

    def _turns(self, record: Record, number: int) -> list[Message]:
        turns = field(record, self.messages, number)
        if not isinstance(turns, list) or not turns:
            raise UserError(f"record {number}: the field {self.messages!r} is not a list of {{role, content}}")
        for turn in turns:
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
                raise UserError(f"record {number}: a turn of {self.messages!r} lacks a role or content that is text")
        return turns


@contextmanager
def _template_errors(number: int) -> Iterator[None]:
    """Turns a template's refusal (roles out of order, say) into a `UserError`."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise UserError(f"record {number}: the chat template refuses the conversation: {error}") from error
