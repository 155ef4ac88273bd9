"""Writing files as a whole."""

import os
import warnings
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: whoever reads it sees the old content or the new, never a part.

    If there is no room for the new content, nothing of it stays.

    Raises:
        OSError: If the file cannot be written, with its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # a full disk names no file, and the partial one's name says little
            error.filename = str(path)
        partial.unlink(missing_ok=True)
        raise


def write_plot(path: Path, content: bytes) -> None:
    """Replace a plot or a sample picture as a whole, or warn if it cannot be written: no training ends for it."""
    try:
        write_atomically(path, content)
    except OSError as error:
        warnings.warn(f"the plot {path} could not be written: {error.strerror or error}", stacklevel=2)
