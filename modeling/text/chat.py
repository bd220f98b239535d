"""One side's chat template: the prompt as this side sees it, and the token that it ends an answer with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property

from modeling.errors import first_line
from modeling.text.messages import Message

ANSWER = "qzanswerzq"  # a text that no template writes or changes
PROBE: tuple[Message, ...] = ({"role": "user", "content": "Hello."},)


class ChatTemplate:
    """The chat template of one side's tokenizer.

    Args:
        tokenizer: with a chat template.
        side: "student" or "teacher", for messages.
        kwargs: what the template is given besides the messages.
    """

    def __init__(self, tokenizer, side: str, kwargs: dict | None = None):
        self.tokenizer, self.side, self.kwargs = tokenizer, side, dict(kwargs or {})

    def render(self, messages: Iterable[Message], add_generation_prompt: bool) -> str:
        """What the template makes of messages. Raises ValueError with the template's own words where it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self.kwargs
            )
        except Exception as error:  # a template is a program of its own, and fails in ways of its own
            raise ValueError(f"the {self.side}'s chat template refuses it ({first_line(error)})") from error

    def prompt(self, messages: list[Message]) -> str:
        """The text in front of the assistant's next message. Raises ValueError where the template refuses it.

        Where a template has no system role, a system message is put in front of the first user's message. Where it has
        no generation prompt, the prompt ends with what it writes in front of an assistant's message.
        """
        if messages[0]["role"] == "system" and not self.has_system_role:
            messages = _merged(messages)
        prompt = self.render(messages, add_generation_prompt=True)
        if self.has_generation_prompt:
            return prompt
        before, found, _ = self._answered(messages).rpartition(ANSWER)
        return before if found and before.startswith(prompt) else prompt

    def question(self, messages: list[Message]) -> str:
        """The prompt to generate from: without spaces at its end, which a tokenizer joins with the response's word."""
        return self.prompt(messages).rstrip(" ")

    def _answered(self, messages: Iterable[Message]) -> str:
        return self.render([*messages, {"role": "assistant", "content": ANSWER}], add_generation_prompt=False)

    @cached_property
    def has_system_role(self) -> bool:
        """Whether it writes a system message, and neither refuses it nor drops it."""
        try:
            return ANSWER in self.render([{"role": "system", "content": ANSWER}, *PROBE], add_generation_prompt=True)
        except ValueError:
            return False

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether it writes something more where it is asked for a generation prompt."""
        return len({self.render(PROBE, add_generation_prompt=flag) for flag in (True, False)}) == 2

    @cached_property
    def written_end(self) -> str:
        """What it writes behind an assistant's last message, without white space at its ends."""
        return self._answered(PROBE).rpartition(ANSWER)[2].strip()

    @cached_property
    def end_id(self) -> int | None:
        """The token that begins what it writes there; None where that is no token, or nothing."""
        tokens = {token.content: token_id for token_id, token in self.tokenizer.added_tokens_decoder.items()}
        tokens |= dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids))
        begins = [token for token in tokens if token.strip() and self.written_end.startswith(token)]
        return int(tokens[max(begins, key=len)]) if begins else None

    @property
    def writes_the_date(self) -> bool:
        return "strftime_now" in self.tokenizer.get_chat_template()

    @property
    def fingerprint(self) -> str:
        """A digest of all that prompts depend on, the day's date included where the template writes it."""
        parts = [self.tokenizer.get_chat_template(), json.dumps(self.kwargs, sort_keys=True), self.prompt(list(PROBE))]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _merged(messages: list[Message]) -> list[Message]:
    system, *others = messages
    place = next(i for i, message in enumerate(others) if message["role"] == "user")
    content = f"{system['content']}\n\n{others[place]['content']}"
    return [*others[:place], {"role": "user", "content": content}, *others[place + 1 :]]
