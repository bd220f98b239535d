"""What the evaluation scripts share: files of rows, settings that must agree, results, tables, and arguments."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from modeling import files
from modeling.text import json_files

PACKAGES = ("torch", "transformers", "peft", "rouge-score", "evalplus", "lm-eval")
ENDS = 1 << 20  # bytes of a weight file's beginning and end that its fingerprint reads


# -------------------------------------------------------------------------------------------------- JSON and JSONL


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk names the file that was to be written, and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}. Make room, or give another folder, then start "
            "the same command again: it resumes from what is there."
        ) from error


def write_text(path: Path, text: str) -> None:
    """A file that is there is whole. Raises OSError naming the file."""
    with writing(path):
        files.write_whole(path, text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path, limit: int | None = None) -> list[dict]:
    """The objects of a JSONL file, at most `limit`. Raises InputError naming the file and the line."""
    return [row for _, row in islice(json_files.read_json(path), limit)]


def locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """One process of this machine at a time is inside, for one `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.locked(path.with_name(f".{path.name}.lock"))


class RowFile:
    """A JSONL file that several processes of one machine append to, of rows with a `row` number from 0 to n - 1.

    A line that an interruption tore is dropped; the file is put into the order of its rows once all are there.
    """

    def __init__(self, path: Path):
        self.path = path

    def done(self) -> set[int]:
        """The rows that are there, after dropping a torn last line."""
        with locked(self.path):
            return {row["row"] for row in read_lines(self.path)} if self._drop_torn_line() else set()

    def append(self, rows: Iterable[dict]) -> None:
        """All of the rows, or, where the disk takes no more, none of them."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with writing(self.path), locked(self.path), self.path.open("ab", buffering=0) as file:
            size = self._drop_torn_line()  # of a process that was killed beside this one
            try:
                rest = memoryview(lines)
                while rest:  # a file without buffer may take a part only
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise

    def _drop_torn_line(self) -> int:
        """Cuts off what follows the last line end, and returns the size of the rest; 0 where there is no file."""
        content = self.path.read_bytes() if self.path.exists() else b""
        size = content.rfind(b"\n") + 1
        if size < len(content):
            os.truncate(self.path, size)
        return size

    def finish(self, n_rows: int) -> bool:
        """Sorts the file where all `n_rows` are there; returns whether they are."""
        if len(self.done()) < n_rows:
            return False
        with locked(self.path):
            rows = {row["row"]: row for row in read_lines(self.path)}
            write_text(self.path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows)))
        return True


# --------------------------------------------------------------------------------------- what a result was made with


def require_same_settings(path: Path, settings: dict, what: str) -> None:
    """Writes the settings to `path`; where it holds others already, raises ValueError naming the differences."""
    with locked(path):
        if not path.exists():
            write_json(path, settings)
    if different := differences(read_json(path), settings):
        raise ValueError(
            f"{what} was started with other settings, and cannot be resumed with these:\n"
            + "\n".join(f"  {name}: {before!r} then, {now!r} now" for name, before, now in different)
            + "\nGive the earlier settings, or another output folder, or delete the folder."
        )


def differences(first: dict, second: dict) -> list[tuple[str, object, object]]:
    """`(name, value in the first, value in the second)` of the settings that differ."""
    names = [*first, *(name for name in second if name not in first)]
    return [(n, first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def model_fingerprint(model: str) -> str | None:
    """Tells a retrained folder from the one before; None for a hub name.

    Reads names, sizes, and the first and last MiB of the files that make the model: training changes all weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for pattern in ("*.safetensors", "*.bin", "*config.json") for p in folder.glob(pattern)):
        if path.name == "training_args.bin":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, spelt as in training."""
    from transformers.hf_argparser import string_to_bool  # here: it loads slowly, and most scripts load no model

    types = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=types, help="auto: the checkpoint's.")
    parser.add_argument(
        "--trust_remote_code",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="true: run the Python code that a hub model carries. Default false.",
    )


# ------------------------------------------------------------------------------------------------- numbers and tables


def summary(values: dict[str, float]) -> dict:
    """Mean and sample standard deviation (n - 1; None of a single value) of named values."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": values,
    }


def mean_and_std(entry: dict) -> str:
    return f"{entry['mean']:.2f}" + ("" if entry["std"] is None else f" ± {entry['std']:.2f}")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text under a header: the first on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def write_results(folder: Path, task: str, model: str, **fields: object) -> dict:
    """`results.json`: what every evaluation leaves behind. `scores` is `{benchmark: {metric: summary}}`."""
    results = {"task": task, "model": model, "date": now(), **fields, "versions": versions()}
    write_json(folder / "results.json", results)
    return results
