"""The files of an evaluation: rows that are appended, settings that must agree, results, and tables for people."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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
            "the same command again: what is there is gone on from."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames: a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path, limit: int | None = None) -> list[dict]:
    """The objects of a JSONL file, at most `limit`. Raises ValueError naming the file and the line."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
    return rows


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time is inside, for one `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
        yield


class RowFile:
    """A JSONL file that several processes of one machine append to, of rows with a `row` number from 0 to n - 1.

    A line that an interruption tore is dropped; the file is put into the order of its rows once all are there.
    """

    def __init__(self, path: Path):
        self.path = path

    def done(self) -> set[int]:
        """The rows that are there, after dropping a torn last line."""
        with locked(self.path):
            if not self.path.exists():
                return set()
            self._drop_torn_line()
            return {row["row"] for row in read_lines(self.path)}

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
        """Cuts off what stands behind the last line end, and returns the size of the rest."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(0, size - 1))
            if file.read() in (b"", b"\n"):
                return size
        size = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, size)
        return size

    def finish(self, n_rows: int) -> bool:
        """Sorts the file where all `n_rows` are there; returns whether they are."""
        with locked(self.path):
            if not self.path.exists():  # of several processes, one without rows of its own ends first
                return False
            rows = {row["row"]: row for row in read_lines(self.path)}
            if len(rows) < n_rows:
                return False
            write_text(self.path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows)))
            return True


# --------------------------------------------------------------------------------------- what a result was made with


def require_same_settings(path: Path, settings: dict, what: str) -> None:
    """Writes the settings to `path`; where other ones stand there already, raises ValueError naming the differences."""
    with locked(path):
        if not path.exists():
            write_json(path, settings)
            return
        earlier = read_json(path)
    different = differences(earlier, settings)
    if different:
        raise ValueError(
            f"{what} was begun with other settings, and is not gone on with:\n"
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


# ------------------------------------------------------------------------------------------------- numbers and tables


def summary(values: dict[str, float]) -> dict:
    """Mean and sample standard deviation (n - 1; None of a single value) of named values."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": values,
    }


def mean_and_std(entry: dict, digits: int = 2) -> str:
    if entry.get("std") is None:
        return f"{entry['mean']:.{digits}f}"
    return f"{entry['mean']:.{digits}f} ± {entry['std']:.{digits}f}"


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
