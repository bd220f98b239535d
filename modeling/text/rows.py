"""Rows of a data file: whatever columns it has, a prompt (`prefix`, `messages`) and the response to learn (`text`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from modeling.text.messages import ChatRows, Message, examples_of, kind, messages_of_row, read_messages, require_text
from modeling.text.sources import read_source

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


FILLED_TEMPLATE = re.compile(r"### Instruction:\n(.*?)\n\n(?:### Input:\n(.*)\n\n)?### Response:\n\Z", re.DOTALL)


def question_of(prompt: str) -> str:
    """What a user would say: of a prompt in the Alpaca template its instruction, a blank line and its input.

    One that is not exactly that, or has headings of the template in its parts, stays as it is.
    """
    filled = FILLED_TEMPLATE.search(prompt)
    parts = ("", "") if filled is None else (filled[1], filled[2] or "")
    if alpaca_prompt(*parts) != prompt or any("\n### " in part for part in parts):
        return prompt
    return _question(*parts)


def _question(instruction: str, input: str | None) -> str:
    return f"{instruction}\n\n{input}" if input else instruction


def _given(row: dict) -> dict:
    """The optional columns of an Alpaca row that are filled. Raises ValueError where one holds no text."""
    given = {column: row[column] for column in ("system", "history") if _is_filled(row.get(column))}
    if row.get("input"):
        given["input"] = row["input"]
    pairs = given.get("history", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("column 'history' holds something else than pairs of an instruction and its response")
    for column, value in given.items():
        for text in chain(*pairs) if column == "history" else (value,):
            require_text(column, text)
    return given


def _alpaca_row(row: dict) -> tuple[str, str]:
    return alpaca_prompt(row["instruction"], **_given(row)), row["output"]


def _alpaca_messages(row: dict) -> list[Message]:
    given = _given(row)
    earlier = [text for pair in given.get("history", []) for text in pair]
    texts = [*earlier, _question(row["instruction"], given.get("input")), row["output"]]
    front = [{"role": "system", "content": given["system"]}] if "system" in given else []
    return front + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@dataclass(frozen=True)
class Layout:
    """Columns that make a row: those that must be there, and how they become `(prefix, text)`, or messages."""

    columns: tuple[str, str]
    optional: tuple[str, ...] = ()
    convert: Callable[[dict], tuple[str, str]] | None = None  # by default the two columns as they are
    as_messages: Callable[[dict], list[Message]] | None = None  # by default a user's message and its answer

    def prefix_and_text(self, row: dict) -> tuple[str, str]:
        return self.convert(row) if self.convert else tuple(row[column] for column in self.columns)

    def messages(self, row: dict) -> list[Message]:
        if self.as_messages:
            return self.as_messages(row)
        prompt, response = (row[column] for column in self.columns)
        return [{"role": "user", "content": question_of(prompt)}, {"role": "assistant", "content": response}]


# The columns that a row may have, tried in this order.
LAYOUTS = (
    Layout(("prefix", "text")),
    Layout(("instruction", "output"), ("input", "system", "history"), _alpaca_row, _alpaca_messages),
    Layout(("prompt", "completion")),
    Layout(("prompt", "output")),
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
    layout, row = _laid_out(row)
    return layout.prefix_and_text(row)


def _laid_out(row: object) -> tuple[Layout, dict]:
    """The layout of a row without messages, and the row with text in its columns. Raises as `prefix_and_text`."""
    _require_object(row)
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns):
            row = {**row, **{c: row[c][0] for c in layout.columns if isinstance(row[c], list) and row[c]}}
            for column in layout.columns:
                require_text(column, row[column])
            require_nothing_unread(row, layout.columns, layout.optional)
            return layout, row
    known = "; ".join(" + ".join(layout.columns) for layout in LAYOUTS)
    named = ", ".join(map(repr, sorted(row)[:COLUMNS_NAMED])) + (", …" if len(row) > COLUMNS_NAMED else "")
    raw = next((command for columns, command in RAW_COLUMNS.items() if all(c in row for c in columns)), None)
    remedy = f". python data/prepare_data.py {raw} --source FILE --output NEW.jsonl makes rows of it" if raw else ""
    raise ValueError(
        f"it has the columns {named or '(none)'}, and none of these pairs: {known}; nor messages or conversations"
        f"{remedy}"
    )


def _require_object(row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"it is a JSON {kind(row)}, not an object with named columns")


def is_chat_row(row: object) -> bool:
    """Whether a row holds messages (see `messages_of_row`). Columns of another layout come first."""
    if not isinstance(row, dict) or messages_of_row(row) is None:
        return False
    return not any(all(isinstance(row.get(column), str) for column in layout.columns) for layout in LAYOUTS)


def messages_of(row: object, options: ChatRows) -> list[Message]:
    """All messages of one row. Raises ValueError saying what cannot be read, or that it is no chat row."""
    _require_object(row)
    if is_chat_row(row):
        require_nothing_unread(row, ("messages", "conversations"), ("system",))
        return read_messages(messages_of_row(row), row.get("system"))
    layout, row = _laid_out(row)
    if not options.any_row:
        raise ValueError("it holds no messages, and the rows before it do. --chat true reads it as a user's message")
    return layout.messages(row)


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


def are_chat_rows(source: str | Path) -> bool:
    """Whether the first row that is of any known form holds messages. Raises what `read_source` raises."""
    for _, row in read_source(source):
        if is_chat_row(row):
            return True
        if isinstance(row, dict) and any(all(c in row for c in layout.columns) for layout in LAYOUTS):
            return False
    return False


def read_rows(source: str | Path, chat: ChatRows | None = None, limit: int | None = None) -> Iterator[dict]:
    """The examples of a file or a hub data set as `{"row", "prefix", "text", "fault"}`.

    `row` counts from 1: the place in the array, or the line. `fault` says why the row cannot be used, and is "" for one
    that can; prefix and text are "" where there is one. With `chat`, `messages` stands in the place of `prefix`: those
    of the prompt, as JSON; and a row may give several examples. Raises what `read_source` raises.

    Args:
        limit: only the first so many rows.
    """
    for number, row in islice(read_source(source), limit):
        yield from ({"row": number, **example} for example in examples_of_row(row, chat))


def examples_of_row(row: object, chat: ChatRows | None = None) -> list[dict]:
    """The examples of one row, as `read_rows` gives them."""
    try:
        return _plain_example(row) if chat is None else _chat_examples(row, chat)
    except ValueError as error:
        return [{"prefix" if chat is None else "messages": "", "text": "", "fault": str(error)}]


def _plain_example(row: object) -> list[dict]:
    if is_chat_row(row):
        raise ValueError("it holds messages, and the rows before it do not. --chat true reads all as chats")
    prefix, text = prefix_and_text(row)
    if not text.strip():
        raise ValueError("the text to learn is empty, or white space alone")
    return [{"prefix": prefix, "text": text, "fault": ""}]


def _chat_examples(row: object, options: ChatRows) -> list[dict]:
    found = examples_of(messages_of(row, options), options)
    return [{"messages": json.dumps(prompt), "text": text, "fault": fault} for prompt, text, fault in found]
