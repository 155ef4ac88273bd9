"""LightningCLI with this package's defaults: what stands behind fit, validate, test and predict."""

from __future__ import annotations

import argparse
import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rlora import callbacks, data, modules, optim, strategies  # noqa: F401  - so that configs may use short class names
from lightning_rlora.callbacks import AdapterExport, RunRecord, SpectrumMonitor
from lightning_rlora.callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from lightning_rlora.callbacks.end_together import EndTogether
from lightning_rlora.collectives import gathered
from lightning_rlora.errors import UserError
from lightning_rlora.files import write_atomically
from lightning_rlora.fragments import Config, merge, read_mapping


def one_configuration(args: list[str]) -> list[str]:
    """Lay all configuration files of a command line over each other (see `merge`), as one before its other options.

    The parser's own way would replace the adapter's fields as a whole, and hand an optimizer's options on to another.

    Raises:
        UserError: If one of several files cannot be read.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-c", "--config", action="append", default=[])
    try:
        found, others = options.parse_known_args(args)
    except argparse.ArgumentError:
        return args  # the parser behind this says what is wrong
    if len(found.config) < 2:
        return args
    merged: Config = {}
    for path in found.config:
        merged = merge(merged, read_mapping(Path(path)))
    return [others[0], "--config", yaml.safe_dump(merged, sort_keys=False), *others[1:]]


class Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` with what matters of the message."""
        raise UserError(condense(message)) from ex


_NOISE = re.compile(
    r"Parser key|Problem with|Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but|Not a valid subclass|Subclass types expect|a class path \(|a dict with"
)


def condense(message: str) -> str:
    """What is wrong and where, in one line, out of jsonargparse's account of every type that it tried."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    causes = [line for line in lines if not _NOISE.match(line)]
    # the first, unless one lists the values that are allowed, or names an option that a class does not have
    cause = max(causes, key=lambda line: "Literal" in line or "not accepted" in line) if causes else lines[-1]
    cause = re.sub(r'^Parser key "[^"]+": ', "", cause)
    cause = re.sub(r"^Expected a dot import path string: (.*)", r"there is no class '\1'", cause)
    given = re.search(r"Given value: (.*)$", message, re.MULTILINE)
    if cause.startswith("Expected") and "Got value" not in cause and given:
        cause += f", not {given.group(1)}"
        if given.group(1).startswith("{"):
            cause += " (a text with a colon or braces needs quotes inside the shell's: '\"...\"')"
    cause = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", cause)
    return ".".join(dict.fromkeys(keys)) + (": " if keys else "") + cause[:400]


class SaveFitConfig(SaveConfigCallback):
    """Saves the configuration of a training run; measuring or predicting must not replace it.

    It does so when the run begins, with the first validation or training step: data or a checkpoint that cannot be read
    leave an earlier run's configuration alone.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, now that the data could be read."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if there was no validation before."""
        super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if a resumed run had no step left."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file as a whole."""
        config = self.parser.dump(self.config, skip_none=False)
        write_atomically(Path(trainer.default_root_dir) / self.config_filename, config.encode())


class RloraCLI(LightningCLI):
    """Subclass mode for model and data, a checkpoint folder in the run's folder, and the callbacks every run has."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=Parser,
            args=one_configuration(args),
            seed_everything_default=0,
            trainer_defaults={
                "logger": False,
                "default_root_dir": "runs/default",
                "num_sanity_val_steps": -1,
                "log_every_n_steps": 10,
                "callbacks": [RunRecord(), AdapterExport(), EndTogether()],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints are configured under `checkpoint`, the spectrum's record under `spectrum`."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SpectrumMonitor, "spectrum")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.filename": "step={step}",
                "checkpoint.auto_insert_metric_name": False,
                "spectrum.every_n_steps": 50,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration given; Lightning would let the checkpoint's hyperparameters override it."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that writes whole checkpoints or none, into the run's folder whatever the logger."""
        config = self._get(self.config_init, "trainer")
        checkpoint = self._get(self.config_init, "checkpoint")
        if checkpoint.dirpath is None:
            checkpoint.dirpath = str(Path(config["default_root_dir"]).absolute() / "checkpoints")
        if config.get("fast_dev_run"):
            checkpoint.save_last = False  # Lightning leaves out every checkpoint of a trial run but this one
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if config.get("strategy") == "fsdp":
            kwargs["strategy"] = "fsdp1"  # Lightning's own would shard the adapter, too
        if config.get("enable_progress_bar") is not False:
            self.trainer_defaults["callbacks"].append(RichProgressBar())
        return super().instantiate_trainer(plugins=[*plugins, AtomicCheckpointIO()], **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """What the subcommand runs with; only a fit may start afresh where there is no last checkpoint."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if subcommand != "fit" and arguments.get("ckpt_path") == "last" and not last.is_file():
            raise UserError(f"there is no checkpoint {last}: name the run's folder with --trainer.default_root_dir")
        return arguments

    def predict(self, **kwargs: Any) -> None:
        """Write the predictions as JSON lines."""
        batches: Any = self.trainer.predict(**kwargs) or []
        parts = gathered([record for batch in batches for record in batch])  # the processes take turns
        together = [record for turn in zip_longest(*parts) for record in turn if record is not None]
        if self.trainer.is_global_zero:
            self._write("predictions", together)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Test, and write the answers as JSON lines if the data asked questions.

        Every metric has one line; Lightning's table has a column for the loader of each task.
        """
        self.trainer.test(verbose=False, **kwargs)
        if not self.trainer.is_global_zero:
            return
        if verbose:
            for name, value in self.trainer.callback_metrics.items():
                print(f"{name:<28} {value:.4f}")
        if answers := getattr(self.model, "answers", None):
            self._write("answers", answers)

    def _write(self, name: str, records: list[dict[str, Any]]) -> None:
        path = Path(self.trainer.default_root_dir) / f"{name}.jsonl"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(path, lines.encode())
        print(f"{len(records)} {name} written to {path}")
