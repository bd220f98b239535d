"""Chat rows: whatever a row calls its messages, a prompt of messages and the response to learn.

A message is `{"role": "system" | "user" | "assistant", "content": a string}`. Nothing here knows a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Message = dict[str, str]

SENDERS = {  # what data sets call the roles
    **{"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"},
    **dict.fromkeys(("chatgpt", "bing", "bard", "model"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call", "tools")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class ChatRows:
    """How the rows of a file become chat examples.

    Attributes:
        any_row: rows without messages, too, are read as a user's message and its answer.
        train_on: which of the assistant's messages are responses to learn: the last, or all, each an example with what
            stands before it as its prompt.
        system: the system message of rows that have none.
    """

    any_row: bool = False
    train_on: Literal["last", "all"] = "last"
    system: str | None = None


def messages_of_row(row: dict) -> list | None:
    """What a chat row holds, as it stands there; None for a row that is none.

    That is `messages`, `conversations`, or `prompt` and `completion` where both are lists.
    """
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list) and row[column]:
            return row[column]
    parts = [row.get(column) for column in ("prompt", "completion")]
    return [*parts[0], *parts[1]] if all(isinstance(part, list) and part for part in parts) else None


def read_messages(messages: Sequence[object], system: object = None) -> list[Message]:
    """Messages with the roles and plain contents that templates take. Raises ValueError saying what cannot be read.

    Args:
        system: what a column of that name holds; it comes in front where there is no system message.
    """
    found = [read_message(message, number) for number, message in enumerate(messages, 1)]
    if system and not (found and found[0]["role"] == "system"):
        found.insert(0, {"role": "system", "content": require_text("system", system)})
    return found


def read_message(message: object, number: int = 1) -> Message:
    """One message. Raises ValueError naming its number in the row."""
    where = f"message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} is no object with role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role in TOOL_ROLES or any(message.get(key) for key in TOOL_KEYS):
        raise ValueError(f"{where} calls a tool or is its answer, and tools are not read")
    if any(message.get(key) for key in REASONING_KEYS):
        raise ValueError(f"{where} has its reasoning apart, which is not read: write it into the content")
    if role not in SENDERS:
        raise ValueError(f"{where} has the role {role!r}, none of {', '.join(SENDERS)}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    return {"role": SENDERS[role], "content": require_text(f"content of {where}", content)}


def _part(part: object, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind != "text":
        raise ValueError(f"{where} holds content of the type {kind!r}, and text alone is read")
    return require_text(f"content of {where}", part.get("text") if isinstance(part, dict) else part)


def examples_of(messages: list[Message], options: ChatRows) -> list[tuple[list[Message], str, str]]:
    """`(prompt, response, fault)` of each response to learn; the response without white space at its ends.

    Raises ValueError where the messages do not end with the assistant's.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("its last message is not the assistant's: there is no response to learn")
    if options.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system}, *messages]
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found = []
    for place in places if options.train_on == "all" else places[-1:]:
        prompt, response = messages[:place], messages[place]["content"].strip()
        fault = "" if response else "the text to learn is empty, or white space alone"
        if not any(message["role"] == "user" for message in prompt):
            fault = "no user's message stands in front of the assistant's"
        found.append((prompt, response, fault))
    return found


def require_text(column: str, value: object) -> str:
    """The string in a column. Raises ValueError where it is none, or holds half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {kind(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can write one ("\ud83d"); no tokenizer reads it
        raise ValueError(f"column {column!r} holds half of a surrogate pair, which is no character") from None
    return value


def kind(value: object) -> str:
    """What JSON calls a value."""
    return "null" if value is None else type(value).__name__
