"""Exact edit-distance searches between two large lists of strings.

Both searches give what comparing every string with every other would give. They look at far fewer pairs,
because two facts bound the distance from below at almost no cost:
- it is at least the difference in length, so only a few lengths need a look;
- each insertion, deletion or substitution removes at most one character and adds at most one, so it is at
  least the number of characters that either string has and the other lacks, counted with multiplicity.
The pairs that are left are measured with the bit-parallel algorithm of Myers (1999) in Hyyrö's form.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from tqdm import tqdm

_WORD = 64  # longer strings than this many characters are measured with the plain recurrence
_CHUNK = 512  # strings a task: long enough to forget the call, short enough for a moving progress bar
_FAR = 1 << 30


@dataclass(frozen=True)
class _Strings:
    """Strings in order of length (then of their place in the list), as arrays that a compiled loop can read.

    Attributes:
        place: int64 [n], where each string stood in the list.
        codes: int32 [total], the characters of all strings; equal characters have equal codes.
        starts: int64 [n + 1], string i is `codes[starts[i]:starts[i + 1]]`.
        signatures: uint64 [n], the set of a string's characters, the second `e` being another than the first,
            hashed into 64 bits.
        by_length: int64 [longest + 2], strings of length L are `by_length[L] .. by_length[L + 1] - 1`.
    """

    place: np.ndarray
    codes: np.ndarray
    starts: np.ndarray
    signatures: np.ndarray
    by_length: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.codes, self.starts, self.signatures, self.by_length


def nearest_strings(queries: list[str], candidates: list[str], progress: str | None = None) -> np.ndarray:
    """For each query, the candidate at the smallest Levenshtein distance.

    Ties go to the candidate of smaller difference in length, then of longer common prefix (both in
    characters), then to the one that comes first.

    Args:
        queries, candidates: any strings; there is at least one candidate.
        progress: the label of a progress bar, or None for no bar.

    Returns:
        int64 array [len(queries), 2]: the index of the candidate, and its distance.
    """
    if not candidates:
        raise ValueError("nearest_strings needs at least one candidate.")
    query, candidate, alphabet = _pack(queries, candidates)
    found = np.empty((len(queries), 2), dtype=np.int64)

    def search(first: int, last: int) -> None:
        found[query.place[first:last]] = _nearest(
            first, last, *query.arrays, *candidate.arrays, candidate.place, alphabet
        )

    for _ in _in_threads(search, len(queries), progress):
        pass
    return found


def similar_strings(
    left: list[str], right: list[str], threshold: float, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pairs at normalised distance lev(a, b) / (|a| + |b|) < threshold; two empty strings are at 0.

    Returns:
        four int32 arrays [pairs], in no particular order: index into `left`, index into `right`, the
        Levenshtein distance, and |a| + |b|.
    """
    a, b, alphabet = _pack(left, right)
    longest = len(a.by_length) + len(b.by_length)
    limits = np.array([_largest_distance(total, threshold) for total in range(longest)], dtype=np.int64)

    def search(first: int, last: int) -> np.ndarray:
        return _similar(first, last, *a.arrays, *b.arrays, limits, alphabet)

    chunks = list(_in_threads(search, len(left), progress))
    pairs = np.concatenate(chunks) if chunks else np.empty((0, 4), dtype=np.int32)
    del chunks
    return (
        a.place[pairs[:, 0]].astype(np.int32),
        b.place[pairs[:, 1]].astype(np.int32),
        pairs[:, 2].copy(),
        pairs[:, 3].copy(),
    )


def _largest_distance(total: int, threshold: float) -> int:
    """The largest lev with lev / total < threshold, or -1."""
    lev = int(total * threshold) + 1
    while lev >= 0 and not (lev / total if total else float(lev)) < threshold:
        lev -= 1
    return lev


def _pack(left: list[str], right: list[str]) -> tuple[_Strings, _Strings, int]:
    """Both lists as arrays over one alphabet, and the size of that alphabet."""
    text = "".join(left) + "".join(right)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, codes = np.unique(points, return_inverse=True)
    codes = codes.astype(np.int32)
    border = sum(map(len, left))
    sides = []
    for strings, side_codes, side_points in (
        (left, codes[:border], points[:border]),
        (right, codes[border:], points[border:]),
    ):
        lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        place = np.argsort(lengths, kind="stable")
        source = np.concatenate(([0], np.cumsum(lengths)))[:-1]
        starts = np.concatenate(([0], np.cumsum(lengths[place])))
        # Position of each character in the joined list: its string's start there, plus its offset.
        gather = np.repeat(source[place] - starts[:-1], lengths[place]) + np.arange(starts[-1])
        by_length = np.searchsorted(lengths[place], np.arange(lengths.max(initial=0) + 2))
        sides.append(
            _Strings(place, side_codes[gather], starts, _signatures(side_points[gather], starts), by_length)
        )
    return sides[0], sides[1], len(alphabet)


def _in_threads(search: Callable, count: int, progress: str | None) -> Iterator:
    """Run `search(first, last)` over consecutive ranges of `count` items, in order, on all usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranges = [(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    with (
        ThreadPoolExecutor(cores) as pool,
        tqdm(total=count, desc=progress, unit=" tokens", mininterval=0.5, disable=progress is None) as bar,
    ):
        for (first, last), result in zip(ranges, pool.map(search, *zip(*ranges)) if ranges else ()):
            bar.update(last - first)
            yield result


@intrinsic
def _popcount(typing_context, word):
    """The number of set bits of a uint64, as int64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@njit(nogil=True)
def _signatures(points, starts):
    """The `signatures` of `_Strings`. ASCII letters of one case never share a bit."""
    signatures = np.zeros(len(starts) - 1, dtype=np.uint64)
    for i in range(len(signatures)):
        for c in range(starts[i], starts[i + 1]):
            earlier = 0
            for other in range(starts[i], c):
                earlier += points[other] == points[c]
            signatures[i] |= np.uint64(1) << np.uint64((points[c] + 27 * earlier) % _WORD)
    return signatures


@njit(nogil=True)
def _differ_beyond(left, right, limit):
    """Whether two signatures alone show that the distance is above `limit`."""
    return _popcount(left & ~right) > limit or _popcount(right & ~left) > limit


@njit(nogil=True)
def _distance(a, a_bits, b):
    """Levenshtein distance; `a_bits[c]` has bit i set where `a[i] == c`, if `a` fits into a word."""
    if len(a) > _WORD or len(a) == 0:
        return _distance_by_rows(a, b)
    vertical_plus = ~np.uint64(0)
    vertical_minus = np.uint64(0)
    last = np.uint64(1) << np.uint64(len(a) - 1)
    one = np.uint64(1)
    distance = len(a)
    for c in b:
        same = a_bits[c]
        diagonal = (((same & vertical_plus) + vertical_plus) ^ vertical_plus) | same | vertical_minus
        plus = vertical_minus | ~(diagonal | vertical_plus)
        minus = vertical_plus & diagonal
        if plus & last:
            distance += 1
        elif minus & last:
            distance -= 1
        plus = (plus << one) | one
        vertical_plus = (minus << one) | ~(diagonal | plus)
        vertical_minus = plus & diagonal
    return distance


@njit(nogil=True)
def _distance_by_rows(a, b):
    row = np.arange(len(b) + 1)
    for i in range(len(a)):
        diagonal = row[0]
        row[0] = i + 1
        for j in range(len(b)):
            step = min(row[j], row[j + 1]) + 1
            step = min(step, diagonal + (a[i] != b[j]))
            diagonal = row[j + 1]
            row[j + 1] = step
    return row[len(b)]


@njit(nogil=True)
def _set_bits(bits, string):
    """Write the positions of each character into `bits`; see `_distance`."""
    for position in range(min(len(string), _WORD)):
        bits[string[position]] |= np.uint64(1) << np.uint64(position)


@njit(nogil=True)
def _clear_bits(bits, string):
    for c in string:
        bits[c] = 0


@njit(nogil=True)
def _common_prefix(a, b):
    shared = 0
    while shared < len(a) and shared < len(b) and a[shared] == b[shared]:
        shared += 1
    return shared


@njit(nogil=True)
def _nearest(
    first, last,
    a_codes, a_starts, a_signatures, a_by_length,
    b_codes, b_starts, b_signatures, b_by_length, b_place,
    alphabet,
):  # fmt: skip
    """`nearest_strings` for the queries `first .. last - 1`."""
    found = np.empty((last - first, 2), dtype=np.int64)
    bits = np.zeros(alphabet, dtype=np.uint64)
    longest = len(b_by_length) - 2
    for i in range(first, last):
        a = a_codes[a_starts[i] : a_starts[i + 1]]
        _set_bits(bits, a)
        best, best_prefix, best_place = _FAR, -1, -1
        gap = 0  # the difference in length, smallest first
        # A larger gap can only be better with a smaller distance, and that is at least the gap.
        while gap < best and gap <= max(len(a), longest):
            limit = best - 1 if best < _FAR else _FAR
            for side in range(1 if gap == 0 else 2):
                length = len(a) + gap if side == 0 else len(a) - gap
                if length < 0 or length > longest:
                    continue
                for j in range(b_by_length[length], b_by_length[length + 1]):
                    if _differ_beyond(a_signatures[i], b_signatures[j], limit):
                        continue
                    b = b_codes[b_starts[j] : b_starts[j + 1]]
                    distance = _distance(a, bits, b)
                    if distance > limit:
                        continue
                    prefix = _common_prefix(a, b)
                    place = b_place[j]
                    if (
                        distance < best
                        or prefix > best_prefix
                        or (prefix == best_prefix and place < best_place)
                    ):
                        best, best_prefix, best_place = distance, prefix, place
                        limit = best  # a rival of this gap may tie
            gap += 1
        found[i - first, 0] = best_place
        found[i - first, 1] = best
        _clear_bits(bits, a)
    return found


@njit(nogil=True)
def _similar(
    first, last,
    a_codes, a_starts, a_signatures, a_by_length,
    b_codes, b_starts, b_signatures, b_by_length,
    limits, alphabet,
):  # fmt: skip
    """`similar_strings` for the left strings `first .. last - 1`: int32 [pairs, 4]."""
    pairs = np.empty((1024, 4), dtype=np.int32)
    count = 0
    bits = np.zeros(alphabet, dtype=np.uint64)
    for i in range(first, last):
        a = a_codes[a_starts[i] : a_starts[i + 1]]
        _set_bits(bits, a)
        for length in range(len(b_by_length) - 1):
            total = len(a) + length
            limit = limits[total]
            if abs(len(a) - length) > limit:
                continue
            for j in range(b_by_length[length], b_by_length[length + 1]):
                if _differ_beyond(a_signatures[i], b_signatures[j], limit):
                    continue
                distance = _distance(a, bits, b_codes[b_starts[j] : b_starts[j + 1]])
                if distance > limit:
                    continue
                if count == len(pairs):
                    grown = np.empty((2 * count, 4), dtype=np.int32)
                    for pair in range(count):  # a slice assignment takes numba three seconds to compile
                        for column in range(4):
                            grown[pair, column] = pairs[pair, column]
                    pairs = grown
                pairs[count, 0] = i
                pairs[count, 1] = j
                pairs[count, 2] = distance
                pairs[count, 3] = total
                count += 1
        _clear_bits(bits, a)
    return pairs[:count].copy()
