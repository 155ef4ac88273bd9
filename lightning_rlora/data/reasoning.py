"""ReasoningData: tasks to train on together and to answer one by one."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_rlora.data.chat import ChatEncoder
from lightning_rlora.data.examples import AnswerEncoder, Encoder
from lightning_rlora.data.packing import prompt_batch
from lightning_rlora.data.sources import is_on_hub, load_hub, read_records
from lightning_rlora.data.tasks import TASKS, Question
from lightning_rlora.data.text import TextData
from lightning_rlora.data.tokenizer import pad_token
from lightning_rlora.errors import UserError


class ReasoningData(TextData):
    """Commonsense and mathematics tasks, with the prompts of arXiv 2507.12142.

    The tasks are the eight of commonsense (boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge and
    openbookqa), gsm8k and metamath. By default each is its public set on the hub; the test sets are those with public
    answers, so for the first five what the hub calls validation, and metamath has none. A source of one's own (file,
    folder, glob or hub id, as in `TextData`) holds records with the same fields as the public set or, for all tasks, of
    `instruction`, `input`, `output` and `answer`.

    The training sets are joined and shuffled. A tokenizer with a chat template renders each question as a system and a
    user turn and the reply as the assistant's; without one they follow each other as plain text. The reply alone is
    learned.

    Batches to train and validate on are those of `TextData`. Batches to test on hold prompts to generate from, as those
    of predict do (`input_ids` and `attention_mask`, padded on the left, and the texts as `prompt`), and beside them the
    lists `task`, `number` (of the record in its set, from 1), `choices` (a tuple of the valid answers, empty where a
    number is asked for) and `gold` (the right answer, as `lightning_rlora.scoring.extract_answer` gives it). Each task
    has a loader of its own.

    Args:
        train: Tasks to train on: a list of names, or a dictionary from names to sources (null for the public set).
        test: Tasks to test on, likewise.
        tokenizer: Hub id, folder, embedded name or a tokenizer object. Without one the model's own is used.
        max_length: Longest row in tokens. Longer questions are not trained on if their replies lie beyond it.
        batch_size: Rows per batch and process.
        packing: Whether to fill rows of max_length tokens with as many examples as fit. Without it a row is an example,
            as the papers count their batches.
        validation_fraction: Part of the training records that is held out to validate on.
        prompt_length: Longest prompt to answer in tokens; longer ones lose their beginning. Without it, what max_length
            leaves beside the model's max_new_tokens.
        num_workers: Processes that make training batches (0: the training process itself).
        seed: Seeds the held-out part and the order of the examples.

    Raises:
        UserError: An argument is wrong, or a source cannot be read.
    """

    def __init__(
        self,
        train: list[str] | dict[str, str | None] | None = None,
        test: list[str] | dict[str, str | None] | None = None,
        tokenizer: str | Any | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = False,
        validation_fraction: float = 0.05,
        prompt_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            packing=packing,
            validation_fraction=validation_fraction,
            prompt_length=prompt_length,
            num_workers=num_workers,
            seed=seed,
        )
        self.tasks = {"train": _by_name(train), "test": _by_name(test)}

    def prepare_data(self) -> None:
        """Downloads public sets, on one process only."""
        for stage, tasks in self.tasks.items():
            for name in tasks:
                source, config = self._source(stage, name)
                if is_on_hub(source):
                    load_hub(source, stage, config, streaming=False)

    def test_dataloader(self) -> list[DataLoader]:  # type: ignore[override]
        """Questions to answer, a loader for each task, in the order of their sets."""
        self._need("test")
        return [self._test_loader(name) for name in self.tasks["test"]]

    def predict_dataloader(self) -> DataLoader:
        """Refuses: a test answers the questions."""
        raise UserError("there is nothing to predict here: a test answers the questions and keeps the replies")

    def _test_loader(self, name: str) -> DataLoader:
        questions = list(self._questions("test", name))
        prompts = self._prompts(name, map(_record, questions))
        rows: Any = []
        for number, (prompt, question) in enumerate(zip(prompts, questions, strict=True), start=1):
            if question.gold is None:
                raise UserError(f"{name}: record {number}: the answer is no number, so nothing can be scored by it")
            known = {"task": name, "number": number, "choices": question.choices, "gold": question.gold}
            rows.append((prompt, known))
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            collate_fn=partial(question_batch, pad=pad_token(self._tokenizer())),
            generator=torch.Generator(),
        )

    def _questions(self, stage: str, name: str) -> Iterator[Question]:
        source, config = self._source(stage, name)
        for number, record in enumerate(read_records(source, stage, config), start=1):
            try:
                yield TASKS[name].question(record, number)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error

    def _source(self, stage: str, name: str) -> tuple[str, str | None]:
        """The source of a task and its configuration on the hub."""
        task, source = TASKS[name], self.tasks[stage][name]
        if source is None:
            split = "train" if stage == "train" else task.test
            if split is None:
                raise UserError(
                    f"{name} has no public set to test on: give a source of your own, or test on another task"
                )
            source = f"{task.hub}#{split}"
        return source, task.config if source.partition("#")[0] == task.hub else None

    def _need(self, stage: str) -> list[str]:
        if not (tasks := self.tasks.get(stage)):
            raise UserError(f"no tasks for this: give `{stage}`")
        return list(tasks)

    def _records(self, stage: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
        for name in self._need(stage):
            yield from map(_record, self._questions(stage, name))

    def _encoder(self) -> Encoder:
        tokenizer = self._tokenizer()
        if getattr(tokenizer, "chat_template", None):
            return ChatEncoder(tokenizer, self.max_length, "messages")
        return AnswerEncoder(tokenizer, self.max_length, "prompt", "answer")


def question_batch(rows: Sequence[tuple[tuple[str, list[int]], dict[str, Any]]], pad: int) -> dict[str, Any]:
    """Makes a batch of prompts, padded on the left, and of what is known of each: every key becomes a list."""
    prompts, known = zip(*rows, strict=True)
    return {**prompt_batch(prompts, pad), **{key: [each[key] for each in known] for key in known[0]}}


def _record(question: Question) -> dict[str, Any]:
    """A question as the encoders take it, with a chat template or without."""
    turns = {"system": question.system, "user": question.user, "assistant": question.assistant}
    return {
        "messages": [{"role": role, "content": content} for role, content in turns.items() if content],
        "prompt": "\n\n".join(text for text in (question.system, question.user) if text) + "\n",
        "answer": question.assistant,
    }


def _by_name(tasks: list[str] | dict[str, str | None] | None) -> dict[str, str | None]:
    named = tasks if isinstance(tasks, dict) else dict.fromkeys(tasks or [])
    for name in named:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}: there are {', '.join(TASKS)}")
    return named
