"""The command line: `rlora fit | validate | test | predict | compare | export | merge`.

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

from lightning_rlora.errors import UserError, user_line

TRAINER_COMMANDS = {
    "fit": "train an adapter",
    "validate": "measure a model or a checkpoint on the validation data",
    "test": "measure a model or a checkpoint on the test data; replies go into answers.jsonl in the run's folder",
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
        line = user_line(error)
        if line is None:
            raise
        print(f"rlora: error: {line}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlora",
        description="Fine-tune language and text-to-image models with low-rank adapters on the fixed-rank manifold.",
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
    _add_compare(commands.add_parser("compare", help="run a plan of methods, learning rates, seeds and tasks"))
    return parser


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Run what is left of a plan, side by side, and write tables, a report and pictures. Finished runs in the "
        "output folder are not repeated, whatever machine they come from."
    )
    command.add_argument("plan", type=Path, help="YAML file, such as examples/comparison/quickstart.yaml")
    command.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    command.add_argument(
        *("--set", "-s"),
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a variable of the plan, such as a folder of data",
    )
    command.add_argument("--devices", help="as CUDA_VISIBLE_DEVICES names them, such as 0,1, or cpu; by default all")
    command.add_argument("--jobs", type=int, default=1, help="runs side by side on each device (default 1)")
    command.add_argument("--only", default="", metavar="NAME,...", help="run these methods or tasks only")
    command.add_argument("--limit-minutes", type=float, help="begin no run that would end later than this")
    command.add_argument("--keep-adapters", action="store_true", help="keep every run's trained adapter")
    command.add_argument("--report-only", action="store_true", help="run nothing, write tables and report")
    command.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    from lightning_rlora.bench.compare import run_plan, visible_devices, write_outputs
    from lightning_rlora.bench.plan_file import read_plan

    for setting in args.settings:
        if "=" not in setting:
            raise UserError(f"--set {setting}: give NAME=VALUE")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one run must go on at a time")
    if args.limit_minutes is not None and not args.limit_minutes > 0:
        raise UserError(f"--limit-minutes {args.limit_minutes}: give a time above zero")
    plan = read_plan(args.plan, dict(setting.split("=", 1) for setting in args.settings))
    if not args.report_only:
        run_plan(
            plan,
            args.output,
            _fit,
            devices=args.devices.split(",") if args.devices else visible_devices(),
            jobs=args.jobs,
            only=[name for name in args.only.split(",") if name],
            limit_minutes=args.limit_minutes,
            keep_adapters=args.keep_adapters,
        )
    failed = [result for result in write_outputs(plan, args.output) if result.status == "failed"]
    print(f"{(args.output / 'table.md').read_text(encoding='utf-8')}\nreport: {args.output / 'report.html'}")
    if failed:
        print(f"rlora: {len(failed)} runs failed, the first: {failed[0].note}; start again to retry", file=sys.stderr)
        sys.exit(1)


def _fit(config: Path) -> None:
    """Train as a configuration file says, in the worker process that this is called in."""
    _set_environment()
    from lightning_rlora.trainer_cli import RloraCLI

    RloraCLI(["fit", "--config", str(config)])


def _export(args: argparse.Namespace) -> None:
    from lightning_rlora.adapters import export_adapter, find_adapted
    from lightning_rlora.modules.checkpoint import load_module

    model = find_adapted(load_module(_checkpoint(args.ckpt_path)))
    error = export_adapter(model, args.output, truncated=args.truncated)
    print(f"adapter written to {args.output}" + (f", relative truncation error {error:.3e}" if args.truncated else ""))


def _merge(args: argparse.Namespace) -> None:
    from lightning_rlora.modules.checkpoint import load_module, save_pretrained

    save_pretrained(args.output, *load_module(_checkpoint(args.ckpt_path)).merged())
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
        logging.getLogger(name).addFilter(_no_tip)  # the same function is added once


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


if __name__ == "__main__":
    main()
