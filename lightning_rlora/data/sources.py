"""Reading: from the name of a source to plain records (one dict per document)."""

import bz2
import csv
import glob
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lightning_rlora.data.python_topics import python_topics
from lightning_rlora.errors import UserError

Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TableFormat:
    """How CSV and TSV files are written.

    Attributes:
        columns: Names of the columns of files without a header line.
        quoting: Whether quotation marks enclose fields; otherwise they are characters like any other.
    """

    columns: tuple[str, ...] | None = None
    quoting: bool = True


EMBEDDED: dict[str, Callable[[str], list[Record]]] = {"python-topics": python_topics}


def read_records(
    sources: str | list[str],
    stage: str,
    hub_config: str | None = None,
    streaming: bool = False,
    table: TableFormat = TableFormat(),
) -> Iterator[Record]:
    """Reads every record of one or several sources, one after the other, without a cache for local files.

    Args:
        sources: A file, a folder, a glob, "embedded:NAME" or a hub id (with an optional "#SPLIT"), or a list of these.
        stage: "train", "validation", "test" or "predict"; picks the split of embedded and hub data sets.
        hub_config: Configuration name of hub data sets.
        streaming: Read hub data sets without downloading them first. Local files are always read as they are needed.
        table: How CSV and TSV files are written.

    Yields:
        The records.

    Raises:
        UserError: A source does not exist, cannot be read or is broken.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        if source.startswith("embedded:"):
            yield from _embedded(source)(stage)
        elif files := local_files(source):
            for file in files:
                yield from _reader(file, table)(file)
        else:
            yield from load_hub(source, stage, hub_config, streaming)


def is_on_hub(source: str) -> bool:
    """Tells whether a source names a hub data set.

    Raises:
        UserError: The source can only be a local file, and there is none.
    """
    return not source.startswith("embedded:") and not local_files(source)


def load_hub(source: str, stage: str, hub_config: str | None, streaming: bool) -> Any:
    """Loads "user/name#split" with ``datasets``; without a split it is the stage's ("test" for predict)."""
    from datasets import load_dataset

    name, _, split = source.partition("#")
    split = split or ("test" if stage == "predict" else stage)
    try:
        return load_dataset(name, hub_config, split=split, streaming=streaming)
    except Exception as error:  # the hub's client raises errors of half a dozen libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        offline = isinstance(error, ConnectionError) or "onnect" in type(error).__name__ or "offline" in reason.lower()
        what = "the hub cannot be reached" if offline else f"the hub data set cannot be loaded (split {split!r})"
        raise UserError(f"{stage}: no such file or folder {name!r}, and {what}: {reason}") from error


def hold_out(records: list[T], fraction: float, generator: np.random.Generator) -> tuple[list[T], list[T]]:
    """Splits records into those to train on and those held out, both in their order; at least one is held out."""
    if len(records) == 1:
        raise UserError("train: there is only 1 record: give `validation`, or set validation_fraction to 0")
    count = max(1, round(fraction * len(records)))
    chosen = set(generator.permutation(len(records))[:count].tolist())
    kept = [record for i, record in enumerate(records) if i not in chosen]
    return kept, [record for i, record in enumerate(records) if i in chosen]


def _embedded(source: str) -> Callable[[str], list[Record]]:
    name = source.removeprefix("embedded:")
    if name not in EMBEDDED:
        known = ", ".join(f"embedded:{known}" for known in EMBEDDED)
        raise UserError(f"unknown embedded data set {source!r}: there is {known}")
    return EMBEDDED[name]


def local_files(source: str) -> list[Path]:
    """Lists the files that a path, folder or glob means; an empty list says that it may be a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _ending(file) in READERS]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"the folder {source!r} holds no file that ends in {', '.join(READERS)}")
        return files
    if any(mark in source.partition("#")[0] for mark in "*?"):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 (it takes any path)
        if not found:
            raise UserError(f"no file matches {source!r}")
        return [file for match in found for file in local_files(str(match))]
    only_a_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    if only_a_path or _ending(path) in READERS:
        raise UserError(f"no such file or folder: {source!r}")
    return []


def _ending(file: Path) -> str:
    """Gives the ending that tells the format: ".jsonl" for both a.jsonl and a.jsonl.xz."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _reader(file: Path, table: TableFormat) -> Callable[[Path], Iterator[Record]]:
    if _ending(file) not in READERS:
        raise UserError(f"unknown file ending of {str(file)!r}: use one of {', '.join(READERS)}")
    reader = READERS[_ending(file)]
    return partial(_read_csv, table=table) if reader is _read_csv else reader


def _open_zst(file: Path, mode: str, encoding: str, newline: str | None) -> IO[str]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{str(file)!r} needs the package zstandard: pip install zstandard") from error
    return zstandard.open(file, mode, encoding=encoding, newline=newline)


COMPRESSIONS: dict[str, Callable[..., IO[str]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _lines(file: Path, newline: str | None = None) -> Iterator[str]:
    """Yields the lines of a text file, compressed or not; unreadable contents become a `UserError`."""
    opener = COMPRESSIONS.get(file.suffix.lower(), open)
    number = 0
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline=newline) as stream:
            for number, line in enumerate(stream, start=1):  # noqa: B007 (the errors below name the line)
                yield line
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8 text (after line {number}): convert it") from error
    except Exception as error:  # every decompressor has errors of its own; nothing but opening and reading runs here
        raise UserError(f"{str(file)!r} cannot be read (after line {number}): {error}") from error


def _read_text(file: Path) -> Iterator[Record]:
    yield {"text": "".join(_lines(file))}


def _read_jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield _record(_parse(line, file, number), f"{file}, line {number}")


def _read_json(file: Path) -> Iterator[Record]:
    """A list of records, or one record after the other on lines of their own, as many ".json" data files are."""
    lines = list(_lines(file))
    try:
        contents = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise UserError(f"broken JSON in {str(file)!r}, line {error.lineno}: {error.msg}") from error
        yield from _read_jsonl(file)
        return
    for number, entry in enumerate(contents if isinstance(contents, list) else [contents], start=1):
        yield _record(entry, f"{file}, entry {number}")


def _parse(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in {str(file)!r}, line {number}: {error.msg}") from error


def _record(entry: Any, where: str) -> Record:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with fields, found {type(entry).__name__}")
    return entry


def _read_csv(file: Path, table: TableFormat = TableFormat()) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a field may hold a whole document
    reader = csv.DictReader(
        _lines(file, newline=""),
        fieldnames=table.columns,
        delimiter="\t" if _ending(file) == ".tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if table.quoting else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or [])
                expected = "as in the header" if table.columns is None else "as there are names for"
                raise UserError(f"{str(file)!r}, line {reader.line_num}: not {count} columns {expected}")
            yield row
    except csv.Error as error:
        hint = " (or are its quotation marks ordinary characters?)" * table.quoting
        raise UserError(f"broken table in {str(file)!r}, line {reader.line_num}: {error}{hint}") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{str(file)!r} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
