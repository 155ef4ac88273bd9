"""The files of a run folder: readable after a kill at any moment, and never lost to a later run."""

import os
from pathlib import Path

from lightning_rlora.files import write_atomically

FILES = ("metrics.csv", "loss.png", "spectrum.csv", "spectrum.png", "cost.json", "samples", "checkpoints", "adapter")
"""What a run leaves in its folder, beside its config.yaml."""


def cut_back(path: Path, header: str, step: int) -> None:
    """Keep of a CSV file, whose first column is the step, the rows before `step`; start one with `header` otherwise.

    A last line without an end is half written and goes too. Rows of a file with another header are not kept.
    """
    kept = [header]
    if path.exists():
        with path.open(encoding="utf-8", newline="") as old:
            if old.readline() == header:
                kept += [row for row in old if row.endswith("\n") and int(row.split(",", 1)[0]) < step]
    write_atomically(path, "".join(kept).encode())


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left anything here."""
    return any((folder / name).exists() for name in FILES)


def set_aside(folder: Path, config: bytes | None) -> Path:
    """Move an earlier run out of the way, into `previous/<n>` with n counting up.

    Args:
        folder: The run folder.
        config: Content of the earlier run's config.yaml. It is written anew and not moved, since by now the file in the
            folder may be the new run's.

    Returns:
        Where the earlier run is now.
    """
    earlier = folder / "previous"
    numbers = [int(path.name) for path in earlier.glob("*") if path.name.isdigit()]
    target = earlier / str(max(numbers, default=0) + 1)
    target.mkdir(parents=True)
    for name in FILES:
        if (folder / name).exists():
            (folder / name).rename(target / name)
    if config is not None:
        (target / "config.yaml").write_bytes(config)
    return target


def lies_in(path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether a checkpoint belongs to the run of a folder, and not to one set aside in it or to another folder's."""
    place, folder = Path(path).resolve(), folder.resolve()
    return place.is_relative_to(folder) and not place.is_relative_to(folder / "previous")
