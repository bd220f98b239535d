"""The batch that every method reads: both sides' tokens, and all that depends on the text alone.

For B examples of which some have a response, R_S student and R_T teacher response tokens in all:

    batch.student, batch.teacher    Side; no teacher in plain fine-tuning
    batch.rows, batch.n_bytes       of each example with a response: its row in the data file, the bytes of its response
    batch.groups                    aligned groups, with `alignment="byte"` or "dtw"
    batch.token_distances           edit distances of each example, with "entropy_dtw", whose weights wait for logits
    batch.index_rows                int64 [R_S], with "index": the teacher row of the same index in the response, or −1
    batch.prefix_rows               with "prefix": the teacher row of each student token by its bytes, and prefix sets

An example without a response token takes part in the models' forward passes and in nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor

from modeling.errors import InputError
from modeling.text.alignment import Groups, byte_groups, dtw_groups, same_index_rows
from modeling.text.encoder import Encoder
from modeling.text.prefix_rows import PrefixRowFinder, PrefixRows

Alignment = Literal["index", "byte", "dtw", "entropy_dtw", "prefix"]


@dataclass(frozen=True)
class Side:
    """One side's tokens of a batch, padded on the right.

    Attributes:
        input_ids, attention_mask: int64 `[B, L]`.
        predictor_rows: int64 `[R]`, rows of the flattened `[B · L]` logits that *predict* the response tokens (the
            model's output one place earlier), example after example.
        labels: int64 `[R]`, the response tokens themselves, each stop token as the one that responses end with.
        example: int64 `[R]`, to which of the examples with a response each token belongs.
        byte_ends: of each such example int32 `[n]`, the byte of the response at which each token ends; an EOS counts
            as one byte past the text. In host memory.
        byte_starts: of each such example the byte of the response at which its first token begins: 0; less where that
            token stands astride the prompt's end; more where a token in front of it had nothing to predict it.
        keys: of each such example 16 bytes that stand for its tokens (`example_key`).
        stop_ids: the side's stop tokens, that with which responses end first; logits are to be folded by them
            (`text.ends.fold_ends`). One, or none, where there is nothing to fold.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predictor_rows: Tensor
    labels: Tensor
    example: Tensor
    byte_ends: list[np.ndarray]
    byte_starts: list[int]
    keys: list[bytes]
    stop_ids: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each example with a response."""
        return [len(ends) for ends in self.byte_ends]

    @classmethod
    def of(cls, examples: list[dict], prefix: str, pad_id: int, stop_ids: tuple[int, ...] = ()) -> Side:
        """Pads prepared examples.

        Args:
            examples: rows of `prepare_example`.
            prefix: of the side's columns, "" or "teacher_".
            pad_id: what pads; it is masked.
            stop_ids: the stop tokens that are one event.
        """
        ids = [np.asarray(example[f"{prefix}input_ids"], dtype=np.int64) for example in examples]
        ends = [np.asarray(example[f"{prefix}byte_ends"], dtype=np.int32) for example in examples]
        starts = [int(example[f"{prefix}response_start"]) for example in examples]
        shape = (len(ids), max(map(len, ids)))
        input_ids, mask = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(ids):
            input_ids[b, : len(row)], mask[b, : len(row)] = row, 1
        answered = [b for b, end in enumerate(ends) if len(end)]
        places = [starts[b] + np.arange(len(ends[b])) for b in answered]
        nothing = np.zeros(0, dtype=np.int64)
        arrays = (
            np.concatenate([nothing, *(b * shape[1] + place - 1 for b, place in zip(answered, places))]),
            np.concatenate([nothing, *(ids[b][place] for b, place in zip(answered, places))]),
            np.repeat(np.arange(len(answered)), [len(place) for place in places]),
        )
        if stop_ids:
            arrays[1][np.isin(arrays[1], stop_ids)] = stop_ids[0]
        return cls(
            *map(torch.from_numpy, (input_ids, mask, *arrays)),
            byte_ends=[ends[b] for b in answered],
            byte_starts=[int(examples[b][f"{prefix}byte_start"]) for b in answered],
            keys=[example_key(ids[b], starts[b]) for b in answered],
            stop_ids=stop_ids,
        )

    def map(self, function) -> Side:
        """The side with `function` applied to its tensors."""
        return replace(self, **{name: function(value) for name, value in vars(self).items() if torch.is_tensor(value)})


@dataclass(frozen=True)
class TokenDistances:
    """Edit distances between one response's tokens, M of the teacher and N of the student; tokens repeat.

    Attributes:
        table: uint16 `[distinct teacher tokens, distinct student tokens]`, Levenshtein distances of the texts, spaces
            left out; 0 between two EOS.
        teacher_index, student_index: int64 `[M]`, `[N]`, each token's row and column.
    """

    table: np.ndarray
    teacher_index: np.ndarray
    student_index: np.ndarray


@dataclass(frozen=True)
class Batch:
    """The module's docstring says what is in it."""

    student: Side
    teacher: Side | None
    rows: list[int]
    n_bytes: list[int]
    groups: Groups | None = None
    token_distances: list[TokenDistances] | None = None
    index_rows: Tensor | None = None
    prefix_rows: PrefixRows | None = None

    @property
    def same_start(self) -> list[bool]:
        """Of each example with a response: do both sides' first tokens begin at the same byte?"""
        return [t == s for t, s in zip(self.teacher.byte_starts, self.student.byte_starts)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on a device."""
        groups = self.groups and self.groups.to(device, non_blocking)
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking), groups)

    def pin_memory(self) -> Batch:
        """The batch in memory that a device can copy from while the host works (a data loader calls it)."""
        return self._moved(Tensor.pin_memory, self.groups and self.groups.pin_memory())

    def _moved(self, function, groups: Groups | None) -> Batch:
        return replace(
            self,
            student=self.student.map(function),
            teacher=self.teacher and self.teacher.map(function),
            groups=groups,
            index_rows=None if self.index_rows is None else function(self.index_rows),
            prefix_rows=self.prefix_rows and self.prefix_rows.map(function),
        )


class ResponseCollator:
    """Makes batches of prepared examples, in the data loader's workers where there are any.

    Args:
        student, teacher: their tokenizers.
        alignment: what the method asks for; see the module's docstring. None of it without a teacher.
    """

    def __init__(self, student: Encoder, teacher: Encoder | None = None, alignment: Alignment | None = None):
        self.student, self.teacher, self.alignment = student, teacher, alignment
        self.find_prefix_rows = PrefixRowFinder(student, teacher) if alignment == "prefix" and teacher else None

    def __call__(self, examples: list[dict]) -> Batch:
        # Ends are compared where there are two sides: cross-entropy alone takes each stop token for itself.
        student = Side.of(examples, "", self.student.pad_id, self.student.stop_ids if self.teacher else ())
        teacher = self.teacher and Side.of(examples, "teacher_", self.teacher.pad_id, self.teacher.stop_ids)
        answered = [example for example in examples if len(example["byte_ends"])]
        batch = Batch(
            student,
            teacher,
            rows=[int(example["row"]) for example in answered],
            n_bytes=[
                int(ends[-1]) - int(example["input_ids"][-1] == self.student.eos_id)
                for example, ends in zip(answered, student.byte_ends)
            ],
        )
        if self.alignment is None or teacher is None:
            return batch
        if self.alignment == "index":
            pairs = list(zip(teacher.lengths, student.lengths))
            return replace(batch, index_rows=torch.from_numpy(same_index_rows(pairs)))
        if self.alignment == "prefix":
            return replace(batch, prefix_rows=self.find_prefix_rows(student, teacher))
        ends = list(zip(teacher.byte_ends, student.byte_ends))
        if self.alignment == "byte":
            special = tuple(
                encoder.forms.is_special[labels] | (labels == encoder.eos_id)  # a stop token need not be flagged
                for encoder, labels in ((self.teacher, teacher.labels.numpy()), (self.student, student.labels.numpy()))
            )
            examples = [byte_groups(*pair) for pair in ends]
            return replace(batch, groups=Groups.of(ends, examples, special, batch.same_start))
        distances = self.token_distances(batch)
        if self.alignment == "entropy_dtw":
            return replace(batch, token_distances=distances)
        examples = [equal_weight_groups(d) for d in distances]
        return replace(batch, groups=Groups.of(ends, examples, same_start=batch.same_start))

    def token_distances(self, batch: Batch) -> list[TokenDistances]:
        """Of each example with a response (CDM, arXiv 2502.11104, section 3.1)."""
        ids = [side.labels.numpy() for side in (batch.teacher, batch.student)]
        parts = [
            np.split(labels, np.cumsum(side.lengths)[:-1]) for labels, side in zip(ids, (batch.teacher, batch.student))
        ]
        found = []
        for teacher_ids, student_ids in zip(*parts) if batch.rows else ():
            (teacher, teacher_index), (student, student_index) = (
                np.unique(part, return_inverse=True) for part in (teacher_ids, student_ids)
            )
            table = token_distances(self.teacher, teacher, self.student, student)
            found.append(TokenDistances(table, teacher_index, student_index))
        return found


def equal_weight_groups(distances: TokenDistances) -> tuple[np.ndarray, np.ndarray]:
    """`(teacher_group, student_group)` of a response by dynamic time warping, every position weighing the same."""
    d = distances
    return dtw_groups(
        d.table, d.teacher_index, d.student_index, np.ones_like(d.teacher_index), np.ones_like(d.student_index)
    )


def example_key(input_ids: np.ndarray, response_start: int) -> bytes:
    """16 bytes that stand for an example's tokens, and for where its response begins in them."""
    ids = np.ascontiguousarray(input_ids, dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16, salt=int(response_start).to_bytes(8, "little")).digest()


def token_distances(teacher: Encoder, teacher_ids: np.ndarray, student: Encoder, student_ids: np.ndarray) -> np.ndarray:
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


def require_same_tokens(batch: Batch) -> None:
    """Raise InputError, naming the row, unless the tokens of every response end at the same bytes on both sides."""
    for row, teacher, student in zip(batch.rows, batch.teacher.byte_ends, batch.student.byte_ends):
        if not np.array_equal(teacher, student):
            raise InputError(
                f"Row {row} of the data: the student has {len(student)} response tokens and the teacher "
                f"{len(teacher)}, and they do not end at the same places, though the vocabularies are the same. Leave "
                "the row out, or give both models the same tokenizer files."
            )
