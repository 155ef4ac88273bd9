"""What becomes of a run of which one process fails."""

import os
import signal
import subprocess
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from fits import fit, identical
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from processes import launch

from lightning_rlora.callbacks.end_together import EndTogether
from lightning_rlora.errors import UserError, user_line


class KillProcess(pl.Callback):
    def __init__(self, rank):
        self.rank = rank

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 7 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def told(function):
    """The line that the command line prints when a function fails."""
    try:
        function()
    except Exception as error:
        return user_line(error) or repr(error)


def killed(strategy, folder):
    every_five = ModelCheckpoint(folder, "{step}", every_n_train_steps=5)
    line = told(lambda: fit(strategy, 2, folder=folder, callbacks=(every_five, KillProcess(rank=1))))
    (folder / "line").write_text(line)


def resumed_and_uninterrupted(strategy, folder):
    resumed = fit(strategy, 2, folder=folder, resume=folder / "step=5.ckpt", first=5)
    return resumed, fit(strategy, 2, folder=folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_run_and_a_resume_repeats_it(strategy, tmp_path):
    with pytest.raises(AssertionError, match=r"\[0, -9\]"):
        launch(2, killed, strategy, tmp_path, folder=tmp_path / "killed")
    assert "another process of this run has ended" in (tmp_path / "line").read_text()
    for resumed, whole in launch(2, resumed_and_uninterrupted, strategy, tmp_path, folder=tmp_path / "resumed"):
        assert identical(resumed, whole)


def full_disk(strategy, folder):
    def no_space(file):
        raise OSError(28, "No space left on device")

    os.fsync = no_space  # of this process, which ends
    line = told(lambda: fit(strategy, 2, folder=folder, steps=3, save=folder / "run.ckpt"))
    (folder / f"{os.environ['RANK']}.line").write_text(line)
    os._exit(1)  # as a program does that failed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_full_disk_ends_all_processes_and_leaves_nothing(strategy, tmp_path):
    with pytest.raises(AssertionError, match=r"\[1, 1\]"):
        launch(2, full_disk, strategy, tmp_path, folder=tmp_path / "processes")
    assert (tmp_path / "0.line").read_text() == f"No space left on device: {tmp_path / 'run.ckpt'}"
    assert "another process" in (tmp_path / "1.line").read_text()
    assert not list(tmp_path.glob("*.ckpt")) and not list(tmp_path.glob(".*"))


def test_the_processes_that_this_one_started_end_with_it():
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [subprocess.Popen(["sleep", "60"])]
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    EndTogether().on_exception(trainer, None, UserError())
    assert launcher.procs[0].wait(10) == -signal.SIGKILL
