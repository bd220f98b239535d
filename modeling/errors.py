"""What a user can put right, and how a script ends on it: one message, exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HEAD_START = 5.0  # seconds that the first process has to speak for all


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, where, why, and what to do about it."""


def first_line(error: BaseException) -> str:
    """What an exception says, as a part of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(" .:") + (" …" if len(lines) > 1 or len(lines[0]) > 300 else "")


@contextlib.contextmanager
def user_input(what: str = "") -> Iterator[None]:
    """Around code that fails for the user's input alone: its ValueErrors and OSErrors become InputErrors.

    Args:
        what: the flag and its value, put in front of the message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {error}" if what else str(error)) from error


def one_message(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a script's main: an InputError ends it with `SCRIPT: error: MESSAGE` and exit status 2.

    Every other exception is a fault of the program, and keeps its traceback. Of several processes the first one speaks,
    and its launcher then stops the others; one that is still there a few seconds later has something of its own to say.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            rank = int(os.environ.get("RANK", "0"))
            if rank:
                time.sleep(HEAD_START)
            name = Path(sys.argv[0]).name + (f" (rank {rank})" if rank else "")
            print(f"{name}: error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
