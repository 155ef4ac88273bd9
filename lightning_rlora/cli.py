"""The command line: `rlora fit | validate | test | predict | export | merge`.

A thin parser answers help and the small commands; LightningCLI, which takes seconds to import, stands only behind those
that run a Trainer. Wrong input ends in one line and exit status 2; bugs keep their tracebacks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from lightning_rlora.errors import UserError

TRAINER_COMMANDS = {
    "fit": "train an adapter",
    "validate": "measure a model or a checkpoint on the validation data",
    "test": "measure a model or a checkpoint on the test data",
    "predict": "continue prompts or classify texts, into predictions.jsonl in the run's folder",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in TRAINER_COMMANDS:
            _set_environment()
            from lightning_rlora.trainer_cli import RloraCLI

            RloraCLI(argv)
        else:
            args = _parser().parse_args(argv)
            _set_environment()
            args.run(args)
    except KeyboardInterrupt:
        print("rlora: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = _user_line(error)
        if line is None:
            raise
        print(f"rlora: error: {line}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlora",
        description="Fine-tune language models with low-rank adapters on the fixed-rank manifold.",
        epilog="Start with: rlora fit --config configs/quickstart.yaml. All options: rlora fit --help",
    )
    parser.add_argument("--version", action="version", version=f"lightning-rlora {version('lightning-rlora')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    export = commands.add_parser("export", help="save a checkpoint's adapter in PEFT's format, for the pristine base")
    merge = commands.add_parser("merge", help="save a checkpoint's model with the adapter merged in")
    runs: list[tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]] = [
        (export, _export),
        (merge, _merge),
    ]
    for command, run in runs:
        command.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint, or folder of a run")
        command.add_argument("--output", type=Path, required=True, help="folder to write")
        command.set_defaults(run=run)
    export.add_argument(
        "--truncated",
        action="store_true",
        help="cut an adapter that carries an offset of the base from rank 2r to r, and print the error",
    )
    return parser


def _export(args: argparse.Namespace) -> None:
    from lightning_rlora.adapters import export_adapter, find_adapted
    from lightning_rlora.modules.checkpoint import load_module

    model = find_adapted(load_module(_checkpoint(args.ckpt_path)))
    error = export_adapter(model, args.output, truncated=args.truncated)
    print(f"adapter written to {args.output}" + (f", relative truncation error {error:.3e}" if args.truncated else ""))


def _merge(args: argparse.Namespace) -> None:
    from lightning_rlora.adapters import merge_adapter
    from lightning_rlora.modules.checkpoint import load_module, save_pretrained

    module = load_module(_checkpoint(args.ckpt_path))
    save_pretrained(merge_adapter(module.model), module.tokenizer, args.output)
    print(f"merged model written to {args.output}")


def _checkpoint(path: Path) -> Path:
    """A checkpoint file, or the last one of a run's folder."""
    return path / "checkpoints" / "last.ckpt" if path.is_dir() else path


def _set_environment() -> None:
    """Set what must stand before torch and the rest are imported: patient threads, and fewer notices."""
    # Threads that spin while they wait take whole time slices from each other where a core is shared: with one of two
    # cores busy, a training step took 6 s, and 0.7 s with patient ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in ("LeafSpec", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f".*{message}", FutureWarning)
    for message in ("LightningCLI's args", "does not have many workers", "not empty", "smaller than the logging"):
        warnings.filterwarnings("ignore", f".*{message}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.logger_connector"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())


def _user_line(error: Exception) -> str | None:
    """The line to print for wrong input or an environment that refuses; None for a bug."""
    cause: BaseException | None = error
    while cause is not None:  # the configuration parser wraps what a constructor raises
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    module, name = type(error).__module__, type(error).__name__
    if module.startswith("lightning") and name == "MisconfigurationException":
        return " ".join(str(error).split())
    if name == "OutOfMemoryError":
        return "the device's memory does not suffice: lower data.batch_size or set model.gradient_checkpointing"
    if isinstance(error, ValueError) and "loaded state dict" in str(error):
        return "the checkpoint was made with another optimizer or adapter: resume with the run's own configuration"
    return None


if __name__ == "__main__":
    main()
