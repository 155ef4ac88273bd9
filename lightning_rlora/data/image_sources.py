"""Reading images with captions: folders, Parquet files and data sets of the hub."""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lightning_rlora.data.sources import READERS, is_on_hub, load_hub, local_files
from lightning_rlora.errors import UserError
from lightning_rlora.image_files import Opener, image_files

METADATA = ("metadata.jsonl", "metadata.csv")
"""The files of a folder that hold captions, as Hugging Face's imagefolder has them: one record an image, with the
field "file_name"."""


class Captioned(NamedTuple):
    """An image that is not decoded yet, and one or several captions."""

    name: str
    open: Opener
    captions: tuple[str, ...]


def read_captioned(source: str, stage: str, hub_config: str | None, image: str, caption: str) -> list[Captioned]:
    """Lists the captioned images of a source, which are opened only when they are needed.

    Args:
        source: A folder of images, a Parquet file, a folder or glob of such files, or a hub id (with an optional
            "#SPLIT").
        stage: "train" or "validation"; picks the split of hub data sets.
        hub_config: Configuration name of hub data sets.
        image: Column of the images in tables.
        caption: Column of the captions in tables and metadata files.

    Raises:
        UserError: The source does not exist or cannot be read, a column is not there, or a caption is missing.
    """
    if is_remote(source):
        return _table(load_hub(source, stage, hub_config, streaming=False), source, image, caption)
    tables = _tables(source)
    if not tables:
        return _folder(source, caption)
    return [found for file in tables for found in _table(_open_table(file), str(file), image, caption)]


def is_remote(source: str) -> bool:
    """Tells whether a source names a hub data set.

    Raises:
        UserError: The source can only be a local file, and there is none.
    """
    return not Path(source).expanduser().is_dir() and is_on_hub(source)


def _tables(source: str) -> list[Path]:
    """The Parquet files that a local source means; none if it is a folder of images."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return sorted(folder.rglob("*.parquet"))
    files = local_files(source)
    if others := [file for file in files if file.suffix.lower() != ".parquet"]:
        raise UserError(f"{str(others[0])!r} is no Parquet file: give a folder of images, a Parquet file or a hub id")
    return files


def _folder(folder: str, column: str) -> list[Captioned]:
    """The images of a folder and its subfolders, each with the caption of a metadata file or of x.txt beside x.jpg."""
    files = image_files(folder, subfolders=True)
    listed = _metadata(Path(folder).expanduser(), {_absolute(file) for file in files}, column)
    found = []
    for file in files:
        text = file.with_suffix(".txt")
        if _absolute(file) in listed:
            captions = listed[_absolute(file)]
        elif text.is_file():
            captions = _captions(_read(text), str(text))
        else:
            raise UserError(
                f"the image {file} has no caption: write one into {text.name} beside it or into metadata.jsonl"
            )
        found.append(Captioned(str(file), partial(Image.open, file), captions))
    return found


def _absolute(file: Path) -> Path:
    """The one path of a file, however it is written; a link counts as itself."""
    return file.parent.resolve() / file.name


def _metadata(folder: Path, images: set[Path], column: str) -> dict[Path, tuple[str, ...]]:
    """The captions that metadata files give to images of a folder."""
    listed = {}
    for file in (file for name in METADATA for file in sorted(folder.rglob(name))):
        for number, record in enumerate(READERS[file.suffix](file), start=1):
            where = f"{file}, record {number}"
            for field in ("file_name", column):
                if field not in record:
                    raise UserError(f"{where} has no field {field!r}: its fields are {', '.join(map(str, record))}")
            image = _absolute(file.parent / str(record["file_name"]))
            if image not in images:
                named = repr(record["file_name"])
                named = named if len(named) <= 100 else f"{named[:100]} ..."
                raise UserError(f"{where} names {named}, which is no image in {folder}: add it or drop the record")
            if image in listed:
                raise UserError(f"{where} names {str(record['file_name'])!r} a second time: keep one record an image")
            listed[image] = _captions(record[column], where)
    return listed


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8 text: convert it") from error


def _captions(value: Any, where: str) -> tuple[str, ...]:
    """One or several captions, each on one line."""
    texts = ["" if text is None else text for text in (value if isinstance(value, list) else [value])]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: the caption is {text!r}, which is no text: name another column")
    captions = tuple(" ".join(text.split()) for text in texts)
    if not captions or not all(captions):
        raise UserError(f"{where}: the caption is empty: write one or take the image out of the data")
    return captions


def _open_table(file: Path) -> Any:
    """A Parquet file as a data set whose rows stay on disk."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        pyarrow.parquet.read_metadata(file)
        return Dataset.from_parquet(str(file))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{str(file)!r} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _table(table: Any, name: str, image: str, caption: str) -> list[Captioned]:
    import datasets

    for option, column in {"image_column": image, "caption_column": caption}.items():
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            raise UserError(f"{name} has no column {column!r}: its columns are {known}; give `{option}`")
    images = table.select_columns([image])
    if isinstance(table.features[image], datasets.Image):
        images = images.cast_column(image, datasets.Image(decode=False))
    rows = enumerate(table.select_columns([caption])[:][caption])
    found = [(f"row {row + 1} of {name}", partial(_open_cell, images, image, row), text) for row, text in rows]
    return [Captioned(where, opener, _captions(text, where)) for where, opener, text in found]


def _open_cell(images: Any, column: str, row: int) -> Image.Image:
    """Opens the image of a row: bytes, a path, or a dict of both as `datasets` stores images."""
    cell = images[row][column]
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, bytes | str):
        raise ValueError(f"the column {column!r} holds {type(cell).__name__}, not an image's bytes or path")
    return Image.open(BytesIO(cell) if isinstance(cell, bytes) else cell)
