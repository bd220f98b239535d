"""Contextual dynamic mapping: which teacher token stands for which student token, in each aligned group.

CDM, arXiv 2502.11104, steps 4 and 5. Of each group's mean logits only the k largest entries of either side
and their matches are ever used, so no group × vocabulary matrix is built: means are formed a few groups at a
time, and the loss reads 2k columns of each token.

`contextual_kl` is the whole computation; the other functions are its parts, in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from get_vocab_mapper.mapper import Direction, VocabMapper
from modeling.losses.divergences import restricted_kl
from modeling.losses.logits import Logits, as_float, chunks_with_buffers, float_dtype, largest_and_total, to_device
from modeling.losses.rows import StudentRows
from modeling.text.alignment import GroupedSide, Groups

BLOCK = 64  # columns, for the search of the top k


@dataclass(frozen=True)
class ContextualKL:
    """The CDM divergence of each of the G groups of a batch, and how much of it was mapped.

    Attributes:
        kd: float32 `[G]`, the divergence of each group, in nats, with its gradient.
        mapped_rate: float32 `[G]`, pairs found in both directions / 2k.
        teacher_mass: float32 `[G]`, the probability that the teacher's full distribution over its vocabulary
            (softmax of the group's mean logits, temperature 1) gives to the mapped of its top-k tokens.
    """

    kd: Tensor
    mapped_rate: Tensor
    teacher_mass: Tensor


def contextual_kl(
    student: StudentRows,
    teacher_logits: Logits,
    groups: Groups,
    mapper: VocabMapper,
    topk: int = 100,
    temperature: float = 1.0,
) -> ContextualKL:
    """Divergence between teacher and student over the tokens that map to each other in context.

    For each group g, with mean logits z^T and z^S, and k = min(topk, V_T, V_S):

        P_→ = {(v, match of v) : v in the teacher's top k}
        P_← = {(match of u, u) : u in the student's top k}
        KD_g = τ²/2 · ( KL(q^T_→ ‖ q^S_→) + KL(q^T_← ‖ q^S_←) )

    where q_d is the softmax of z / τ over the pairs of P_d. A direction without pairs adds 0. The gradient
    flows through the student logits that the two KL terms read, and through nothing else.

    Args:
        student: over `[R_S, V_S]` logits.
        teacher_logits: `[R_T, V_T]`, those that predict the response tokens; any dtype and row stride.
        groups: the aligned groups of the batch.
        mapper: of V_T and V_S tokens.
        topk: candidates of either side.
        temperature: τ > 0.

    Raises:
        ValueError: the mapper's length is not a side's vocabulary, or the groups do not cover the logits.
    """
    _check_inputs(student.logits, teacher_logits, groups, mapper)
    if not len(groups):
        nothing = student.ce  # of no token, with its (empty) gradient
        return ContextualKL(nothing, nothing.detach(), nothing.detach())
    device = teacher_logits.device
    teacher_vocab_size, student_vocab_size = teacher_logits.shape[1], student.logits.shape[1]
    k = min(topk, student_vocab_size, teacher_vocab_size)

    teacher_top = group_topk(teacher_logits, groups.teacher, k, with_logsumexp=True)
    student_top = group_topk(student.logits, groups.student, k)

    # The only wait for the device: both sides' candidates in one copy.
    teacher_ids, student_ids = torch.stack([teacher_top.ids, student_top.ids]).cpu().numpy()
    matches = np.stack(
        [
            match_pairs(teacher_ids, student_ids, mapper.to_student, student_vocab_size),
            match_pairs(student_ids, teacher_ids, mapper.to_teacher, teacher_vocab_size),
        ]
    )
    matched_students, matched_teachers = to_device(torch.from_numpy(matches), device)
    # A candidate without any probability (a folded stop token, where k is as large as the vocabulary) teaches nothing.
    found_students = (matched_students >= 0) & (teacher_top.values > -torch.inf)
    found_teachers = (matched_teachers >= 0) & (student_top.values > -torch.inf)

    # Columns 0 … k−1 are the pairs of P_→, columns k … 2k−1 those of P_←. (−1 reads column 0, and is masked.)
    matched_logits = group_means(gather(teacher_logits, matched_teachers.clamp(min=0), groups.teacher), groups.teacher)
    teacher = torch.cat([teacher_top.values, matched_logits], dim=1)
    student_columns = torch.cat([matched_students, student_top.ids], dim=1).clamp(min=0)
    read = group_means(student.columns(student_columns[groups.student.group]), groups.student)

    forward = restricted_kl(teacher[:, :k], read[:, :k], found_students, temperature)
    backward = restricted_kl(teacher[:, k:], read[:, k:], found_teachers, temperature)
    probabilities = (teacher_top.values - teacher_top.logsumexp[:, None]).exp()
    return ContextualKL(
        kd=(forward + backward) / 2,
        mapped_rate=(found_students.sum(1) + found_teachers.sum(1)) / (2 * k),
        teacher_mass=(probabilities * found_students).sum(1),
    )


def _check_inputs(student: Logits, teacher: Logits, groups: Groups, mapper: VocabMapper) -> None:
    for side, logits, own, other, size in (
        ("teacher", teacher, mapper.to_student, mapper.to_teacher, groups.teacher.host_size),
        ("student", student, mapper.to_teacher, mapper.to_student, groups.student.host_size),
    ):
        n_rows, vocab_size = logits.shape
        if len(own.static) != vocab_size:
            raise ValueError(
                f"the mapper knows {len(own.static)} {side} tokens, but the {side} logits have "
                f"{vocab_size} columns: cut them to the tokenizer's length"
            )
        if other.static.max() >= vocab_size:
            raise ValueError(f"the mapper maps to {side} ids beyond the {vocab_size} columns of its logits")
        if size.sum() != n_rows:
            raise ValueError(f"the groups cover {size.sum()} {side} tokens, but there are {n_rows} rows of logits")


class GroupTopK(NamedTuple):
    """The k largest mean logits of each group, by value descending, then by id ascending.

    Attributes:
        values: float32 `[G, k]`.
        ids: int64 `[G, k]`.
        logsumexp: float32 `[G]` over the whole mean row, or None where it was not asked for.
    """

    values: Tensor
    ids: Tensor
    logsumexp: Tensor | None


@torch.no_grad()
def group_topk(logits: Logits, groups: GroupedSide, k: int, with_logsumexp: bool = False) -> GroupTopK:
    """The top k of each group's mean logits (CDM, step 4).

    Args:
        logits: `[R, V]`, any floating dtype, any row stride.
        groups: of these R tokens.
        k: ≤ V.
        with_logsumexp: whether to give the normaliser of softmax over the mean row as well.
    """
    n_groups, dtype, device = len(groups.host_size), float_dtype(logits), logits.device
    values = torch.empty(n_groups, k, dtype=dtype, device=device)
    ids = torch.empty(n_groups, k, dtype=torch.int64, device=device)
    normaliser = torch.empty(n_groups, dtype=dtype, device=device) if with_logsumexp else None
    for at, rows in _mean_rows(logits, groups, own=with_logsumexp):
        values[at], ids[at] = _ordered_topk(rows, k)
        if with_logsumexp:
            largest, total = largest_and_total(rows, rows)
            normaliser[at] = total.log_().add_(largest)
    return GroupTopK(values, ids, normaliser)


def _mean_rows(logits: Logits, groups: GroupedSide, own: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few groups and their float32 mean logits, `[groups, V]`, at a time.

    With `own`, in memory that may be overwritten; otherwise a view of the logits where no mean is needed.
    """
    sizes = groups.host_size
    ends = np.cumsum(sizes)
    for at, (means,) in chunks_with_buffers(logits, 1, n_rows=len(sizes)):
        first, stop = int(ends[at.start] - sizes[at.start]), int(ends[at.stop - 1])
        if stop - first == len(means):
            rows = logits[first:stop]
            yield at, means.copy_(rows) if own or rows.dtype != means.dtype else rows
            continue
        means.zero_()
        for start in range(first, stop, len(means)):  # one group may hold a whole response
            piece = slice(start, min(start + len(means), stop))
            means.index_add_(0, groups.group[piece] - at.start, as_float(logits[piece]))
        yield at, means.div_(groups.size[at, None])


def _ordered_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, equal values by ascending id. (Of equal ones at the k-th place, any.)"""
    ids = row_topk(rows, k)[1].sort(dim=1).values
    values, order = rows.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def row_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`rows.topk(k)`, searched for in the k blocks of neighbours with the largest maxima: it can be nowhere else."""
    n_blocks = rows.shape[1] // BLOCK
    if n_blocks <= 2 * k:
        return rows.topk(k)
    in_blocks = n_blocks * BLOCK
    maxima = rows[:, :in_blocks].unflatten(1, (n_blocks, BLOCK)).amax(-1)
    blocks = maxima.topk(k, sorted=False).indices
    ids = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=rows.device)).flatten(1)
    rest = torch.arange(in_blocks, rows.shape[1], device=rows.device).expand(len(rows), -1)
    ids = torch.cat([ids, rest], dim=1)
    values, order = rows.gather(1, ids).topk(k)
    return values, ids.gather(1, order)


def match_pairs(
    top_ids: np.ndarray, other_top_ids: np.ndarray, direction: Direction, other_vocab_size: int
) -> np.ndarray:
    """The other side's token for each candidate of this side, group by group (CDM, step 4).

    A candidate's static entry comes first, and need not be a candidate of the other side. Without one, it is
    the nearest of its similar tokens that is a candidate of the other side in the same group; of equally near
    ones, that of better rank.

    Args:
        top_ids: int64 `[G, k]`, this side's candidates.
        other_top_ids: int64 `[G, k']`, the other side's, best first.
        direction: the map from this side to the other.
        other_vocab_size: number of tokens of the other side.

    Returns:
        int64 `[G, k]`, ids of the other side, −1 where there is none.

    Raises:
        ValueError: an id is not in its side's vocabulary.
    """
    if top_ids.max() >= len(direction.static) or other_top_ids.max() >= other_vocab_size:
        raise ValueError(
            f"candidates must be below {len(direction.static)} (this side) and {other_vocab_size} (other "
            f"side), got {top_ids.max()} and {other_top_ids.max()}"
        )
    arrays = (direction.static, direction.indptr, direction.indices, direction.distances)
    return _match(top_ids, other_top_ids, *arrays, other_vocab_size)


@njit(cache=True, nogil=True)
def _match(top_ids, other_top_ids, static, indptr, indices, distances, other_vocab_size):
    n_groups, n_candidates = top_ids.shape
    n_others = other_top_ids.shape[1]
    matches = np.empty((n_groups, n_candidates), dtype=np.int64)
    rank = np.full(other_vocab_size, n_others, dtype=np.int32)  # n_others: no candidate
    for g in range(n_groups):
        for r in range(n_others):
            rank[other_top_ids[g, r]] = r
        for c in range(n_candidates):
            token = top_ids[g, c]
            matches[g, c] = static[token]
            if matches[g, c] >= 0:
                continue
            best, best_distance = n_others, np.inf
            for entry in range(indptr[token], indptr[token + 1]):
                if rank[indices[entry]] < best:
                    if distances[entry] > best_distance:
                        break
                    best, best_distance = rank[indices[entry]], distances[entry]
            if best < n_others:
                matches[g, c] = other_top_ids[g, best]
        for r in range(n_others):
            rank[other_top_ids[g, r]] = n_others
    return matches


@torch.no_grad()
def gather(logits: Logits, columns: Tensor, groups: GroupedSide) -> Tensor:
    """float32 `[R, c]`: of every token the logits at its group's columns, int64 `[G, c]`; a constant."""
    columns = columns[groups.group]
    if isinstance(logits, Tensor):
        return as_float(logits.gather(1, columns))
    values = torch.empty(columns.shape, dtype=float_dtype(logits), device=logits.device)
    for at, _ in chunks_with_buffers(logits, 0):
        values[at] = logits[at].gather(1, columns[at])
    return values


def group_means(values: Tensor, groups: GroupedSide) -> Tensor:
    """`[G, c]`: the means of `[R, c]` values over each group's tokens (CDM, step 3), differentiable."""
    sums = values.new_zeros(len(groups.host_size), values.shape[1]).index_add(0, groups.group, values)
    return sums / groups.size[:, None]
