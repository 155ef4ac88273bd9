"""What the data modules of texts share: sources, a tokenizer, a held-out part, and examples kept in memory."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning_rlora.data.loader import Collate, ResumableLoader, RowLoader
from lightning_rlora.data.resumable_data import ResumableData
from lightning_rlora.data.sources import Record, TableFormat, hold_out, is_on_hub, load_hub, read_records
from lightning_rlora.data.tokenizer import check_length, find_tokenizer
from lightning_rlora.errors import UserError


class SourceData(ResumableData):
    """Batches of examples that are made from the records of sources and kept in memory.

    The batches of every epoch depend on nothing but the data, the seed and the epoch's number. A run resumed from a
    checkpoint goes on with the very next batch. Nothing is drawn from the global random number generators.

    Subclasses say what an example is (`_encode`), which examples stand together (`_rows`) and how they become a batch
    (`_collate`).

    Args:
        sources: The source or list of sources of each stage: "train", "validation", "test", "predict".
        hub_config: Configuration name of the hub data sets.
        tokenizer: Hub id, folder, embedded name or a tokenizer object. Without one the model's own is used.
        max_length: Longest row in tokens.
        batch_size: Rows per batch and process.
        validation_fraction: Part of the training records that is held out when there is no validation source.
        num_workers: Processes that make batches.
        seed: Seeds the held-out part and the order of the examples.

    Raises:
        UserError: An argument is wrong.
    """

    streaming = False
    """Whether the training data are read as they are needed."""
    table = TableFormat()
    """How CSV and TSV files are written."""

    def __init__(
        self,
        sources: dict[str, str | list[str] | None],
        *,
        hub_config: str | None,
        tokenizer: Any,
        max_length: int,
        batch_size: int,
        validation_fraction: float,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.sources = sources
        self.hub_config = hub_config
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self._examples: dict[str, Any] = {}
        self._found_tokenizer: Any = None
        if not 0 <= validation_fraction < 1:
            raise UserError(f"validation_fraction is {validation_fraction}: it must be in [0, 1)")

    @abstractmethod
    def _encode(self, name: str, records: Iterable[Record]) -> Any:
        """The examples made of the records of a split that is called ``name`` in messages."""

    @abstractmethod
    def _rows(self, examples: Any, shuffle: bool) -> Sequence[Sequence[int]]:
        """Which examples each row holds."""

    @abstractmethod
    def _collate(self) -> Collate:
        """What makes a batch of rows."""

    def prepare_data(self) -> None:
        """Downloads hub data sets, on one process only; `datasets` keeps them in its cache."""
        for stage, sources in self.sources.items():
            for source in [sources] if isinstance(sources, str) else sources or []:
                if is_on_hub(source) and not (self.streaming and stage == "train"):
                    load_hub(source, stage, self.hub_config, streaming=False)

    def setup(self, stage: str) -> None:
        """Takes `val_dataloader` away from a fit that has nothing to validate on.

        Lightning then skips validation; an empty loader would do too, but not without a warning.
        """
        if stage == "fit" and not self._validates:
            self.val_dataloader = None  # type: ignore[assignment]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches to train on, from the place at which the trainer stands."""
        common = self._training()
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        examples = self._in_memory("train")
        return RowLoader(examples, self._rows(examples, shuffle), shuffle=shuffle, **common)

    def val_dataloader(self) -> Any:
        """Batches to validate on, in the order of the source."""
        if not self._validates:
            raise UserError(
                "nothing to validate on: give `validation`" + " (a stream holds nothing out)" * self.streaming
            )
        return self._fixed_order("validation")

    def test_dataloader(self) -> RowLoader:
        """Batches to test on, in the order of the source."""
        return self._fixed_order("test")

    @property
    def _validates(self) -> bool:
        return bool(self.sources["validation"] or (self.validation_fraction and not self.streaming))

    def _need(self, stage: str) -> str | list[str]:
        if not (sources := self.sources[stage]):
            raise UserError(f"no source of data for this: give `{stage}`")
        return sources

    def _records(self, stage: str) -> Iterator[Record]:
        streaming = self.streaming and stage == "train"
        return read_records(self._need(stage), stage, self.hub_config, streaming, self.table)

    def _in_memory(self, stage: str) -> Any:
        """The examples of a split; tokenised when first asked for."""
        if stage not in self._examples:
            if stage in ("train", "validation") and not self.sources["validation"] and self.validation_fraction:
                records = list(self._records("train"))
                train, validation = hold_out(records, self.validation_fraction, self._random(0, 1))
                self._examples["train"] = self._encode("train", train)
                self._examples["validation"] = self._encode("validation (held out of train)", validation)
            else:
                self._examples[stage] = self._encode(stage, self._records(stage))
        return self._examples[stage]

    def _training(self) -> dict[str, Any]:
        return {**super()._training(), "batch_size": self.batch_size, "collate": self._collate()}

    def _fixed_order(self, stage: str) -> RowLoader:
        examples = self._in_memory(stage)
        return RowLoader(
            examples,
            self._rows(examples, shuffle=False),
            self.batch_size,
            self._collate(),
            num_workers=self.num_workers,
            **self._processes(),
        )

    def _tokenizer(self) -> Any:
        """The tokenizer, found when first needed: the model may bring it only with its own setup."""
        if self._found_tokenizer is None:
            found = find_tokenizer(self.tokenizer, self._module)
            check_length(self.max_length, found, self._module)
            self._found_tokenizer = found
        return self._found_tokenizer
