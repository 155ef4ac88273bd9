import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import KillAt, Killed, ToyData, ToyModule, fit, fit_until_killed

from lightning_rlora.callbacks.run_record import RunRecord

EPOCHS = {"max_epochs": 3, "val_check_interval": 3, "accumulate_grad_batches": 2}  # 7 batches, 4 steps an epoch
EPOCH_ENDS = {"max_epochs": 2, "log_every_n_steps": 3}
STEPS = {"max_steps": 8, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None, "save_every": 2}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def by_hand(limit: int) -> list[float]:
    """The validation losses before each step, from a loop that does without Lightning."""
    module, losses = ToyModule(), []
    optimizer = module.configure_optimizers()
    data = ToyData()
    for step, batch in enumerate(data.train_dataloader()):
        if step > limit:
            break
        with torch.no_grad():
            losses.append(sum((module.model(b) - b.flip(1)).square().mean().item() for b in data.val_dataloader()) / 2)
        optimizer.zero_grad()
        (module.model(batch) - batch.flip(1)).square().mean().backward()
        optimizer.step()
    return losses


def test_rows_are_the_losses_of_a_loop_by_hand(tmp_path):
    fit(tmp_path, max_steps=5, val_check_interval=2)
    expected = by_hand(5)
    found = {int(row["step"]): float(row["val/loss"]) for row in rows(tmp_path) if row["val/loss"]}
    assert set(found) == {0, 2, 4}
    # float32 sums; measured 3e-8
    assert all(abs(found[step] - expected[step]) < 1e-6 for step in found)


def test_columns_and_rows_of_an_accumulated_run(tmp_path):
    fit(tmp_path, **EPOCHS)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.startswith("step,train/loss,val/loss,val/perplexity,val/accuracy\n0,,")
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == list(range(13))
    assert all(row["train/loss"] for row in table[1:])
    # batches 3 and 6 of each epoch come after its steps 1 and 3
    assert [int(row["step"]) for row in table if row["val/loss"]] == [0, 1, 3, 5, 7, 9, 11]
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_training_rows_follow_log_every_n_steps_and_sanity_must_be_whole(tmp_path):
    fit(tmp_path, **EPOCH_ENDS, num_sanity_val_steps=1)
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == [3, 6, 7, 9, 12, 14]
    assert [bool(row["train/loss"]) for row in table] == [True, True, False, True, True, False]
    assert [bool(row["val/loss"]) for row in table] == [False, False, True, False, False, True]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """metrics.csv of the uninterrupted run of each plan."""
    contents = {}
    for name, plan in PLANS.items():
        folder = tmp_path_factory.mktemp(name)
        fit(folder, **plan)
        contents[name] = (folder / "metrics.csv").read_bytes()
    return contents


PLANS = {"epochs": EPOCHS, "epoch-ends": EPOCH_ENDS, "steps": STEPS}
KILLS = [
    # a batch's end, right after the checkpoint: no validation follows, one follows, at an epoch's end, at the last step
    *(("epochs", "on_train_batch_end", step) for step in (1, 2, 4, 8, 11, 12)),
    *(("epoch-ends", "on_train_batch_end", step) for step in (3, 6, 7, 14)),
    *(("steps", "on_train_batch_end", step) for step in (3, 4, 8)),
    # before, in and after the validation that belongs to the checkpoint's step
    *(("epochs", hook, step) for hook in ("on_validation_start", "on_validation_end") for step in (1, 3, 11)),
    *(("epoch-ends", hook, step) for hook in ("on_validation_batch_end", "on_validation_end") for step in (7, 14)),
    *(("steps", hook, step) for hook in ("on_validation_start", "on_validation_end") for step in (4, 8)),
    # elsewhere
    *(("epoch-ends", hook, 7) for hook in ("on_train_epoch_end", "on_train_epoch_start", "on_train_batch_start")),
    ("epochs", "on_before_optimizer_step", 9),
]


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("plan, hook, step", KILLS)
def test_a_killed_run_leaves_the_record_of_an_uninterrupted_one(tmp_path, uninterrupted, plan, hook, step, settles):
    fit_until_killed(tmp_path, KillAt(hook, step), **PLANS[plan])
    fit(tmp_path, ckpt_path="last", settles=settles, **PLANS[plan])
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted[plan]
    assert not (tmp_path / "previous").exists()


def test_killed_again_and_again(tmp_path, uninterrupted):
    for hook, step in [("on_train_batch_end", 3), ("on_validation_start", 3), ("on_validation_end", 7)]:
        fit_until_killed(tmp_path, KillAt(hook, step), ckpt_path="last" if step > 3 else None, **EPOCHS)
    fit(tmp_path, ckpt_path="last", **EPOCHS)
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted["epochs"]


@pytest.mark.parametrize("damage", ["half a line", "rows of later steps", "missing"])
def test_whatever_became_of_the_file(tmp_path, uninterrupted, damage):
    fit_until_killed(tmp_path, KillAt("on_train_batch_end", 6), **EPOCHS)
    file = tmp_path / "metrics.csv"
    if damage == "half a line":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "rows of later steps":
        file.write_text(file.read_text() + "7,1.0,,,\n8,1.0,2.0,3.0,4.0\n")
    else:
        file.unlink()
    fit(tmp_path, ckpt_path="last", **EPOCHS)
    assert file.read_bytes() == uninterrupted["epochs"]


def test_back_to_an_older_checkpoint(tmp_path, uninterrupted):
    trainer = fit(tmp_path, **(EPOCHS | {"max_epochs": 2}))
    trainer.save_checkpoint(tmp_path / "checkpoints" / "end.ckpt")
    with_more = fit(tmp_path, ckpt_path=tmp_path / "checkpoints" / "end.ckpt", **EPOCHS)
    assert with_more.global_step == 12
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted["epochs"]


def test_a_finished_run_resumed_changes_nothing(tmp_path, uninterrupted):
    for _ in range(2):
        fit(tmp_path, ckpt_path="last", **STEPS)  # there is none the first time
        assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted["steps"]
    assert not (tmp_path / "previous").exists()


def test_other_callbacks_see_the_validation_that_was_made_up_for(tmp_path):
    seen = []

    class Witness(KillAt):
        def __init__(self):
            pass

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append((trainer.global_step, pl_module.training))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.global_step, pl_module.training, trainer.training, trainer.max_steps))

    fit_until_killed(tmp_path, KillAt("on_validation_start", 4), **STEPS)
    fit(tmp_path, ckpt_path="last", callbacks=[Witness()], **STEPS)
    assert seen[0] == (4, False)
    assert seen[1] == (4, True, True, 8)
    assert [event[0] for event in seen if len(event) == 2] == [4, 8]


@pytest.mark.slow
def test_a_process_that_is_killed_for_real(tmp_path, uninterrupted):
    code = (
        "import os, signal, sys; from pathlib import Path; from toy_runs import KillAt, fit\n"
        "die = KillAt('on_validation_batch_start', 7, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        "fit(Path(sys.argv[1]), callbacks=[die], max_epochs=3, val_check_interval=3, accumulate_grad_batches=2)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    fit(tmp_path, ckpt_path="last", **EPOCHS)
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted["epochs"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_lost_when_a_folder_is_used_again(tmp_path):
    class SaveConfig(KillAt):
        """Writes config.yaml in setup, as LightningCLI does."""

        def __init__(self, text):
            self.text = text

        def setup(self, trainer, pl_module, stage):
            (tmp_path / "config.yaml").write_text(self.text)

    for number in range(3):
        before = {k: v for k, v in tree(tmp_path).items() if not k.startswith("previous")}
        earlier = {k: v for k, v in tree(tmp_path).items() if k.startswith("previous")}
        fit(tmp_path, max_steps=3 + number, callbacks=[SaveConfig(f"run: {number}\n")], ckpt_path=None)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(str(number))
        after = tree(tmp_path)
        assert earlier.items() <= after.items()
        if number:
            assert {f"previous/{number}/{name}": content for name, content in before.items()}.items() <= after.items()
        assert len(rows(tmp_path)) >= 3 + number
        assert (tmp_path / "config.yaml").read_text() == f"run: {number}\n"
    assert {"metrics.csv", "loss.png", "config.yaml", "checkpoints/last.ckpt"} <= tree(tmp_path / "previous/2").keys()
    assert len(rows(tmp_path / "previous" / "1")) == 4


def test_resuming_from_another_folders_checkpoint_carries_the_record_over(tmp_path, uninterrupted):
    fit_until_killed(tmp_path / "one", KillAt("on_train_batch_end", 6), **EPOCHS)
    fit(tmp_path / "two", max_steps=2)
    kept = tree(tmp_path / "two")
    fit(tmp_path / "two", ckpt_path=tmp_path / "one" / "checkpoints" / "last.ckpt", **EPOCHS)
    assert (tmp_path / "two" / "metrics.csv").read_bytes() == uninterrupted["epochs"]
    assert tree(tmp_path / "two" / "previous" / "1") == kept


def test_fast_dev_run_touches_nothing(tmp_path):
    fit(tmp_path, max_steps=2)
    before = tree(tmp_path)
    fit(tmp_path, fast_dev_run=True)
    # Lightning's ModelCheckpoint(save_last=True) writes a checkpoint all the same
    assert {name: content for name, content in tree(tmp_path).items() if "last-v1" not in name} == before


def test_an_exception_leaves_the_rows_and_the_plot(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, max_epochs=2, callbacks=[KillAt("on_train_batch_end", 5)])
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "loss.png").exists()


def test_validate_is_not_recorded(tmp_path):
    trainer = fit(tmp_path, max_steps=2)
    before = tree(tmp_path)
    trainer.validate(ToyModule(), datamodule=ToyData(), verbose=False)
    assert tree(tmp_path) == before


def test_fitting_on_with_the_same_trainer_goes_on_with_the_record(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    record = next(callback for callback in trainer.callbacks if isinstance(callback, RunRecord))
    assert len(record.state_dict()["rows"]) == 8
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, datamodule=ToyData())
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(15))
