"""One side's tokens of an example: `prefix + text` tokenised, and where in the response each token ends.

Each side tokenises the text with its own tokenizer; the teacher never sees student ids.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from get_vocab_mapper.token_forms import TokenForms, token_forms
from modeling.errors import InputError
from modeling.text.chat import ChatTemplate

BEFORE_SPACE = re.compile(r"\S*")


@dataclass(frozen=True)
class Encoded:
    """One side's tokens of one example. The response is `input_ids[response_start:]`."""

    input_ids: np.ndarray  # int64 [n]
    response_start: int  # at least 1: a token with nothing before it cannot be predicted
    byte_ends: np.ndarray  # int32 [n - response_start]: the byte of the response at which each token ends
    byte_start: int = 0  # the one at which the first of them begins: see `Side.byte_starts`


class Encoder:
    """Tokenises `prefix + text` for one side, and says where every response token ends.

    Args:
        tokenizer, forms: the tokenizer, and its `token_forms` where they are there.
        chat: the template that renders the prompts of chat rows.
        stop_ids: the side's stop tokens, the one that its responses end with first (see `text.ends`); by default EOS.

    Raises ValueError where the tokenizer has no EOS, or is one whose tokens cannot be read (see `token_forms`).
    """

    def __init__(
        self,
        tokenizer,
        forms: TokenForms | None = None,
        chat: ChatTemplate | None = None,
        stop_ids: Sequence[int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.forms = forms or token_forms(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} declares no EOS token, which every response ends with. "
                "Set eos_token in its tokenizer_config.json."
            )
        self.chat = chat
        self.stop_ids = tuple(stop_ids or (int(tokenizer.eos_token_id),))

    @property
    def eos_id(self) -> int:
        """The token that a response ends with."""
        return self.stop_ids[0]

    def with_stop_ids(self, stop_ids: Sequence[int]) -> Encoder:
        other = copy.copy(self)
        other.stop_ids = tuple(stop_ids)
        return other

    def prefix(self, row: dict) -> str:
        """What stands in front of a row's response on this side. Raises ValueError where its template refuses it."""
        return self.chat.prompt(json.loads(row["messages"])) if row.get("messages") else row["prefix"]

    @cached_property
    def pad_id(self) -> int:
        """A tokenizer without a pad token pads with EOS; padding is masked either way."""
        pad_id = self.tokenizer.pad_token_id
        return self.eos_id if pad_id is None else int(pad_id)

    @cached_property
    def _bos(self) -> str:
        return put_in_front(self.tokenizer)

    @cached_property
    def _dropped_bytes(self) -> bytes:
        """The bytes that no token holds: in SmolLM2, some control characters and the first bytes of rare planes."""
        held = set(b"".join(form for form, special in zip(self.forms.forms, self.forms.is_special) if not special))
        return bytes(sorted(set(range(256)) - held))

    def encode(self, prefix: str, text: str, eos: bool = True) -> Encoded:
        """Tokens of `prefix + text`, with what the tokenizer adds in front, and EOS behind it unless `eos` is off.

        A token astride the border of prefix and text belongs to the response. EOS counts as one byte past the text.
        What the tokenizer adds (BOS) is not added to a prefix that begins with it.
        """
        whole = prefix + text
        encoding = self.tokenizer(
            whole,
            add_special_tokens=not (self._bos and prefix.startswith(self._bos)),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        # What the tokenizer's template adds: kept in front (BOS), dropped behind (EOS is put there below). Around a
        # text that the tokenizer's normaliser drops as a whole, all is dropped: it has no front or behind.
        content = np.flatnonzero(np.asarray(encoding["special_tokens_mask"]) == 0)
        first, last = (content[0], content[-1] + 1) if len(content) else (0, 0)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[first:last]
        ids = ids[:last]

        border = len(prefix.encode("utf-8", "surrogatepass"))
        ends = self._byte_ends(ids[first:], offsets, whole) - border
        start = int(first + np.searchsorted(ends, 0, side="right"))
        if eos:
            end_of_text = len(text.encode("utf-8", "surrogatepass"))
            if len(ids) == start or ids[-1] != self.eos_id:
                ids = np.append(ids, self.eos_id)
                ends = np.append(ends, end_of_text)
            ends[-1] = end_of_text + 1
        start = max(start, 1)
        place = start - first  # 0 where the first token of the text is of the response
        ends, before = ends[place:], ends[place - 1] if 0 < place <= len(ends) else -border
        if before < 0 and len(ends):
            # Not all that lies between belongs to the token: a normaliser may have dropped it.
            before = min(0, max(before, ends[0] - self.forms.lengths[ids[start]]))
        return Encoded(ids, start, ends.astype(np.int32), int(before))

    def _byte_ends(self, ids: np.ndarray, offsets: np.ndarray, whole: str) -> np.ndarray:
        """int64 [len(ids)]: how many bytes of `whole` the tokens up to and including each one cover.

        Token forms give this exactly wherever, joined, they are the text (or the text behind a SentencePiece dummy
        space). A byte that no token holds is dropped by a byte-level tokenizer, whose offsets are wrong from there on:
        it belongs to the token in front. Where the tokenizer's normaliser has changed the text, the tokenizer's
        character offsets anchor the forms. One case is left inexact: neighbouring characters that the normaliser has
        composed (decomposed Hangul under NFC) and a Unigram model writes with byte tokens, all of which it reports with
        the offsets of the whole run.
        """
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        text = whole.encode("utf-8", "surrogatepass")
        ends = np.cumsum(self.forms.lengths[ids], dtype=np.int64)
        joined = b"".join([self.forms.forms[i] for i in ids])
        for dropped in (b"", self._dropped_bytes):
            kept = text.translate(None, dropped)
            if joined in (kept, b" " + kept):
                held = np.flatnonzero(~np.isin(bytearray(text), bytearray(dropped)))
                return np.append(held, len(text))[ends - (len(joined) - len(kept))]

        byte_at = np.zeros(len(whole) + 1, dtype=np.int64)
        np.cumsum([len(c.encode("utf-8", "surrogatepass")) for c in whole], out=byte_at[1:])
        starts, stops = offsets[:, 0], offsets[:, 1].copy()
        # Between two tokens may lie characters that the normaliser dropped or merged: a combining mark belongs to the
        # token in front of it, white space and all behind it to the next one (XLNet makes `"` of the `''` in "a ''b").
        following = np.append(starts[1:], len(whole))
        for i in np.flatnonzero(following > stops):
            stops[i] = BEFORE_SPACE.match(whole, stops[i], following[i]).end()
        # A token that stops inside a character (the next one starts before its end) is placed by its own bytes,
        # counted from the last token that stopped between two characters, and within that character.
        between = following >= stops
        anchor = np.maximum.accumulate(np.where(between, np.arange(len(ids)), -1))
        before = np.concatenate([[-1], anchor[:-1]])  # the last anchored token before each one
        inside = np.where(before >= 0, byte_at[stops[before]] - ends[before], byte_at[starts[0]]) + ends
        placed = np.where(between, byte_at[stops], np.clip(inside, byte_at[starts], byte_at[stops]))
        return np.maximum.accumulate(placed)


def put_in_front(tokenizer) -> str:
    """What a tokenizer adds in front of a text (BOS), as text; "" where it adds nothing."""
    encoding = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    n_added = next((place for place, special in enumerate(encoding["special_tokens_mask"]) if not special), 0)
    return "".join(tokenizer.convert_ids_to_tokens(encoding["input_ids"][:n_added]))


def require_same_tokenizer(student: Encoder, teacher: Encoder) -> None:
    """Raise InputError unless every id is the same token on both sides.

    What the tokens are decides, not the tokenizers' names or classes. Which tokens are flagged special, which one is
    declared EOS, and how far each model's head is padded may differ.
    """
    sides = (student.forms, teacher.forms)
    if sides[0].forms == sides[1].forms:
        return
    lengths = [len(forms) for forms in sides]
    first = next((i for i, (a, b) in enumerate(zip(*(f.forms for f in sides))) if a != b), min(lengths))
    tokens = [repr(forms.texts[first]) if first < len(forms) else "no token" for forms in sides]
    raise InputError(
        f"The student's tokenizer {sides[0].name!r} ({lengths[0]} tokens) and the teacher's {sides[1].name!r} "
        f"({lengths[1]} tokens) are not the same: id {first} is {tokens[0]} in the student's and {tokens[1]} in the "
        "teacher's. Comparing them token by token needs one tokenizer. For a pair like this one there are "
        "run_clm_distill_CDM.py, run_clm_MinED.py, run_clm_uld.py and others (python script_train/methods.py: any)."
    )


def encode_pair(
    encoders: Sequence[Encoder], prefix: str | Sequence[str], text: str, block_size: int
) -> list[Encoded] | None:
    """The example as each side sees it, in at most `block_size` tokens on every side.

    The prefix is one for all, or each side's own. Where one side is longer, the text is cut for all at one character:
    the longest beginning that fits every side, without EOS. None where no response token is left on some side.
    """
    if not text:
        return None
    prefixes = [prefix] * len(encoders) if isinstance(prefix, str) else prefix
    encoded = [encoder.encode(prefix, text) for encoder, prefix in zip(encoders, prefixes)]
    if any(len(e.input_ids) > block_size for e in encoded):
        encoded = _longest_that_fits(encoders, prefixes, text, block_size, encoded)
    if encoded is None or any(len(e.input_ids) <= e.response_start for e in encoded):
        return None
    return encoded


# A cut text seldom has fewer tokens than it has up to the cut in the whole text. So no cut is tried further behind the
# last token that fits than this many characters, and none where the prefix alone is this many tokens too long.
REACH, SLACK = 32, 8


def _longest_that_fits(encoders, prefixes, text, block_size, encoded) -> list[Encoded] | None:
    cut = len(text) + 1  # of the example as it is, with EOS behind the text
    while too_long := [e for e in encoded if len(e.input_ids) > block_size]:
        if any(e.response_start >= block_size + SLACK for e in too_long):
            return None
        cut = min(cut - 1, *(_characters_that_fit(e, text, block_size) + REACH for e in too_long))
        if cut <= 0:
            return None
        encoded = [encoder.encode(prefix, text[:cut], eos=False) for encoder, prefix in zip(encoders, prefixes)]
    return encoded


def _characters_that_fit(encoded: Encoded, text: str, block_size: int) -> int:
    last = block_size - encoded.response_start - 1
    n_bytes = int(encoded.byte_ends[last]) if last >= 0 else 0
    return len(text.encode("utf-8", "surrogatepass")[:n_bytes].decode("utf-8", "ignore"))


def prepare_example(row: dict, encoders: Sequence[Encoder], block_size: int) -> dict:
    """One row of the tokenised dataset: the student's columns, and `teacher_…` ones with a second encoder.

    `fault` says why an example cannot be used (by itself, or as no response token fits); it then has empty `byte_ends`.
    """
    fault, encoded = row.get("fault", ""), None
    if not fault:
        try:
            prefixes = [encoder.prefix(row) for encoder in encoders]
        except ValueError as refused:
            fault = str(refused)
        else:
            encoded = encode_pair(encoders, prefixes, row["text"], block_size)
    if encoded is None and not fault:
        fault = f"the prefix fills --block_size {block_size}: give more, or a shorter prefix"
    columns: dict = {"row": row["row"], "fault": fault}
    columns["cut"] = bool(encoded) and encoded[0].input_ids[-1] != encoders[0].eos_id
    for i, side in enumerate(("", "teacher_")[: len(encoders)]):
        e = encoded[i] if encoded else Encoded(np.zeros(0, np.int64), 0, np.zeros(0, np.int32))
        columns[f"{side}input_ids"] = e.input_ids
        columns[f"{side}response_start"] = e.response_start
        columns[f"{side}byte_ends"] = e.byte_ends
        columns[f"{side}byte_start"] = e.byte_start
    return columns
