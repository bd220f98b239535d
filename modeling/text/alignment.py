"""Which teacher tokens and which student tokens of one response say the same: aligned groups.

Two alignments. `dtw_groups` is weighted dynamic time warping (CDM, arXiv 2502.11104, steps 2 and 3); `byte_groups` is
the exact alignment by byte positions. Both give every token of either side its group: groups are runs of neighbours, in
order, and cover everything once. All of it is host work on integers.

A batch is laid out flat: the responses of its examples one after another, `R = Σ lengths` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

DIAGONAL, TEACHER_STEP, STUDENT_STEP = 0, 1, 2
UNREACHABLE = 2**62  # above every path's cost, with room to add one more cost in int64


def dtw_groups(
    distance: np.ndarray,
    teacher_index: np.ndarray,
    student_index: np.ndarray,
    teacher_weights: np.ndarray,
    student_weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Align two tokenisations of one response by weighted dynamic time warping (CDM, steps 2 and 3).

    `cost(i, j) = distance(i, j) · teacher_weight(i) · student_weight(j)`. The path of least cost from the
    first pair to the last is cut at every diagonal move; each piece is a group.

    Args:
        distance: integers `[U_T, U_S]`, edit distances between the distinct token texts of the two sides.
        teacher_index: `[M]`, the row of each teacher token in `distance`.
        student_index: `[N]`, the column of each student token.
        teacher_weights, student_weights: integers `[M]`, `[N]`, ≥ 1.

    Returns:
        int32 `[M]` and `[N]`: the group of each token, from 0, non-decreasing, both ending at the last group.

    Raises:
        ValueError: a side has no token.
    """
    if not len(teacher_index) or not len(student_index):
        raise ValueError("dtw_groups needs at least one token on each side")
    return _dtw(
        np.asarray(distance),
        np.asarray(teacher_index, dtype=np.int64),
        np.asarray(student_index, dtype=np.int64),
        np.asarray(teacher_weights, dtype=np.int64),
        np.asarray(student_weights, dtype=np.int64),
    )


@njit(cache=True, nogil=True)
def _dtw(distance, teacher_index, student_index, teacher_weights, student_weights):
    n_teacher, n_student = len(teacher_index), len(student_index)
    moves = np.empty((n_teacher, n_student), dtype=np.uint8)

    # Two rows of D, shifted by one column. D(0, 0) = 0 is the only border that a path may come from.
    above = np.full(n_student + 1, UNREACHABLE, dtype=np.int64)
    here = np.full(n_student + 1, UNREACHABLE, dtype=np.int64)
    above[0] = 0
    for i in range(n_teacher):
        here[0] = UNREACHABLE
        for j in range(n_student):
            best, move = above[j], DIAGONAL
            if above[j + 1] < best:
                best, move = above[j + 1], TEACHER_STEP
            if here[j] < best:
                best, move = here[j], STUDENT_STEP
            cost = np.int64(distance[teacher_index[i], student_index[j]]) * teacher_weights[i] * student_weights[j]
            here[j + 1] = best + cost
            moves[i, j] = move
        above, here = here, above

    # Walk back from the last pair, counting groups from the end.
    teacher_group = np.empty(n_teacher, dtype=np.int32)
    student_group = np.empty(n_student, dtype=np.int32)
    group = 0
    i, j = n_teacher - 1, n_student - 1
    while i >= 0 and j >= 0:
        teacher_group[i] = group
        student_group[j] = group
        move = moves[i, j]
        if move == DIAGONAL:
            group += 1
        if move != STUDENT_STEP:
            i -= 1
        if move != TEACHER_STEP:
            j -= 1
    last = group - 1
    return (last - teacher_group).astype(np.int32), (last - student_group).astype(np.int32)


def byte_groups(teacher_ends: np.ndarray, student_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Align exactly: a group ends wherever both sides end a token at the same byte of the response.

    Args:
        teacher_ends, student_ends: integers `[M]`, `[N]`, non-decreasing, M and N ≥ 1: the byte of the
            response at which each token ends. An end-of-sequence token counts as one byte past the text.

    Returns:
        int32 `[M]` and `[N]`, as `dtw_groups`. What follows the last common end belongs to the last group,
        and without any common end there is a single group.
    """
    common = np.intersect1d(teacher_ends, student_ends)
    last = max(len(common) - 1, 0)

    def groups(ends: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(common, ends), last).astype(np.int32)

    return groups(teacher_ends), groups(student_ends)


def one_to_one_tokens(teacher_group: np.ndarray, student_group: np.ndarray) -> np.ndarray:
    """Bool `[N]`: is the student token alone in its group with a single teacher token?"""
    return ((np.bincount(teacher_group) == 1) & (np.bincount(student_group) == 1))[student_group]


def exact_groups(
    teacher_ends: np.ndarray,
    student_ends: np.ndarray,
    teacher_group: np.ndarray,
    student_group: np.ndarray,
    same_start: bool = True,
) -> np.ndarray:
    """Bool, one a group: does it cover exactly the same bytes on both sides?

    Args:
        teacher_ends, student_ends: as in `byte_groups`.
        teacher_group, student_group: of one response, from `dtw_groups` or `byte_groups`.
        same_start: whether both sides' first tokens begin at the same byte (see `Side.byte_starts`).
    """
    ends_agree = _group_ends(teacher_ends, teacher_group) == _group_ends(student_ends, student_group)
    starts_agree = np.append(same_start, ends_agree[:-1])  # a group starts where the one before it ends
    return starts_agree & ends_agree


def aligned_tokens(
    teacher_ends: np.ndarray,
    student_ends: np.ndarray,
    teacher_group: np.ndarray,
    student_group: np.ndarray,
    same_start: bool = True,
) -> np.ndarray:
    """Bool `[N]`: is the student token in an exact group? Arguments as for `exact_groups`."""
    return exact_groups(teacher_ends, student_ends, teacher_group, student_group, same_start)[student_group]


def _group_ends(ends: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.asarray(ends)[np.cumsum(np.bincount(group)) - 1]


@dataclass(frozen=True)
class GroupedSide:
    """One side's tokens in the G aligned groups of a batch.

    Attributes:
        group: int64 `[R]`, the group of each token, non-decreasing.
        size: int64 `[G]`, the tokens of each group, all ≥ 1.
        host_size: the same in host memory.
    """

    group: Tensor
    size: Tensor
    host_size: np.ndarray

    @property
    def first_row(self) -> Tensor:
        """int64 `[G]`: the row of each group's first token."""
        return self.size.cumsum(0) - self.size

    @property
    def last_row(self) -> Tensor:
        """int64 `[G]`: the row of each group's last token."""
        return self.size.cumsum(0) - 1

    def sums(self, values: Tensor) -> Tensor:
        """`[G]`: the sums of `[R]` values over each group's tokens, differentiable."""
        return values.new_zeros(len(self.host_size)).index_add(0, self.group, values)


@dataclass(frozen=True)
class Groups:
    """The aligned groups of a batch: G of them, over R_T teacher and R_S student tokens.

    Attributes:
        teacher, student: either side's tokens.
        one_to_one: how many student tokens are in groups of one token a side.
        aligned: how many are in groups that cover exactly the same bytes on both sides.
        is_unit: int64 `[G]`, 1 for the groups that do and that hold no special token (the end of sequence; one that the
            text spells), else 0. Where the two sides are compared as probabilities of text, units are what is compared.
    """

    teacher: GroupedSide
    student: GroupedSide
    one_to_one: int
    aligned: int
    is_unit: Tensor
    packed: Tensor  # all five tensors, which are views of it: one transfer

    def __len__(self) -> int:
        return len(self.student.host_size)

    @classmethod
    def of(
        cls,
        ends: Sequence[tuple[np.ndarray, np.ndarray]],
        examples: Sequence[tuple[np.ndarray, np.ndarray]],
        special: tuple[np.ndarray, np.ndarray] | None = None,
        same_start: Sequence[bool] | None = None,
    ) -> Groups:
        """The groups of a batch, numbered on from example to example.

        Args:
            ends: `(teacher_ends, student_ends)` of each response, as in `byte_groups`; there may be none.
            examples: its `(teacher_group, student_group)`, as `dtw_groups` gives them.
            special: bool `[R_T]` and `[R_S]`, which tokens of the batch are special; None for none of them.
            same_start: of each response, as in `exact_groups`; None for all of them.
        """
        same_start = [True] * len(examples) if same_start is None else same_start
        offsets = np.cumsum([0, *(int(student_group[-1]) + 1 for _, student_group in examples)])
        nothing = np.zeros(0, dtype=np.int64)
        groups = [
            np.concatenate([nothing, *(group[side] + offset for group, offset in zip(examples, offsets))])
            for side in (0, 1)
        ]
        arrays = [part for group in groups for part in (group, np.bincount(group, minlength=offsets[-1]))]
        found = (exact_groups(*end, *group, same) for end, group, same in zip(ends, examples, same_start))
        exact = np.concatenate([nothing, *found])
        units = exact.copy()
        for group, is_special in zip(groups, special or ()):
            units[group[is_special]] = 0
        return cls._of_packed(
            torch.from_numpy(np.concatenate([*arrays, units])),
            arrays[1],
            arrays[3],
            sum(int(one_to_one_tokens(*group).sum()) for group in examples),
            int(exact @ arrays[3]),
        )

    @classmethod
    def _of_packed(cls, packed: Tensor, teacher_size: np.ndarray, student_size: np.ndarray, *counts: int) -> Groups:
        n = len(student_size)
        parts = packed.split([int(teacher_size.sum()), n, int(student_size.sum()), n, n])
        sides = GroupedSide(*parts[:2], teacher_size), GroupedSide(*parts[2:4], student_size)
        return cls(*sides, *counts, parts[4], packed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Groups:
        """The same groups with their tensors on a device."""
        return self._moved(self.packed.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Groups:
        """The same groups in memory that a device can copy from while the host works."""
        return self._moved(self.packed.pin_memory())

    def _moved(self, packed: Tensor) -> Groups:
        sizes = self.teacher.host_size, self.student.host_size
        return self._of_packed(packed, *sizes, self.one_to_one, self.aligned)

    def one_to_one_rows(self) -> Tensor:
        """int64 `[R_S]`: the teacher row that a student token shares a 1–1 group with, −1 where its group is larger."""
        return torch.where(self.alone, self.teacher.first_row, -1)[self.student.group]

    @property
    def units(self) -> Tensor:
        """bool `[G]`"""
        return self.is_unit.bool()

    @property
    def alone(self) -> Tensor:
        """bool `[G]`: the groups of one token a side."""
        return (self.teacher.size == 1) & (self.student.size == 1)


def same_index_rows(lengths: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 `[R_S]`: the teacher row at each student token's own index within its response, −1 where there is none.

    Args:
        lengths: `(M, N)` of each example, its teacher and student response tokens; there may be none.
    """
    rows, first = [np.zeros(0, dtype=np.int64)], 0
    for n_teacher, n_student in lengths:
        index = np.arange(n_student)
        rows.append(np.where(index < n_teacher, first + index, -1))
        first += n_teacher
    return np.concatenate(rows)
