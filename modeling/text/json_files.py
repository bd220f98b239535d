"""Data files of JSON: one array, or one value a line, perhaps compressed; and what is wrong with a file that is not."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from modeling.errors import InputError, user_input

# What a file begins with that is something else: (bytes, what it is, what to do).
OTHER_FORMATS = (
    (b"PAR1", "a Parquet file", "training reads those; here, pandas.read_parquet(FILE).to_json(NEW_FILE) writes JSON"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
)
GZIP = b"\x1f\x8b"


def require_json_file(path: str | Path) -> None:
    """Raises InputError where the file's first bytes tell already that it cannot be read: a quick look, for a start."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the file in it.")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path; a relative one starts at {Path.cwd()}.")
    with user_input(), path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise InputError(f"{path}: the file is empty. Was it written or copied to its end?")
    for beginning, name, remedy in OTHER_FORMATS:
        if head.startswith(beginning):
            raise InputError(f"{path} is {name}, and not JSON: {remedy}.")


def read_json(path: str | Path) -> Iterator[tuple[int, object]]:
    """`(number, value)` of a JSON array's values, or of a file with one a line. Either may be compressed with gzip.

    Numbers count from 1: the place in the array, or the line; blank lines are passed over. Lines are read one by one,
    an array as a whole. Raises InputError naming the file, the line, and what to do.
    """
    require_json_file(path)
    path = Path(path)
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
            # By content and not by name: many files that end in .json hold one object a line.
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            yield from _values_of_array(file, path) if first == "[" else _values_of_lines(file, path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error}). Copy it again.") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP or path.suffix == ".gz"
    return gzip.open(path) if compressed else path.open("rb")


def _values_of_array(file: TextIO, path: Path) -> Iterator[tuple[int, object]]:
    text = file.read()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        early = not text[error.pos :].strip() or not text.rstrip().endswith("]")
        remedy = "The file ends too early: copy it again" if early else "Repair the array there"
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). {remedy}."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise InputError(f"{path}: JSON that cannot be read ({error}).") from None
    yield from enumerate(values, 1)


def _values_of_lines(file: TextIO, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                remedy = "Repair or delete the line"
                if line.rstrip().endswith("},"):
                    remedy = "Leave out the comma behind the object"
                raise InputError(
                    f"{path}, line {number}: not valid JSON ({reason}). {remedy}: the file must be one JSON array, or "
                    "hold one JSON object a line."
                ) from None


def _not_utf8(path: Path) -> InputError:
    """Says where. (What the decoder names counts from the last block that it was given.)"""
    position, number = 0, 1
    with _open(path) as file:
        encoding = "UTF-16" if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "CP1252"
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position += error.start
                break
            position, number = position + len(line), number + 1
    return InputError(
        f"{path}, byte {position}: not UTF-8 (in line {number}). Convert the file, for example with "
        f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE."
    )
