"""A JSON array read element by element, so that a file of any size takes little memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

BLOCK = 1 << 20  # characters that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")


def elements(file: TextIO, block: int = BLOCK) -> Iterator[object]:
    """The elements of the array in a file, of which no more is in memory than a block and one element.

    Raises json.JSONDecodeError as `json.load` does, line and column counted from the beginning of the file. Whether the
    file ends too early, `ends_too_early` says.
    """
    text = _Text(file, block)
    text.mark()
    text.place += 1  # the bracket
    if text.mark() == "]":
        text.place += 1
    else:
        while True:
            yield text.value()
            mark = text.mark()
            if mark not in (",", "]"):
                raise text.wrong("Expecting ',' delimiter", text.place)
            text.place += 1
            if mark == "]":
                break
    if text.mark():
        raise text.wrong("Extra data", text.place)


def ends_too_early(error: json.JSONDecodeError) -> bool:
    """Whether nothing is wrong with the document but that it ends. (The error's words differ from Python to Python.)"""
    return _in_open_string(error) or not error.doc[error.pos :].strip()


def _in_open_string(error: json.JSONDecodeError) -> bool:
    """Whether a string begins at the error's place that the document does not end."""
    if not error.doc.startswith('"', error.pos):
        return False
    try:
        json.decoder.scanstring(error.doc, error.pos + 1)
    except json.JSONDecodeError as within:
        return within.pos == error.pos
    return False


class _Text:
    """A file's characters: those from `place` on in `buffer`, then those still to be read, if it is not `whole`."""

    def __init__(self, file: TextIO, block: int):
        self.file, self.block = file, block
        self.buffer, self.place, self.whole = "", 0, False
        self.lines, self.columns = 0, 0  # what lies before the buffer: whole lines, and characters of the next one
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> None:
        """Reads as much again as there is, at least a block: an element of many blocks is not begun anew at each."""
        dropped, rest = self.buffer[: self.place], self.buffer[self.place :]
        last = dropped.rfind("\n")
        self.lines += dropped.count("\n")
        self.columns = len(dropped) - last - 1 + (self.columns if last < 0 else 0)
        piece = self.file.read(max(self.block, len(rest)))
        self.buffer, self.place, self.whole = rest + piece, 0, not piece

    def mark(self) -> str:
        """The next character that is not white space, which stays unread; empty at the end of the file."""
        while True:
            self.place = SPACE.match(self.buffer, self.place).end()
            if self.place < len(self.buffer) or self.whole:
                return self.buffer[self.place : self.place + 1]
            self.more()

    def value(self) -> object:
        self.mark()
        while True:
            try:
                value, end = self.decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                # Cut off by the end of the buffer, or wrong?
                cut_off = _in_open_string(error) or error.pos > len(self.buffer) - 16
                if self.whole or not cut_off:
                    raise self.wrong(error.msg, error.pos) from None
            else:
                # At the end of the buffer it may be the beginning of a longer number, as 1 is of 1e+5.
                if self.whole or len(self.buffer) - end > 2:
                    self.place = end
                    return value
            self.more()

    def wrong(self, message: str, position: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self.buffer, position)
        if error.lineno == 1:
            error.colno += self.columns
        error.lineno += self.lines
        return error
