"""Writing files so that nothing that is cut short is taken for whole, and nothing is written twice at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

FULL = {  # errors of a disk that takes no more: what Python, Rust (safetensors) and C++ (torch.save) say
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f)",
}


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames it: readers never see half of it.

    The folder is made where there is none. Raises OSError; what was there before then stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is inside; others wait. The lock is a file, which stays, empty.

    Raises OSError where it cannot be made.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is at work on what %s is for: waiting for it.", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # given back when the file is closed, and when the process dies
