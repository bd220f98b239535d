"""Search by prefix in a vocabulary: the tokens that begin with some bytes, and the longest token that bytes begin with.

The token forms are sorted by their bytes once. Tokens with a common beginning are then neighbours, so those that begin
with `c` are one slice. And where a token is a prefix of `r`, all between the two begin with it too: the longest one is
found from the last form that does not come after `r`, going from each form to its own longest proper prefix.
"""

from functools import cached_property

import numpy as np
from numba import njit

from get_vocab_mapper.token_forms import TokenForms


class PrefixSearch:
    """A vocabulary, sorted by bytes. Special tokens and those that stand for no text take no part.

    Attributes:
        order: int64 `[n]`, the ids in growing order of their forms, equal forms by `TokenForms.by_preference`.
        data, starts: uint8 `[bytes]` and int64 `[n + 1]`: the form of `order[k]` is `data[starts[k]:starts[k + 1]]`.
    """

    def __init__(self, forms: TokenForms):
        takes_part = ~forms.is_special & (forms.lengths > 0)
        ids = forms.by_preference[takes_part[forms.by_preference]].tolist()
        ids.sort(key=forms.forms.__getitem__)  # stable
        self.order = np.array(ids, dtype=np.int64)
        self.data, self.starts = _joined([forms.forms[i] for i in ids])

    @cached_property
    def _links(self) -> tuple[np.ndarray, np.ndarray]:
        return _links(self.data, self.starts)

    def beginning_with(self, prefix: bytes) -> tuple[int, int]:
        """`(lo, hi)`: the tokens `order[lo:hi]` are those whose forms begin with `prefix`, the equal ones in front."""
        return _slice(self.data, self.starts, np.frombuffer(prefix, dtype=np.uint8))

    def longest(self, text: bytes) -> int:
        """The id of the longest token that `text` begins with, the first by preference of equal ones; −1 for none."""
        return int(self.longest_of_each([text])[0])

    def longest_of_each(self, texts: list[bytes]) -> np.ndarray:
        """int32 `[len(texts)]`: `longest` of each."""
        data, starts = _joined(texts)
        return self.longest_in(data, starts[:-1], starts[1:])

    def longest_in(self, data: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """int32 `[n]`: `longest` of each `data[start:stop]`. Fast where they come in growing order.

        Args:
            data: uint8 `[bytes]`.
            starts, stops: int64 `[n]`.
        """
        places = _longest(self.data, self.starts, *self._links, data, starts, stops)
        return np.where(places < 0, -1, self.order[places] if len(self.order) else -1).astype(np.int32)


def _joined(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)), out=starts[1:])
    return np.frombuffer(b"".join(texts), dtype=np.uint8), starts


@njit(cache=True, nogil=True)
def _common(a, a_start, a_stop, b, b_start, b_stop):
    """How many bytes two strings have in common at their beginning."""
    n = min(a_stop - a_start, b_stop - b_start)
    for i in range(n):
        if a[a_start + i] != b[b_start + i]:
            return i
    return n


@njit(cache=True, nogil=True)
def _is_after(data, starts, k, text, start, stop):
    """Does form k come after the text?"""
    n = _common(data, starts[k], starts[k + 1], text, start, stop)
    if n == stop - start or n == starts[k + 1] - starts[k]:
        return starts[k + 1] - starts[k] > stop - start
    return data[starts[k] + n] > text[start + n]


@njit(cache=True, nogil=True)
def _links(data, starts):
    """Of each form: the first of those equal to it, and the first of its longest proper prefix, −1 for none."""
    n = len(starts) - 1
    first, prefix = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
    for k in range(n):
        before, length = k - 1, starts[k + 1] - starts[k]
        while before >= 0:
            of_before = starts[before + 1] - starts[before]
            if _common(data, starts[before], starts[before + 1], data, starts[k], starts[k + 1]) == of_before:
                break
            before = prefix[before]
        if before >= 0 and starts[before + 1] - starts[before] == length:
            first[k], prefix[k] = first[before], prefix[before]
        else:
            first[k], prefix[k] = k, -1 if before < 0 else first[before]
    return first, prefix


@njit(cache=True, nogil=True)
def _slice(data, starts, text):
    n, bounds = len(starts) - 1, np.zeros(2, dtype=np.int64)
    for side in range(2):
        low, high = bounds[0], n
        while low < high:
            middle = (low + high) // 2
            common = _common(data, starts[middle], starts[middle + 1], text, 0, len(text))
            # What begins with the text is behind the lower border, and before the upper one.
            begins = common == len(text)
            is_before = side == 1 if begins else not _is_after(data, starts, middle, text, 0, len(text))
            if is_before:
                low = middle + 1
            else:
                high = middle
        bounds[side] = low
    return bounds[0], bounds[1]


@njit(cache=True, nogil=True)
def _longest(data, starts, first, prefix, text, text_starts, text_stops):
    """The place in the order of the longest form that each text begins with, −1 for none."""
    n, found = len(starts) - 1, np.empty(len(text_starts), dtype=np.int64)
    low = 0  # the number of forms that do not come after the text before
    for i in range(len(text_starts)):
        start, stop = text_starts[i], text_stops[i]
        if low > 0 and _is_after(data, starts, low - 1, text, start, stop):
            low = 0
        step = 1
        while low + step <= n and not _is_after(data, starts, low + step - 1, text, start, stop):
            low += step
            step *= 2
        high = min(low + step - 1, n)
        while low < high:
            middle = (low + high) // 2
            if _is_after(data, starts, middle, text, start, stop):
                high = middle
            else:
                low = middle + 1
        k = low - 1
        while k >= 0 and _common(data, starts[k], starts[k + 1], text, start, stop) < starts[k + 1] - starts[k]:
            k = prefix[k]
        found[i] = -1 if k < 0 else first[k]
    return found
