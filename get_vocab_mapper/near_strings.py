"""Exact edit-distance searches between two large lists of strings.

Both searches give what comparing every string with every other would give. They measure far fewer pairs, because two
facts bound the Levenshtein distance from below at almost no cost:
- it is at least the difference in length, so only a few lengths need a look;
- each insertion, deletion or substitution removes at most one character and adds at most one, so it is at least the
  number of characters that either string has and the other lacks, counted with multiplicity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from tqdm import tqdm

_CHUNK = 512  # strings a task: long enough to forget the call, short enough for a moving progress bar
_ROOM = 1 << 18  # pairs that a task finds, but rarely


class _Strings(NamedTuple):
    """Strings as arrays that a compiled loop can read.

    Attributes:
        codes: uint32 [total], the code points of all strings.
        starts: int64 [n + 1], string i is `codes[starts[i]:starts[i + 1]]`.
        signatures: uint64 [n], the set of a string's characters, the second `e` being another than the first, hashed
            into 64 bits.
        order: int64 [n], the strings in order of length, then of their place in the list.
        by_length: int64 [longest + 2], strings of length L are `order[by_length[L]:by_length[L + 1]]`.
    """

    codes: np.ndarray
    starts: np.ndarray
    signatures: np.ndarray
    order: np.ndarray
    by_length: np.ndarray

    @classmethod
    def of(cls, strings: list[str]) -> _Strings:
        codes = np.frombuffer("".join(strings).encode("utf-32-le"), dtype=np.uint32)
        lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        starts, order = np.concatenate(([0], np.cumsum(lengths))), np.argsort(lengths, kind="stable")
        by_length = np.searchsorted(lengths[order], np.arange(lengths.max(initial=0) + 2))
        return cls(codes, starts, _signatures(codes, starts), order, by_length)


def nearest_strings(queries: list[str], candidates: list[str], progress: str | None = None) -> np.ndarray:
    """For each query, the candidate at the smallest Levenshtein distance.

    Ties go to the candidate of smaller difference in length, then of longer common prefix (both in characters), then
    to the one that comes first.

    Args:
        queries, candidates: any strings; there is at least one candidate.
        progress: the label of a progress bar, or None for no bar.

    Returns:
        int64 array [len(queries), 2]: the index of the candidate, and its distance.
    """
    if not candidates:
        raise ValueError("nearest_strings needs at least one candidate.")
    a, b = _Strings.of(queries), _Strings.of(candidates)
    parts = list(_in_threads(lambda first, last: _nearest(*a[:3], first, last, *b), len(queries), progress))
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])


def similar_strings(
    left: list[str], right: list[str], threshold: float, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pairs at normalised distance lev(a, b) / (|a| + |b|) < threshold; two empty strings are at 0.

    Returns:
        four int32 arrays [pairs], in no particular order: index into `left`, index into `right`, the Levenshtein
        distance, and |a| + |b|.
    """
    a, b = _Strings.of(left), _Strings.of(right)
    longest = len(a.by_length) + len(b.by_length)
    limits = np.array([_largest_distance(total, threshold) for total in range(longest)], dtype=np.int64)

    def search(first: int, last: int) -> np.ndarray:
        pairs = np.empty((4, _ROOM), dtype=np.int32)
        while (count := _similar(*a[:3], first, last, *b, limits, pairs)) > pairs.shape[1]:
            pairs = np.empty((4, count), dtype=np.int32)
        return pairs[:, :count].copy()

    parts = list(_in_threads(search, len(left), progress))
    return tuple(np.concatenate([np.empty((4, 0), dtype=np.int32), *parts], axis=1))


def _largest_distance(total: int, threshold: float) -> int:
    """The largest lev with lev / total < threshold, or -1."""
    lev = int(total * threshold) + 1
    while lev >= 0 and not (lev / total if total else float(lev)) < threshold:
        lev -= 1
    return lev


def _in_threads(search: Callable, count: int, progress: str | None) -> Iterator:
    """Runs `search(first, last)` over consecutive ranges of `count` items, in order, on all usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    firsts = range(0, count, _CHUNK)
    lasts = [min(first + _CHUNK, count) for first in firsts]
    with (
        ThreadPoolExecutor(cores) as pool,
        tqdm(total=count, desc=progress, unit=" tokens", mininterval=0.5, disable=progress is None) as bar,
    ):
        for first, last, result in zip(firsts, lasts, pool.map(search, firsts, lasts)):
            bar.update(last - first)
            yield result


@njit(nogil=True)
def _signatures(codes, starts):
    """The `signatures` of `_Strings`. ASCII letters of one case never share a bit."""
    signatures = np.zeros(len(starts) - 1, dtype=np.uint64)
    for i in range(len(signatures)):
        for c in range(starts[i], starts[i + 1]):
            earlier = 0
            for other in range(starts[i], c):
                earlier += codes[other] == codes[c]
            signatures[i] |= np.uint64(1) << np.uint64((codes[c] + 27 * earlier) % 64)
    return signatures


@intrinsic
def _count_bits(typing_context, word):
    """The number of set bits of a uint64, as int64."""
    return types.int64(types.uint64), lambda context, builder, signature, words: builder.ctpop(words[0])


@njit(nogil=True)
def _differ_beyond(left, right, limit):
    """Whether two signatures alone show that the distance is above `limit`."""
    return _count_bits(left & ~right) > limit or _count_bits(right & ~left) > limit


@njit(nogil=True)
def _distance(a, b, bits):
    """The Levenshtein distance: up to 64 characters of `a` at once (Myers 1999, in Hyyrö's form), else row by row.

    Bit i of `bits[c]` is set where `a[i] == c`.
    """
    one, distance = np.uint64(1), len(a)
    if not 0 < len(a) <= 64:
        row = np.arange(len(b) + 1)
        for i in range(len(a)):
            diagonal, row[0] = row[0], i + 1
            for j in range(len(b)):
                step = min(min(row[j], row[j + 1]) + 1, diagonal + (a[i] != b[j]))
                diagonal, row[j + 1] = row[j + 1], step
        return row[len(b)]
    vertical_plus, vertical_minus, last = ~np.uint64(0), np.uint64(0), one << np.uint64(len(a) - 1)
    for c in b:
        same = bits[c]
        diagonal = (((same & vertical_plus) + vertical_plus) ^ vertical_plus) | same | vertical_minus
        plus, minus = vertical_minus | ~(diagonal | vertical_plus), vertical_plus & diagonal
        distance += (plus & last != 0) - (minus & last != 0)
        plus = (plus << one) | one
        vertical_plus, vertical_minus = (minus << one) | ~(diagonal | plus), plus & diagonal
    return distance


@njit(nogil=True)
def _mark(bits, string, on):
    """Writes where each character stands into `bits` (see `_distance`), or clears it again."""
    for position in range(min(len(string), 64)):
        bits[string[position]] = bits[string[position]] | np.uint64(1) << np.uint64(position) if on else np.uint64(0)


@njit(nogil=True)
def _common_prefix(a, b):
    shared = 0
    while shared < len(a) and shared < len(b) and a[shared] == b[shared]:
        shared += 1
    return shared


@njit(nogil=True)
def _nearest(a_codes, a_starts, a_signatures, first, last, b_codes, b_starts, b_signatures, order, by_length):
    """`nearest_strings` for the queries `first .. last - 1`."""
    found, bits = np.empty((last - first, 2), dtype=np.int64), np.zeros(0x110000, dtype=np.uint64)
    b_signatures = b_signatures[order]
    longest = len(by_length) - 2
    for i in range(first, last):
        a = a_codes[a_starts[i] : a_starts[i + 1]]
        _mark(bits, a, True)
        best, best_prefix, best_j = 1 << 30, -1, -1
        gap = 0  # the difference in length, smallest first
        # A larger gap can only be better with a smaller distance, and that is at least the gap.
        while gap < best and gap <= max(len(a), longest):
            limit = best - 1
            for side in range(1 if gap == 0 else 2):
                length = len(a) + gap if side == 0 else len(a) - gap
                if length < 0 or length > longest:
                    continue
                for place in range(by_length[length], by_length[length + 1]):
                    if _differ_beyond(a_signatures[i], b_signatures[place], limit):
                        continue
                    j = order[place]
                    b = b_codes[b_starts[j] : b_starts[j + 1]]
                    distance = _distance(a, b, bits)
                    if distance > limit:
                        continue
                    prefix = _common_prefix(a, b)
                    if distance < best or prefix > best_prefix or (prefix == best_prefix and j < best_j):
                        best, best_prefix, best_j = distance, prefix, j
                        limit = best  # a rival of this gap may tie
            gap += 1
        found[i - first, 0], found[i - first, 1] = best_j, best
        _mark(bits, a, False)
    return found


@njit(nogil=True)
def _similar(
    a_codes, a_starts, a_signatures, first, last, b_codes, b_starts, b_signatures, order, by_length, limits, pairs
):
    """Pairs of a left string `first .. last - 1` and a right one at a distance of at most `limits[|a| + |b|]`.

    Writes both, the distance and |a| + |b| to int32 [4, room] while there is room; returns how many pairs there are.
    """
    count, bits = 0, np.zeros(0x110000, dtype=np.uint64)
    b_signatures = b_signatures[order]
    for i in range(first, last):
        a = a_codes[a_starts[i] : a_starts[i + 1]]
        _mark(bits, a, True)
        for length in range(len(by_length) - 1):
            total = len(a) + length
            if abs(len(a) - length) > limits[total]:
                continue
            for place in range(by_length[length], by_length[length + 1]):
                if _differ_beyond(a_signatures[i], b_signatures[place], limits[total]):
                    continue
                j = order[place]
                distance = _distance(a, b_codes[b_starts[j] : b_starts[j + 1]], bits)
                if distance <= limits[total]:
                    if count < pairs.shape[1]:
                        pairs[0, count], pairs[1, count], pairs[2, count], pairs[3, count] = i, j, distance, total
                    count += 1
        _mark(bits, a, False)
    return count
