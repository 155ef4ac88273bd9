"""ClassificationData: texts and pairs of texts with labels, from GLUE or from files of one's own."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_rlora.data.examples import encode_all
from lightning_rlora.data.labelled import LabelledTextEncoder, LabelledTexts, labelled_batch, text_batch
from lightning_rlora.data.loader import Collate
from lightning_rlora.data.source_data import SourceData
from lightning_rlora.data.sources import Record, TableFormat
from lightning_rlora.data.tokenizer import pad_token
from lightning_rlora.errors import UserError

GLUE_TEXTS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
"""The columns of GLUE's tasks that hold the text or the two texts."""

GLUE_SPLITS = {"train": "train", "validation": "validation", "predict": "test"}
MNLI_SPLITS = {
    "train": "train",
    "validation": "validation_matched",
    "validation_mismatched": "validation_mismatched",
    "predict": "test_matched",
}
"""The splits of `nyu-mll/glue` by what they are for; the labels of the test splits are not published."""


class ClassificationData(SourceData):
    """Texts or pairs of texts with a label, tokenised and padded for a classifier.

    `task` alone loads a task of GLUE from the hub: its training split, its validation split (MNLI's matched and
    mismatched one as two data sets) and, for predict, its test split without labels. There is no labelled test split;
    validate instead. With sources of one's own, `task` only tells the names of the text columns.

    A source is a file (.csv, .tsv, .json, .jsonl, .parquet; all but Parquet also as .gz, .bz2, .xz, .zst), a folder of
    such files, a glob, or a data set of the hub ("user/name", or "user/name#split").

    The classes are the model's. A label is the name of a class, or its number from 0 where no class is named by a
    number; for a model without classes (regression) it is the number to predict. Anything else is an error.

    The batches of every epoch depend on nothing but the data, the seed and the epoch's number. A run resumed from a
    checkpoint goes on with the very next batch. Nothing is drawn from the global random number generators.

    Batches hold `input_ids`, `attention_mask` and, if the tokenizer counts the texts of a pair, `token_type_ids`, int64
    of shape (batch_size, longest), padded on the right; and `labels`, int64 (float32 for regression) of shape
    (batch_size,). Batches of predict hold `records` instead, the list of the fields with the texts.

    Args:
        train: Source or list of sources to train on.
        validation: Source or list of sources to validate on. Without one, a part of the training records is held out.
        test: Source or list of sources to test on.
        predict: Source or list of sources of texts to classify; labels need not exist.
        task: A task of GLUE (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli).
        hub_config: Configuration name of hub data sets.
        text: Column of the text, or columns of the two texts; also a template such as "{title}: {body}". By default the
            task's, or "text".
        label: Column of the label.
        class_names: Names of the classes, for a model that does not tell them; none (`[]`) for regression.
        columns: Names of the columns of CSV and TSV files that have no header line.
        quoting: Whether quotation marks enclose fields of CSV and TSV files. GLUE's own TSV files need false.
        tokenizer: Hub id, folder, embedded name or a tokenizer object. Without one the model's own is used.
        max_length: Longest row in tokens, the tokenizer's special ones included; of a pair the longer text is cut.
        batch_size: Rows per batch and process.
        validation_fraction: Part of the training records that is held out when there is no validation source.
        num_workers: Processes that make batches (0: the training process itself).
        seed: Seeds the held-out part and the order of the examples.

    Raises:
        UserError: An argument is wrong, a source cannot be read, or a label does not fit the model.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        task: Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"] | None = None,
        hub_config: str | None = None,
        text: str | list[str] | None = None,
        label: str = "label",
        class_names: list[str] | None = None,
        columns: list[str] | None = None,
        quoting: bool = True,
        tokenizer: str | Any | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        validation_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task is not None and task not in GLUE_TEXTS:
            raise UserError(f"unknown task {task!r}: GLUE has {', '.join(GLUE_TEXTS)}")
        sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        if task is not None and not any(sources.values()):
            splits = MNLI_SPLITS if task == "mnli" else GLUE_SPLITS
            sources |= {stage: f"nyu-mll/glue#{split}" for stage, split in splits.items()}
            hub_config = task
        super().__init__(
            sources,
            hub_config=hub_config,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            num_workers=num_workers,
            seed=seed,
        )
        if max_length < 1:
            raise UserError(f"max_length is {max_length}: it must be at least 1")
        texts = text or (GLUE_TEXTS[task] if task else "text")
        self.texts = [texts] if isinstance(texts, str) else texts
        if len(self.texts) > 2:
            raise UserError(f"text = {self.texts}: give one column, two of a pair, or a template that joins several")
        self.task = task
        self.label = label
        self.class_names = class_names
        self.table = TableFormat(tuple(columns) if columns else None, quoting)

    def val_dataloader(self) -> Any:
        """Batches to validate on, in the order of the source; for MNLI two loaders, matched and mismatched."""
        first = super().val_dataloader()
        return (
            [first, self._fixed_order("validation_mismatched")] if self.sources.get("validation_mismatched") else first
        )

    def predict_dataloader(self) -> DataLoader:
        """Texts without labels, one process making them all."""
        encoder, records = self._encoder(), list(self._records("predict"))
        if not records:
            raise UserError(f"predict: {self.sources['predict']!r} holds no records")
        texts: Any = list(zip(encoder.tokens(records, 1), map(encoder.shown, records), strict=True))
        pad, token_types = pad_token(self._tokenizer()), self._token_types

        def collate(rows: Sequence[tuple[Any, Record]]) -> dict[str, Any]:
            return {**text_batch([text for text, _ in rows], pad, token_types), "records": [shown for _, shown in rows]}

        return DataLoader(texts, batch_size=self.batch_size, collate_fn=collate, generator=torch.Generator())

    def _encode(self, name: str, records: Iterable[Record]) -> LabelledTexts:
        encoder = self._encoder()
        examples = LabelledTexts(encode_all(encoder, records))
        if not len(examples):
            raise UserError(f"{name}: the data set is empty")
        if encoder.full:
            rank_zero_warn(
                f"{name}: {encoder.full} of {len(examples)} texts fill max_length = {self.max_length} tokens, so most"
                " of them have lost their end"
            )
        absent = [known for known, number in encoder.numbers.items() if number not in examples.labels]
        if name == "train" and absent:
            rank_zero_warn(f"train: no text has the label {', '.join(absent)}: do the model's classes fit the data?")
        return examples

    def _rows(self, examples: LabelledTexts, shuffle: bool) -> Sequence[Sequence[int]]:
        return np.arange(len(examples))[:, None]  # type: ignore[return-value]

    def _collate(self) -> Collate:
        pad, classes = pad_token(self._tokenizer()), bool(self._classes())
        return partial(labelled_batch, pad=pad, token_types=self._token_types, classes=classes)

    def _encoder(self) -> LabelledTextEncoder:
        return LabelledTextEncoder(self._tokenizer(), self.max_length, self.texts, self.label, self._classes())

    @property
    def _token_types(self) -> bool:
        return "token_type_ids" in self._tokenizer().model_input_names

    def _classes(self) -> list[str]:
        """The names of the classes, which the model tells; no name means regression."""
        task = getattr(self._module, "task", None)
        if self.task is not None and task is not None and task != self.task:
            raise UserError(f"the data's task is {self.task} and the model's {task}: give both the same")
        told: list[str] | None = getattr(self._module, "class_names", None)
        if told is not None and self.class_names is not None and told != self.class_names:
            raise UserError(
                f"the data's class_names are {self.class_names} and the model's {told}: leave the data's out"
            )
        classes = self.class_names if told is None else told
        if classes is None:
            raise UserError("the model does not tell its classes: give the data module `class_names`")
        return classes
