"""Rows of a data file: whatever columns it has, a prompt (`prefix`) and the response to learn (`text`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from modeling.text.json_files import read_json

COLUMNS_NAMED = 8  # how many columns a message names


def alpaca_prompt(instruction: str, input: str = "", system: str = "", history: Sequence[Sequence[str]] = ()) -> str:
    """The Alpaca template up to and including the newline before the response.

    Args:
        system: stands in front of it all.
        history: earlier pairs of an instruction and its response, which come before the instruction.
    """
    front = f"{system}\n\n" if system else ""
    context = ", paired with an input that provides further context" if input else ""
    input_section = f"### Input:\n{input}\n\n" if input else ""
    earlier = "".join(f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n" for asked, answer in history)
    return (
        f"{front}Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"{earlier}### Instruction:\n{instruction}\n\n{input_section}### Response:\n"
    )


def _alpaca_row(row: dict) -> tuple[str, str]:
    given = {column: row[column] for column in ("system", "history") if _is_filled(row.get(column))}
    if row.get("input"):
        given["input"] = row["input"]
    pairs = given.get("history", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("column 'history' holds something else than pairs of an instruction and its response")
    for column, value in given.items():
        for text in chain(*pairs) if column == "history" else (value,):
            _require_text(column, text)
    return alpaca_prompt(row["instruction"], **given), row["output"]


@dataclass(frozen=True)
class Layout:
    """Columns that make a row: those that must be there, and how they become `(prefix, text)`."""

    columns: tuple[str, str]
    convert: Callable[[dict], tuple[str, str]]
    optional: tuple[str, ...] = ()


# The columns that a row may have, tried in this order.
LAYOUTS = (
    Layout(("prefix", "text"), lambda row: (row["prefix"], row["text"])),
    Layout(("instruction", "output"), _alpaca_row, optional=("input", "system", "history")),
    Layout(("prompt", "completion"), lambda row: (row["prompt"], row["completion"])),
    Layout(("prompt", "output"), lambda row: (row["prompt"], row["output"])),
)
# Columns that change what a row says, in the formats of chat, preference and multimodal data. A row that has one filled
# is not trained on without it.
CHANGE_THE_MEANING = (
    *("system", "system_prompt", "history", "messages", "conversation", "conversations", "tools"),
    *("image", "images", "video", "videos", "audio", "audios", "chosen", "rejected"),
)
# What data/prepare_data.py makes training rows of.
RAW_COLUMNS = {("question", "answer"): "gsm8k", ("instruction", "response"): "dolly", ("text", "code"): "code"}


def prefix_and_text(row: object) -> tuple[str, str]:
    """`(prefix, text)` of one row. Raises ValueError saying which column is missing, holds no text, or is not read.

    A list of references under `output` (evaluation files) gives its first.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a JSON {_kind(row)}, not an object with named columns")
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns):
            row = {**row, **{c: row[c][0] for c in layout.columns if isinstance(row[c], list) and row[c]}}
            for column in layout.columns:
                _require_text(column, row[column])
            require_nothing_unread(row, layout.columns, layout.optional)
            return layout.convert(row)
    known = "; ".join(" + ".join(layout.columns) for layout in LAYOUTS)
    named = ", ".join(map(repr, sorted(row)[:COLUMNS_NAMED])) + (", …" if len(row) > COLUMNS_NAMED else "")
    raw = next((command for columns, command in RAW_COLUMNS.items() if all(c in row for c in columns)), None)
    remedy = f". python data/prepare_data.py {raw} --source FILE --output NEW.jsonl makes rows of it" if raw else ""
    raise ValueError(f"it has the columns {named or '(none)'}, and none of these pairs: {known}{remedy}")


def require_nothing_unread(row: dict, columns: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises ValueError where a column that is not among those read, and is not empty, changes what the row says."""
    unread = (*CHANGE_THE_MEANING, *(["context"] if "instruction" in columns else []))
    for column in unread:
        if column not in (*columns, *optional) and _is_filled(row.get(column)):
            remedy = "call it 'input'" if column == "context" else "write it into the prompt"
            raise ValueError(f"column {column!r} is not empty, and is not read: {remedy}, or delete the column")
    # Of TRL's and LLaMA-Factory's rows for KTO.
    unwanted = row.get("kto_tag") is False or ("completion" in columns and row.get("label") is False)
    if unwanted:
        raise ValueError("its response is marked as one that is not wanted (column 'label' or 'kto_tag' is false)")


def _is_filled(value: object) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    return bool(value) and value == value  # pandas writes NaN where there is nothing


def _require_text(column: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {_kind(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can write one ("\ud83d"); no tokenizer reads it
        raise ValueError(f"column {column!r} holds half of a surrogate pair, which is no character") from None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def read_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a data file as `{"row", "prefix", "text", "fault"}`.

    `row` counts from 1: the place in the array, or the line. `fault` says why the row cannot be used, and is "" for one
    that can; prefix and text are "" where there is one. Raises what `read_json` raises.
    """
    for number, row in read_json(path):
        prefix = text = fault = ""
        try:
            prefix, text = prefix_and_text(row)
            if not text.strip():
                prefix = text = ""
                fault = "the text to learn is empty, or white space alone"
        except ValueError as error:
            fault = str(error)
        yield {"row": number, "prefix": prefix, "text": text, "fault": fault}
