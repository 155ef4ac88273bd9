"""A run killed anywhere and resumed sees the very batches that the uninterrupted run saw.

Every run here turns warnings into errors, so Lightning's warning of a loader that cannot be resumed would fail it.
"""

import logging
import random
import warnings
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlora.data import TextData
from lightning_rlora.data.loader import RowLoader, StreamLoader

EXPECTED = (
    "does not have many workers",
    "LeafSpec",
    "exists and is not empty",
    "dirpath has changed",
    "callbacks used to create",
)


class Killed(Exception):
    pass


class Recorder(LightningModule):
    """Keeps (batch_idx, tokens) of all training batches and of all validation batches."""

    def __init__(self, kill_at_step=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.kill_at_step = kill_at_step
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        if self.kill_at_step is not None and self.global_step == self.kill_at_step:
            raise Killed
        self.seen.append((batch_idx, batch["input_ids"].flatten().tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["input_ids"].flatten().tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def corpus(write):
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=generator.randint(3, 30))) for _ in range(36)]
    return write("corpus.jsonl", [{"text": text} for text in texts])


@pytest.fixture
def fit(corpus, letters):
    """Runs a fit, killed or not, and returns the recorder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def fit(kill_at_step=None, data=None, checkpoint=None, ckpt_path=None, **trainer):
        data = {"train": corpus, "max_length": 32, "batch_size": 2, "validation_fraction": 0, **(data or {})}
        module = Recorder(kill_at_step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in EXPECTED:
                warnings.filterwarnings("ignore", f".*{message}.*")
            runner = Trainer(
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                enable_checkpointing=checkpoint is not None,
                callbacks=[checkpoint] if checkpoint else [],
                **trainer,
            )
            try:
                runner.fit(module, TextData(tokenizer=letters, **data), ckpt_path=ckpt_path)
            except Killed:
                assert kill_at_step is not None
        return module

    return fit


SAVES = {
    "every step": {"every_n_train_steps": 1},
    "every third step": {"every_n_train_steps": 3},
    "end of epoch": {"save_on_train_epoch_end": True},
    "end of validation": {"save_on_train_epoch_end": False},
}


def check_resume(fit, tmp_path, kills, save, data, trainer):
    """Kills at each of the steps, resumes from the newest checkpoint and compares; returns how many resumed."""
    whole = fit(data=data, **trainer).seen
    resumed = 0
    for kill in kills:
        folder = tmp_path / str(kill)
        keep_all = {"save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}
        part = fit(kill, data, ModelCheckpoint(folder, **keep_all, **SAVES[save]), **trainer).seen
        found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("-")[0]))
        if not found:
            continue
        counters = torch.load(found[-1], weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = counters["total"]["processed"]
        assert part == whole[: len(part)] and done <= len(part)
        again = ModelCheckpoint(folder / "again", **keep_all, **SAVES[save])
        rest = fit(None, data, again, ckpt_path=str(found[-1]), **trainer).seen
        assert rest == whole[done:], f"killed at step {kill}"
        resumed += 1
    return resumed


@pytest.mark.parametrize("limit", ["epochs", "steps"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("validation", [None, "at the end", "in the middle"])
def test_resume(fit, corpus, tmp_path, validation, save, streaming, limit):
    data = {"streaming": streaming, "shuffle_buffer": 10, "validation": corpus if validation else None}
    accumulate = 3 if validation else 1
    trainer = {"accumulate_grad_batches": accumulate, "limit_val_batches": 2}
    if validation == "in the middle":
        trainer["val_check_interval"] = 4
    seen = fit(data=data, max_epochs=2, **trainer).seen
    batches = [index for index, _ in seen].index(0, 1)  # of the first epoch
    steps = -(-batches // accumulate)
    trainer |= {"max_epochs": 3} if limit == "epochs" else {"max_epochs": -1, "max_steps": 3 * steps}
    kills = sorted({2, steps - 1, steps, steps + 1, 2 * steps, 2 * steps + 1})
    resumed = check_resume(fit, tmp_path, kills, save, data, trainer)
    if save == "every step":
        assert resumed == len(kills)
    elif save != "end of validation" or validation:
        assert resumed >= 2


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_resume_with_workers(fit, tmp_path, packing, streaming):
    data = {"streaming": streaming, "packing": packing, "num_workers": 2, "shuffle_buffer": 10}
    assert check_resume(fit, tmp_path, [5], "every step", data, {"max_epochs": 2}) == 1


def test_resume_after_a_resume(fit, tmp_path):
    whole = fit(max_epochs=3).seen
    seen, path = [], None
    for part, kill in enumerate([5, 16, 17, 31, None]):
        checkpoint = ModelCheckpoint(tmp_path / str(part), save_top_k=1, filename="last", every_n_train_steps=1)
        seen += fit(kill, None, checkpoint, path, max_epochs=3).seen
        path = str(tmp_path / str(part) / "last.ckpt")
    assert seen == whole


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_from_the_checkpoint_of_an_exception(fit, tmp_path, streaming):
    data = {"streaming": streaming}
    whole = fit(data=data, max_epochs=3).seen
    epoch = [index for index, _ in whole].index(0, 1)
    for kill in (1, 5, epoch, 2 * epoch - 1):  # in the middle of the step after so many
        checkpoint = ModelCheckpoint(tmp_path / str(kill), filename="x", save_on_exception=True, every_n_epochs=99)
        first = fit(kill, data, checkpoint, max_epochs=3).seen
        (path,) = (tmp_path / str(kill)).glob("*.ckpt")
        assert first + fit(None, data, None, str(path), max_epochs=3).seen == whole


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_ended_in_mid_epoch_is_prolonged(fit, tmp_path, streaming):
    data = {"streaming": streaming}
    whole = fit(data=data, max_steps=40).seen
    for end in (5, 12, 20):
        checkpoint = ModelCheckpoint(tmp_path / str(end), filename="end")  # saves at the end of the broken-off epoch
        first = fit(None, data, checkpoint, max_steps=end).seen
        rest = fit(None, data, None, str(tmp_path / str(end) / "end.ckpt"), max_steps=40)
        assert first + rest.seen == whole


def test_order_depends_on_seed_and_epoch_only(fit):
    reference = fit(max_epochs=2).seen
    epoch = len(reference) // 2
    assert fit(data={"num_workers": 2}, max_epochs=2).seen == reference
    assert fit(data={"seed": 1}, max_epochs=2).seen != reference
    first, second = ([tokens for _, tokens in part] for part in (reference[:epoch], reference[epoch:]))
    assert first != second
    # every epoch shows every token once; a row ends in zeros
    assert sorted(chain(*first)) == sorted(chain(*second))
    streamed = fit(data={"streaming": True}, max_epochs=2).seen
    assert fit(data={"streaming": True, "num_workers": 2}, max_epochs=2).seen == streamed
    tokens = lambda seen: sorted(token for _, batch in seen for token in batch if token)  # noqa: E731
    assert tokens(streamed) == tokens(reference)


def test_global_random_numbers_are_left_alone(fit, corpus, letters):
    import numpy

    for data in ({}, {"streaming": True}, {"num_workers": 1}, {"validation_fraction": 0.2}):
        fit(data=data, max_epochs=1)  # whatever is drawn once, on import, is drawn here
        module = TextData(train=corpus, predict=corpus, tokenizer=letters, max_length=32, **data)
        states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        loaders = [module.train_dataloader(), module.predict_dataloader()]
        loaders += [] if module.streaming else [module.val_dataloader()]
        assert all(len(list(loader)) for loader in loaders)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]


def test_other_data_on_resume_are_told(fit, tmp_path, write):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="last", save_top_k=1)
    fit(3, None, checkpoint, max_epochs=1)
    other = write("other.jsonl", [{"text": "abcdefgh" * 3}] * 36)
    with pytest.raises(UserWarning, match=r"other training data than the checkpoint's \(rows, data changed\)"):
        fit(None, {"train": other}, None, str(tmp_path / "last.ckpt"), max_epochs=1)


@pytest.mark.parametrize("count, batch_size, world_size", [(5, 2, 2), (9, 4, 2), (7, 2, 3), (8, 3, 1), (13, 4, 3)])
def test_no_row_is_measured_twice(count, batch_size, world_size):
    data = SimpleNamespace(checksum=0)
    loaders = [
        RowLoader(data, range(count), batch_size, list, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shares = [loader.batches(0, 0).batch_sampler for loader in loaders]
    assert {len(share) for share in shares} == {len(loaders[0])}
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(count))


def test_rows_are_repeated_where_a_process_would_have_none_to_measure():
    data = SimpleNamespace(checksum=0)
    shares = [
        RowLoader(data, range(5), 1, list, rank=rank, world_size=2).batches(0, 0).batch_sampler for rank in (0, 1)
    ]
    assert shares == [[[0], [2], [4]], [[1], [3], [0]]]


def test_processes_share_the_rows(corpus, letters):
    from lightning_rlora.data.packing import packed_batch

    data = TextData(train=corpus, tokenizer=letters, max_length=32, batch_size=2, validation_fraction=0)
    single = data.train_dataloader()
    rows = sorted(tuple(row) for batch in single for row in batch["input_ids"].tolist())
    collate = lambda rows: packed_batch(rows, 32, 0)  # noqa: E731
    shared = [
        RowLoader(single.dataset.examples, single.dataset.rows, 2, collate, shuffle=True, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert {len(list(loader)) for loader in shared} == {len(shared[0])}
    together = [tuple(row) for loader in shared for batch in loader for row in batch["input_ids"].tolist()]
    assert set(together) == set(rows) and len(together) - len(rows) < 3
    streams = [StreamLoader(data._stream, 2, collate, rank=rank, world_size=3) for rank in range(3)]
    parts = [[tuple(row) for batch in stream for row in batch["input_ids"].tolist()] for stream in streams]
    assert {len(part) for part in parts} == {len(rows) // 6 * 2}
    assert len(set(chain(*parts))) == sum(map(len, parts))  # nobody reads what another reads
