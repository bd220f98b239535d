"""Where rows come from: a file of JSON or Parquet, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from modeling.errors import InputError, first_line, user_input
from modeling.text.json_files import read_json, require_json_file

PARQUET = b"PAR1"
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+):(?P<split>\w[^/]*)")


def hub_name(source: str | Path) -> tuple[str, str] | None:
    """`(name, split)` of a hub data set, `user/name:split`; also of a folder with data files, `FOLDER:split`."""
    if match := HUB_NAME.fullmatch(str(source)):
        return match["name"], match["split"]
    folder, colon, split = str(source).rpartition(":")
    return (folder, split) if colon and Path(folder).is_dir() else None


def require_source(source: str | Path) -> None:
    """Raises InputError where a quick look tells already that nothing can be read: a missing file, another format."""
    if (Path(source).exists() or hub_name(source) is None) and not _is_parquet(Path(source)):
        require_json_file(source)


def read_source(source: str | Path) -> Iterator[tuple[int, object]]:
    """`(number, row)` of all rows; numbers count from 1. Raises InputError naming the source, and what to do."""
    if _is_parquet(Path(source)):
        yield from enumerate(_parquet_rows(Path(source)), 1)
    elif not Path(source).exists() and hub_name(source) is not None:
        yield from enumerate(load_hub(*hub_name(source)), 1)
    else:
        yield from read_json(source)


def load_hub(name: str, split: str):
    """The `datasets.Dataset` of that name. Raises InputError where it cannot be had."""
    import datasets  # here: it loads slowly, and files do without it

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the network and the readers each have exceptions of their own
        raise InputError(
            f"{name}:{split} is no file, and no data set that can be loaded ({type(error).__name__}: "
            f"{first_line(error)}). Check the name and the split, or give a file."
        ) from error


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with user_input(), path.open("rb") as file:
        return file.read(4) == PARQUET


def _parquet_rows(path: Path) -> Iterator[dict]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a complete Parquet file ({first_line(error)}). Copy it again.") from None
