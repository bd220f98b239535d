"""Locks that a killed run left where torch compiles extensions: torch would wait for them for ever.

DeepSpeed compiles parts of itself on its first start, through torch, which marks the folder with a file `lock`. A run
that is killed meanwhile leaves it there, and every later one would stand still without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

LONGEST_BUILD = 30 * 60.0  # seconds; these builds take minutes at most


def clear_stale_locks() -> None:
    """Removes locks that no process of this machine holds and that are too old for one of another machine.

    Of younger ones it tells: a home folder may be shared with a machine that compiles just now.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "torch_extensions"
    )
    for lock in [*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")]:
        with contextlib.suppress(FileNotFoundError):  # given back meanwhile
            age = time.time() - lock.stat().st_mtime
            if _is_open(lock):
                continue
            if age > LONGEST_BUILD:
                lock.unlink()
                logger.warning("%s was left by a run that was killed while it compiled, and is removed.", lock)
            elif lock.exists():
                logger.warning(
                    "%s: no process of this machine holds it. If no other machine is compiling there, it was left by a "
                    "run that was killed, and this one waits for it for ever: delete the file.",
                    lock,
                )


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open. (Those of other users do not show their files.)"""
    wanted = os.path.realpath(path)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == wanted:
                return True
    return False
