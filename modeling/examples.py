"""From rows of a training file to the batches that the trainers read.

A row is `(prefix, text)`: the prompt, and the response to learn. Each side tokenises `prefix + text` with its own
tokenizer; the teacher never sees student ids. All that depends on the text alone is worked out here, in dataset
preparation or in the collator (which runs in the data loader's workers), so that a training step only does what
needs logits.

The batch contract (`ResponseCollator`), for B examples with R response tokens in all:

    input_ids, attention_mask   int64 [B, L]  the student's, padded on the right
    labels                      int64 [B, L]  the response's ids at their own place, -100 elsewhere
    positions                   int64 [R]     rows of the flattened [B * L] logits that *predict* the response tokens
                                              (the model's output one place earlier), example after example
    example                     int64 [R]     which example of the batch each response token belongs to
    responses                   list[Response], B of them, kept on the host
    teacher_input_ids, teacher_attention_mask, teacher_labels, teacher_positions, teacher_example
                                the same for the teacher, where there is one
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from get_vocab_mapper.token_forms import TokenForms, token_forms
from modeling.errors import InputError, user_input
from modeling.json_array import elements, ends_too_early

IGNORED = -100  # the label of a token that no loss reads, as everywhere in transformers
BEFORE_SPACE = re.compile(r"\S*")


# ------------------------------------------------------------------------------------------------ rows of a file


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


COLUMNS_NAMED = 8  # how many columns a message names


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


# ------------------------------------------------------------------------------------------------- JSON and its faults

# What a file begins with that is something else: (bytes, what it is, what to do).
OTHER_FORMATS = (
    (b"PAR1", "a Parquet file", "datasets.Dataset.from_parquet(FILE).to_json(NEW_FILE) writes it as JSON lines"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
)
GZIP = b"\x1f\x8b"


def require_json_file(path: str | Path) -> None:
    """Raises InputError where the file's first bytes tell already that it cannot be read: a quick look, for a start."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the file in it.")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path; a relative one starts at {Path.cwd()}.")
    with user_input(), path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise InputError(f"{path}: the file is empty. Was it written or copied to its end?")
    for beginning, name, remedy in OTHER_FORMATS:
        if head.startswith(beginning):
            raise InputError(f"{path} is {name}, and not JSON: {remedy}.")


def read_json(path: str | Path) -> Iterator[tuple[int, object]]:
    """`(number, value)` of a JSON array's values, or of a file with one a line. Either may be compressed with gzip.

    Numbers count from 1: the place in the array, or the line; blank lines are passed over. The file is never held in
    memory as a whole. Raises InputError naming the file, the line, and what to do.
    """
    require_json_file(path)
    path = Path(path)
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
            # By content and not by name: many files that end in .json hold one object a line.
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            yield from _values_of_array(file, path) if first == "[" else _values_of_lines(file, path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error}). Copy it again.") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP or path.suffix == ".gz"
    return gzip.open(path) if compressed else path.open("rb")


def _values_of_array(file: TextIO, path: Path) -> Iterator[tuple[int, object]]:
    try:
        yield from enumerate(elements(file), 1)
    except json.JSONDecodeError as error:
        remedy = "The file ends too early: copy it again" if ends_too_early(error) else "Repair the array there"
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). {remedy}."
        ) from None
    except UnicodeDecodeError:
        raise  # `read_json` says where
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise InputError(f"{path}: JSON that cannot be read ({error}).") from None


def _values_of_lines(file: TextIO, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                remedy = "Repair or delete the line"
                if line.rstrip().endswith("},"):
                    remedy = "Leave out the comma behind the object"
                raise InputError(
                    f"{path}, line {number}: not valid JSON ({reason}). {remedy}: the file must be one JSON array, or "
                    "hold one JSON object a line."
                ) from None


def _not_utf8(path: Path) -> InputError:
    """Says where. (What the decoder names counts from the last block that it was given.)"""
    position, number = 0, 1
    with _open(path) as file:
        encoding = "UTF-16" if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "CP1252"
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position += error.start
                break
            position, number = position + len(line), number + 1
    return InputError(
        f"{path}, byte {position}: not UTF-8 (in line {number}). Convert the file, for example with "
        f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE."
    )


# ------------------------------------------------------------------------------------------- tokenising one side


@dataclass(frozen=True)
class Encoded:
    """One side's tokens of one example. The response is `input_ids[response_start:]`."""

    input_ids: np.ndarray  # int64 [n]
    response_start: int  # at least 1: a token with nothing before it cannot be predicted
    ends: np.ndarray  # int32 [n - response_start]: the byte of the response at which each token ends


class Encoder:
    """Tokenises `prefix + text` for one side, and says where every response token ends.

    Raises ValueError where the tokenizer has no EOS, or is one whose tokens cannot be read (see `token_forms`).
    """

    def __init__(self, tokenizer, forms: TokenForms | None = None):
        self.tokenizer = tokenizer
        self.forms = forms or token_forms(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} declares no EOS token, which every response ends with. "
                "Set eos_token in its tokenizer_config.json."
            )
        self.eos_id = int(tokenizer.eos_token_id)

    @cached_property
    def pad_id(self) -> int:
        """A tokenizer without a pad token pads with EOS; padding is masked either way."""
        pad_id = self.tokenizer.pad_token_id
        return self.eos_id if pad_id is None else int(pad_id)

    @cached_property
    def _dropped_bytes(self) -> bytes:
        """The bytes that no token holds: in SmolLM2, some control characters and the first bytes of rare planes."""
        held = set(b"".join(form for form, special in zip(self.forms.forms, self.forms.is_special) if not special))
        return bytes(sorted(set(range(256)) - held))

    def encode(self, prefix: str, text: str, eos: bool = True) -> Encoded:
        """Tokens of `prefix + text`, with what the tokenizer adds in front, and EOS behind it unless `eos` is off.

        A token astride the border of prefix and text belongs to the response. EOS counts as one byte past the text.
        """
        whole = prefix + text
        encoding = self.tokenizer(
            whole,
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
        return Encoded(ids, start, ends[start - first :].astype(np.int32))

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
        "run_clm_distill_CDM.py, run_clm_MinED.py and run_clm_uld.py."
    )


def require_same_tokens(responses: Sequence[Response]) -> None:
    """Raise InputError, naming the row, unless the tokens of every response end at the same bytes on both sides."""
    for response in responses:
        if not np.array_equal(response.ends, response.teacher_ends):
            raise InputError(
                f"Row {response.row} of the data: the student has {len(response.ends)} response tokens and the teacher "
                f"{len(response.teacher_ends)}, and they do not end at the same places, though the vocabularies are "
                "the same. Leave the row out, or give both models the same tokenizer files."
            )


def encode_pair(encoders: Sequence[Encoder], prefix: str, text: str, block_size: int) -> list[Encoded] | None:
    """The example as each side sees it, in at most `block_size` tokens on every side.

    Where one is longer, the text is cut for all at one character: the longest beginning that fits every side, without
    EOS. None where no response token is left on some side.
    """
    if not text:
        return None
    encoded = [encoder.encode(prefix, text) for encoder in encoders]
    if any(len(e.input_ids) > block_size for e in encoded):
        encoded = _longest_that_fits(encoders, prefix, text, block_size, encoded)
    if encoded is None or any(len(e.input_ids) <= e.response_start for e in encoded):
        return None
    return encoded


# A cut text seldom has fewer tokens than it has up to the cut in the whole text. So no cut is tried further behind the
# last token that fits than this many characters, and none where the prefix alone is this many tokens too long.
REACH, SLACK = 32, 8


def _longest_that_fits(encoders, prefix, text, block_size, encoded) -> list[Encoded] | None:
    cut = len(text) + 1  # of the example as it is, with EOS behind the text
    while too_long := [e for e in encoded if len(e.input_ids) > block_size]:
        if any(e.response_start >= block_size + SLACK for e in too_long):
            return None
        cut = min(cut - 1, *(_characters_that_fit(e, text, block_size) + REACH for e in too_long))
        if cut <= 0:
            return None
        encoded = [encoder.encode(prefix, text[:cut], eos=False) for encoder in encoders]
    return encoded


def _characters_that_fit(encoded: Encoded, text: str, block_size: int) -> int:
    last = block_size - encoded.response_start - 1
    n_bytes = int(encoded.ends[last]) if last >= 0 else 0
    return len(text.encode("utf-8", "surrogatepass")[:n_bytes].decode("utf-8", "ignore"))


def prepare_example(row: dict, encoders: Sequence[Encoder], block_size: int) -> dict:
    """One row of the tokenised dataset: the student's columns, and `teacher_…` ones with a second encoder.

    `fault` says why an example cannot be used (by itself, or as no response token fits); it then has empty `ends`.
    """
    fault = row.get("fault", "")
    encoded = None if fault else encode_pair(encoders, row["prefix"], row["text"], block_size)
    if encoded is None and not fault:
        fault = f"the prefix fills --block_size {block_size}: give more, or a shorter prefix"
    columns: dict = {"row": row["row"], "fault": fault}
    columns["cut"] = bool(encoded) and encoded[0].input_ids[-1] != encoders[0].eos_id
    for i, side in enumerate(("", "teacher_")[: len(encoders)]):
        e = encoded[i] if encoded else Encoded(np.zeros(0, np.int64), 0, np.zeros(0, np.int32))
        columns[f"{side}input_ids"] = e.input_ids
        columns[f"{side}response_start"] = e.response_start
        columns[f"{side}ends"] = e.ends
    return columns


# ---------------------------------------------------------------------------------------------------- the collator


@dataclass
class Response:
    """What the host keeps of one example's response: N student tokens and M teacher tokens of the same text.

    `distance[teacher_index[i], student_index[j]]` is the Levenshtein distance between the texts of teacher token i
    and student token j, spaces left out; 0 where both are EOS. (Tokens repeat, so the table is over distinct ones.)
    """

    row: int  # in the data file, from 1
    n_bytes: int  # of the response text that the tokens cover
    ends: np.ndarray  # int32 [N]: the byte at which each token ends; EOS counts as one byte past the text
    teacher_ends: np.ndarray | None = None  # int32 [M]
    distance: np.ndarray | None = None  # uint16 [distinct teacher tokens, distinct student tokens]
    teacher_index: np.ndarray | None = None  # int64 [M]
    student_index: np.ndarray | None = None  # int64 [N]
    key: bytes | None = None  # `example_key` of the student's tokens
    teacher_key: bytes | None = None


class ResponseCollator:
    """Pads a list of prepared examples into the batch of the module docstring.

    With `edit_distances`, each `Response` also gets the table that dynamic time warping reads. An example whose
    `input_ids` are all there but whose `ends` are empty takes part with no response token, and adds nothing.
    """

    def __init__(self, student: Encoder, teacher: Encoder | None = None, edit_distances: bool = False):
        self.student = student
        self.teacher = teacher
        self.edit_distances = edit_distances and teacher is not None

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.pad(examples, "", self.student.pad_id)
        if self.teacher is not None:
            batch |= self.pad(examples, "teacher_", self.teacher.pad_id)
        batch["responses"] = [self._response(example) for example in examples]
        return batch

    @staticmethod
    def pad(examples: list[dict], side: str, pad_id: int) -> dict[str, torch.Tensor]:
        """One side's tensors of the batch, named with `side` ("" or "teacher_") in front."""
        ids = [np.asarray(example[f"{side}input_ids"], dtype=np.int64) for example in examples]
        shape = (len(ids), max(map(len, ids)))
        input_ids, mask = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED)
        positions, owner = [], []
        for b, (row, example) in enumerate(zip(ids, examples)):
            start, n = example[f"{side}response_start"], len(example[f"{side}ends"])
            input_ids[b, : len(row)], mask[b, : len(row)] = row, 1
            labels[b, start : start + n] = row[start : start + n]
            positions.append(b * shape[1] + start - 1 + np.arange(n))
            owner.append(np.full(n, b))
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "positions": np.concatenate(positions),
            "example": np.concatenate(owner),
        }
        return {f"{side}{name}": torch.from_numpy(array) for name, array in arrays.items()}

    def _response(self, example: dict) -> Response:
        ends = np.asarray(example["ends"], dtype=np.int32)
        has_eos = bool(len(ends)) and example["input_ids"][-1] == self.student.eos_id
        response = Response(example["row"], int(ends[-1]) - has_eos if len(ends) else 0, ends)
        response.key = example_key(example["input_ids"], example["response_start"])
        if self.teacher is not None:
            response.teacher_ends = np.asarray(example["teacher_ends"], dtype=np.int32)
            response.teacher_key = example_key(example["teacher_input_ids"], example["teacher_response_start"])
        if self.edit_distances:
            student_ids, response.student_index = np.unique(_response_ids(example, ""), return_inverse=True)
            teacher_ids, response.teacher_index = np.unique(_response_ids(example, "teacher_"), return_inverse=True)
            response.distance = token_distances(self.teacher, teacher_ids, self.student, student_ids)
        return response


def example_key(input_ids: np.ndarray, response_start: int) -> bytes:
    """16 bytes that stand for an example's tokens, and for where its response begins in them."""
    ids = np.ascontiguousarray(input_ids, dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16, salt=int(response_start).to_bytes(8, "little")).digest()


def _response_ids(example: dict, side: str) -> np.ndarray:
    start, n = example[f"{side}response_start"], len(example[f"{side}ends"])
    return np.asarray(example[f"{side}input_ids"], dtype=np.int64)[start : start + n]


def token_distances(
    teacher: Encoder, teacher_ids: np.ndarray, student: Encoder, student_ids: np.ndarray
) -> np.ndarray:
    """uint16 [len(teacher_ids), len(student_ids)]: Levenshtein distances of the tokens' texts, spaces left out.

    Two EOS tokens are at distance 0 whatever their texts (CDM, arXiv 2502.11104, section 3.1).
    """
    table = cdist(
        [teacher.forms.spaceless[i] for i in teacher_ids],
        [student.forms.spaceless[i] for i in student_ids],
        scorer=Levenshtein.distance,
        dtype=np.uint16,
    )
    table[np.ix_(teacher_ids == teacher.eos_id, student_ids == student.eos_id)] = 0
    return table
