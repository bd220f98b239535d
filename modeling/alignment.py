"""Which teacher tokens and which student tokens of one response say the same: aligned groups.

Two alignments. `dtw_groups` is entropy-weighted dynamic time warping (CDM, arXiv 2502.11104, steps 1–3);
`byte_groups` is the exact alignment by byte positions. Both give every token of either side its group: groups
are runs of neighbours, in order, and cover everything once.

A batch is laid out flat: the responses of its examples one after another, `R = Σ lengths` rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from modeling.divergences import Logits, chunks_with_buffers, float_dtype

DIAGONAL, TEACHER_STEP, STUDENT_STEP = 0, 1, 2
LEAST_LOGIT = -1e3  # below the largest; e to its power is 0 even in float64, and 0 times it is not NaN
UNREACHABLE = 2**62  # above every path's cost, with room to add one more cost in int64


def entropy(logits: Logits) -> Tensor:
    """Entropy of softmax(logits) of every row, without a float32 copy of all logits (CDM, step 1).

    Args:
        logits: `[R, V]`, any floating dtype, any row stride. A logit of −∞ is a probability of 0.

    Returns:
        float32 `[R]`, in nats.
    """
    return entropy_and_logsumexp(logits)[0]


@torch.no_grad()
def entropy_and_logsumexp(logits: Logits) -> tuple[Tensor, Tensor]:
    """`entropy(logits)` and, of the same pass, ln Σ exp(logits) of every row, both float32 `[R]`."""
    entropy, logsumexp = logits.new_empty(2, len(logits), dtype=float_dtype(logits))
    for at, (z, exp) in chunks_with_buffers(logits, 2):
        # H = ln Σ eᶻ − Σ z eᶻ / Σ eᶻ, with z shifted to a maximum of 0: fewer passes than −Σ p ln p.
        z.copy_(logits[at])
        largest = z.amax(-1, keepdim=True)
        z.sub_(largest).clamp_(min=LEAST_LOGIT)
        total = torch.exp(z, out=exp).sum(-1)
        log_total = total.log()
        entropy[at] = log_total - torch.linalg.vecdot(exp, z) / total
        logsumexp[at] = log_total + largest.squeeze(1)
    return entropy, logsumexp


@torch.no_grad()
def entropy_weights(entropy: Tensor, lengths: Sequence[int]) -> Tensor:
    """⌊3·σ(4h − 2) + 3⌋, h being the entropy scaled to [0, 1] within its example (CDM, step 1).

    Uncertain positions cost more to misalign. An example whose entropies are all equal has h = 0.

    Args:
        entropy: `[R]`, the examples one after another.
        lengths: number of positions of each example, each ≥ 1, summing to R; there may be no example.

    Returns:
        int64 `[R]`, each 3, 4 or 5, on the entropy's device, without waiting for it.
    """

    def example_weights(values: Tensor) -> Tensor:
        spread = values.amax() - values.amin()
        h = torch.where(spread > 0, (values - values.amin()) / spread, 0.0)
        return (3 * torch.sigmoid(4 * h - 2) + 3).floor().long()

    if not lengths:
        return entropy.new_empty(0, dtype=torch.int64)
    return torch.cat([example_weights(values) for values in entropy.split(list(lengths))])


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
        teacher_weights, student_weights: integers `[M]`, `[N]`, from `entropy_weights`, or ones.

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
            cost = (
                np.int64(distance[teacher_index[i], student_index[j]])
                * teacher_weights[i]
                * student_weights[j]
            )
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


def group_sizes(group: np.ndarray) -> np.ndarray:
    """Number of tokens in each group, int64 `[G]`, of one side's `[tokens]` group numbers."""
    return np.bincount(group)


def one_to_one_tokens(teacher_group: np.ndarray, student_group: np.ndarray) -> np.ndarray:
    """Bool `[N]`: is the student token alone in its group with a single teacher token?"""
    return ((group_sizes(teacher_group) == 1) & (group_sizes(student_group) == 1))[student_group]


def aligned_tokens(
    teacher_ends: np.ndarray, student_ends: np.ndarray, teacher_group: np.ndarray, student_group: np.ndarray
) -> np.ndarray:
    """Bool `[N]`: does the student token's group cover exactly the same bytes on both sides?

    Args:
        teacher_ends, student_ends: as in `byte_groups`.
        teacher_group, student_group: of one response, from `dtw_groups` or `byte_groups`.
    """
    ends_agree = _group_ends(teacher_ends, teacher_group) == _group_ends(student_ends, student_group)
    starts_agree = np.append(True, ends_agree[:-1])  # a group starts where the one before it ends
    return (starts_agree & ends_agree)[student_group]


def _group_ends(ends: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.asarray(ends)[np.cumsum(group_sizes(group)) - 1]


@dataclass(frozen=True)
class Groups:
    """The aligned groups of a batch, in host memory: G groups over R_T teacher and R_S student tokens.

    Attributes:
        teacher_group, student_group: int64 `[R_T]`, `[R_S]`, the group of each token, non-decreasing.
        teacher_size, student_size: int64 `[G]`, the tokens of each group, all ≥ 1.
    """

    teacher_group: np.ndarray
    student_group: np.ndarray
    teacher_size: np.ndarray
    student_size: np.ndarray

    def __len__(self) -> int:
        return len(self.student_size)

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four arrays, in the order of the attributes, as tensors on a device, in one transfer."""
        arrays = (self.teacher_group, self.student_group, self.teacher_size, self.student_size)
        return torch.from_numpy(np.concatenate(arrays)).to(device).split([len(array) for array in arrays])


def concatenate_groups(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Groups:
    """The groups of a batch, numbered on from example to example.

    Args:
        examples: `(teacher_group, student_group)` of each response, as `dtw_groups` gives them; there may be none.
    """
    if not examples:
        return Groups(*np.zeros((4, 0), dtype=np.int64))
    counts = [int(student_group[-1]) + 1 for _, student_group in examples]
    offsets = np.cumsum([0, *counts])
    teacher_group = np.concatenate([group + offset for (group, _), offset in zip(examples, offsets)])
    student_group = np.concatenate([group + offset for (_, group), offset in zip(examples, offsets)])
    return Groups(teacher_group, student_group, group_sizes(teacher_group), group_sizes(student_group))


def one_to_one_rows(groups: Groups) -> np.ndarray:
    """int64 `[R_S]`: the teacher row that a student token shares a 1–1 group with, −1 where its group is larger."""
    alone = (groups.teacher_size == 1) & (groups.student_size == 1)
    first_row = np.cumsum(groups.teacher_size) - groups.teacher_size
    return np.where(alone, first_row, -1)[groups.student_group]


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


def alignment_counts(
    ends: Sequence[tuple[np.ndarray, np.ndarray]], groups: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, int]:
    """How many student tokens of a batch are in 1–1 groups, and in groups that cover the same bytes on both sides.

    Args:
        ends: `(teacher_ends, student_ends)` of each response, as in `byte_groups`.
        groups: `(teacher_group, student_group)` of each response.

    Returns:
        `{"one_to_one": …, "aligned": …}`
    """
    return {
        "one_to_one": sum(int(one_to_one_tokens(*group).sum()) for group in groups),
        "aligned": sum(int(aligned_tokens(*end, *group).sum()) for end, group in zip(ends, groups)),
    }
