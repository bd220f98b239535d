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

from get_vocab_mapper.vocab_mapper import VocabMapper
from modeling.alignment import Groups
from modeling.divergences import (
    Logits,
    as_float,
    chunks_with_buffers,
    cross_entropy_and_columns,
    float_dtype,
    in_row_chunks,
    logsumexp_,
    restricted_kl,
)

BLOCK = 64  # columns, for the search of the top k


class DirectionMap(NamedTuple):
    """What one side's tokens may stand for on the other side, as arrays in host memory.

    Attributes:
        static: int32 `[V]`, the other side's id of every token, −1 where it has none.
        indptr: int32 `[V + 1]`; row v of the similar-token table is `indptr[v] … indptr[v + 1] − 1` (CSR).
        indices: int32 `[entries]`, the similar tokens, ids of the other side.
        distances: float32 `[entries]`, their distances. Each row is sorted by (distance, id).
    """

    static: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    distances: np.ndarray


def direction_maps(mapper: VocabMapper) -> tuple[DirectionMap, DirectionMap]:
    """A mapper's two directions: teacher to student, and student to teacher."""
    return (
        DirectionMap(mapper.teacher_to_student, **vars(mapper.similar_to_student)),
        DirectionMap(mapper.student_to_teacher, **vars(mapper.similar_to_teacher)),
    )


@dataclass(frozen=True)
class ContextualKL:
    """The CDM divergence of each of the G groups of a batch, and how much of it was mapped.

    Attributes:
        kd: float32 `[G]`, the divergence of each group, in nats, with its gradient.
        mapped_rate: float32 `[G]`, pairs found in both directions / 2k.
        teacher_mass: float32 `[G]`, the probability that the teacher's full distribution over its vocabulary
            (softmax of the group's mean logits, temperature 1) gives to the mapped of its top-k tokens.
        ce: float32 `[R_S]`, the cross-entropy of each student token, in nats, with its gradient; None without labels.
    """

    kd: Tensor
    mapped_rate: Tensor
    teacher_mass: Tensor
    ce: Tensor | None = None


def contextual_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    groups: Groups,
    teacher_to_student: DirectionMap,
    student_to_teacher: DirectionMap,
    topk: int = 100,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    student_logsumexp: Tensor | None = None,
) -> ContextualKL:
    """Divergence between teacher and student over the tokens that map to each other in context.

    For each group g, with mean logits z^T and z^S, and k = min(topk, V_T, V_S):

        P_→ = {(v, match of v) : v in the teacher's top k}
        P_← = {(match of u, u) : u in the student's top k}
        KD_g = τ²/2 · ( KL(q^T_→ ‖ q^S_→) + KL(q^T_← ‖ q^S_←) )

    where q_d is the softmax of z / τ over the pairs of P_d. A direction without pairs adds 0. The gradient
    flows through the student logits that the two KL terms read, and through nothing else.

    Args:
        student_logits: `[R_S, V_S]`, those that predict the response tokens; any dtype and row stride.
        teacher_logits: `[R_T, V_T]`, likewise.
        groups: the aligned groups of the batch.
        teacher_to_student, student_to_teacher: of V_T and of V_S tokens.
        topk: candidates of either side.
        temperature: τ > 0.
        labels: int64 `[R_S]`, the student's response tokens, for their cross-entropy, which then shares one gradient
            with the divergence.
        student_logsumexp: float32 `[R_S]` of the student's logits, where it is known: spares the cross-entropy a pass.

    Raises:
        ValueError: a map's length is not its side's vocabulary, or the groups do not cover the logits.
    """
    _check_inputs(student_logits, teacher_logits, groups, teacher_to_student, student_to_teacher)
    if not len(groups):
        nothing = student_logits.new_empty(3, 0, dtype=float_dtype(student_logits))
        # The cross-entropy of no token still has its (empty) gradient: every weight takes part in a backward pass.
        ce = None if labels is None else cross_entropy_and_columns(student_logits, labels, labels[:, None])[0]
        return ContextualKL(*nothing, ce=ce)
    device = student_logits.device
    k = min(topk, student_logits.shape[1], teacher_logits.shape[1])

    teacher_top = group_topk(teacher_logits, groups.teacher_size, k, with_logsumexp=True)
    student_top = group_topk(student_logits, groups.student_size, k)

    # The only wait for the device: both sides' candidates in one copy.
    teacher_ids, student_ids = torch.stack([teacher_top.ids, student_top.ids]).cpu().numpy()
    matches = np.stack(
        [
            match_pairs(teacher_ids, student_ids, teacher_to_student, student_logits.shape[1]),
            match_pairs(student_ids, teacher_ids, student_to_teacher, teacher_logits.shape[1]),
        ]
    )
    matched_students, matched_teachers = torch.from_numpy(matches).to(device)
    found_students, found_teachers = matched_students >= 0, matched_teachers >= 0

    teacher_group, student_group, teacher_size, student_size = groups.tensors(device)
    # Columns 0 … k−1 are the pairs of P_→, columns k … 2k−1 those of P_←.
    with torch.no_grad():
        matched_logits = gather_group_logits(teacher_logits, teacher_group, teacher_size, matched_teachers)
    teacher = torch.cat([teacher_top.values, matched_logits], dim=1)
    student_columns = torch.cat([matched_students, student_top.ids], dim=1)
    if labels is None:
        ce, student = None, gather_group_logits(student_logits, student_group, student_size, student_columns)
    else:
        token_columns = student_columns.clamp(min=0)[student_group]
        ce, token_logits = cross_entropy_and_columns(student_logits, labels, token_columns, student_logsumexp)
        student = group_means(token_logits, student_group, student_size)

    forward = restricted_kl(teacher[:, :k], student[:, :k], found_students, temperature)
    backward = restricted_kl(teacher[:, k:], student[:, k:], found_teachers, temperature)
    probabilities = (teacher_top.values - teacher_top.logsumexp[:, None]).exp()
    return ContextualKL(
        kd=(forward + backward) / 2,
        mapped_rate=(found_students.sum(1) + found_teachers.sum(1)) / (2 * k),
        teacher_mass=(probabilities * found_students).sum(1),
        ce=ce,
    )


def _check_inputs(student_logits, teacher_logits, groups, teacher_to_student, student_to_teacher) -> None:
    for side, logits, own_map, other_map, size in (
        ("teacher", teacher_logits, teacher_to_student, student_to_teacher, groups.teacher_size),
        ("student", student_logits, student_to_teacher, teacher_to_student, groups.student_size),
    ):
        n_rows, vocabulary = logits.shape
        if len(own_map.static) != vocabulary:
            raise ValueError(
                f"the mapper knows {len(own_map.static)} {side} tokens, but the {side} logits have "
                f"{vocabulary} columns: cut them to the tokenizer's length"
            )
        if other_map.static.max() >= vocabulary:
            raise ValueError(f"the mapper maps to {side} ids beyond the {vocabulary} columns of its logits")
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
def group_topk(logits: Logits, sizes: np.ndarray, k: int, with_logsumexp: bool = False) -> GroupTopK:
    """The top k of each group's mean logits (CDM, step 4).

    Args:
        logits: `[R, V]`, any floating dtype, any row stride.
        sizes: `[G]`, the tokens of each group; they are runs of neighbours, in order, and sum to R.
        k: ≤ V.
        with_logsumexp: whether to give the normaliser of softmax over the mean row as well.
    """
    dtype = float_dtype(logits)
    values = logits.new_empty(len(sizes), k, dtype=dtype)
    ids = logits.new_empty(len(sizes), k, dtype=torch.int64)
    logsumexp = logits.new_empty(len(sizes), dtype=dtype) if with_logsumexp else None
    for at, rows in _mean_rows(logits, sizes, own=with_logsumexp):
        values[at], ids[at] = _ordered_topk(rows, k)
        if with_logsumexp:
            logsumexp[at] = logsumexp_(rows)
    return GroupTopK(values, ids, logsumexp)


def _mean_rows(logits: Logits, sizes: np.ndarray, own: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few groups and their float32 mean logits, `[groups, V]`, at a time.

    With `own`, in memory that may be overwritten; otherwise a view of the logits where no mean is needed.
    """
    ends = np.cumsum(sizes)
    group = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(logits.device)
    sizes_there = torch.from_numpy(sizes).to(logits.device)
    for at, (means,) in chunks_with_buffers(logits, 1, n_rows=len(sizes)):
        first, stop = ends[at.start] - sizes[at.start], ends[at.stop - 1]
        if stop - first == len(means):
            rows = logits[first:stop]
            yield at, means.copy_(rows) if own or rows.dtype != means.dtype else rows
            continue
        means.zero_()
        for start in range(first, stop, len(means)):  # one group may hold a whole response
            piece = slice(start, min(start + len(means), stop))
            means.index_add_(0, group[piece] - at.start, as_float(logits[piece]))
        yield at, means.div_(sizes_there[at, None])


def _ordered_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, equal values by ascending id, also around the k-th place.

    `torch.topk` leaves open which of equal values it takes, and bfloat16 logits are full of equal values.
    """
    vocabulary = rows.shape[1]
    values, ids = _topk(rows, min(k + 1, vocabulary))
    if k < vocabulary:
        tied = values[:, k - 1] == values[:, k]
        if rows.device.type != "cpu":  # looking which ones are would wait for the device
            ids = _lowest_of_tied(rows, values, ids, k)
        elif tied.any():
            ids[tied] = _lowest_of_tied(rows[tied], values[tied], ids[tied], k)
    ids = ids[:, :k].sort(dim=1).values
    values, order = rows.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _lowest_of_tied(rows: Tensor, values: Tensor, ids: Tensor, k: int) -> Tensor:
    """`ids`, those of the k + 1 largest `values`, with the lowest ids of all that equal the k-th in these places."""
    last = values[:, k - 1 : k]
    low_ids_first = torch.arange(rows.shape[1], 0, -1, dtype=torch.int32, device=rows.device)
    tied_ids = ((rows == last) * low_ids_first).topk(k).indices
    place_among_tied = torch.arange(k + 1, device=rows.device) - (values > last).sum(1, keepdim=True)
    places = place_among_tied.clamp(min=0, max=k - 1)
    return torch.where(place_among_tied < 0, ids, tied_ids.gather(1, places))


def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    top_ids: np.ndarray, other_top_ids: np.ndarray, direction: DirectionMap, n_other_vocabulary: int
) -> np.ndarray:
    """The other side's token for each candidate of this side, group by group (CDM, step 4).

    A candidate's static entry comes first, and need not be a candidate of the other side. Without one, it is
    the nearest of its similar tokens that is a candidate of the other side in the same group; of equally near
    ones, that of better rank.

    Args:
        top_ids: int64 `[G, k]`, this side's candidates.
        other_top_ids: int64 `[G, k']`, the other side's, best first.
        direction: the map from this side to the other.
        n_other_vocabulary: number of tokens of the other side.

    Returns:
        int64 `[G, k]`, ids of the other side, −1 where there is none.

    Raises:
        ValueError: an id is not in its side's vocabulary.
    """
    if top_ids.max() >= len(direction.static) or other_top_ids.max() >= n_other_vocabulary:
        raise ValueError(
            f"candidates must be below {len(direction.static)} (this side) and {n_other_vocabulary} (other "
            f"side), got {top_ids.max()} and {other_top_ids.max()}"
        )
    return _match(top_ids, other_top_ids, *direction, n_other_vocabulary)


@njit(cache=True, nogil=True)
def _match(top_ids, other_top_ids, static, indptr, indices, distances, n_other_vocabulary):
    n_groups, n_candidates = top_ids.shape
    n_others = other_top_ids.shape[1]
    matches = np.empty((n_groups, n_candidates), dtype=np.int64)
    rank = np.full(n_other_vocabulary, n_others, dtype=np.int32)  # n_others: no candidate
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


def gather_group_logits(logits: Logits, group: Tensor, sizes: Tensor, columns: Tensor) -> Tensor:
    """Mean logits of each group at chosen columns, read token by token (CDM, steps 3 and 5).

    The gradient with respect to the logits is sparse in content: only the columns read are not 0.

    Args:
        logits: `[R, V]`, any floating dtype, any row stride.
        group, sizes: as in `group_means`.
        columns: int64 `[G, c]`; −1 stands for no column and reads column 0, for the caller to mask.

    Returns:
        float32 `[G, c]`, differentiable with respect to `logits`.
    """
    # In chunks: the backward pass of a half-precision gather may take a float32 copy of all it is given.
    token_logits = in_row_chunks(
        lambda rows, row_columns: as_float(rows.gather(1, row_columns)), logits, columns.clamp(min=0)[group]
    )
    return group_means(token_logits, group, sizes)


def group_means(values: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """Means over each group's tokens.

    Args:
        values: float `[R, c]`.
        group: int64 `[R]`, the group of each token.
        sizes: int64 `[G]`, the tokens of each group.

    Returns:
        `[G, c]`, differentiable.
    """
    return values.new_zeros(len(sizes), values.shape[1]).index_add(0, group, values) / sizes[:, None]
