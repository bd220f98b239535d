"""Which of the teacher's predictions speaks of each student token, by the bytes of the response.

A student token begins at byte `a`, inside some teacher token or where one begins. Beside the row of logits that
predicts that teacher token, there are sets of teacher tokens: those that begin with the bytes which that token has
before `a`; and, where the student token reaches over its end, those that begin with what is left in the last one it
touches. All of it depends on the text alone, and is found by prefix search in the data loader's workers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from get_vocab_mapper.prefix_search import PrefixSearch
from modeling.text.alignment import aligned_tokens, byte_groups
from modeling.text.encoder import Encoder

KEPT_STATES = 512  # beginnings of teacher tokens whose continuations a collator remembers


@dataclass(frozen=True)
class TokenSets:
    """n sets of teacher tokens, of which many are the same: each different one is stored once.

    Attributes:
        rows: int64 `[n]`, the row of logits that each is of.
        first, size: int64 `[n]`: set i is `tokens[first[i]:first[i] + size[i]]`.
        tokens: int64 `[E]`, teacher ids.
        host_ends: int64 `[n + 1]` in host memory, the cumulated sizes.
    """

    rows: Tensor
    first: Tensor
    size: Tensor
    tokens: Tensor
    host_ends: np.ndarray

    def entries(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """`(i, entry)`, int64 `[m]` each: all members of the sets first … stop − 1: `tokens[entry]` is one of set i."""
        n, size = int(self.host_ends[stop] - self.host_ends[first]), self.size[first:stop]
        before = size.cumsum(0) - size
        sets = torch.arange(first, stop, device=size.device).repeat_interleave(size, output_size=n)
        shift = (self.first[first:stop] - before).repeat_interleave(size, output_size=n)
        return sets, torch.arange(n, device=size.device) + shift


@dataclass(frozen=True)
class PrefixRows:
    """How the R_S student tokens of a batch lie in the teacher's.

    Attributes:
        teacher_row: int64 `[R_S]`, the row of the teacher token that covers a student token's first byte. −1 where
            there is none; in the last group of a text that was cut, where it covers other bytes on the two sides; and
            in an interior or spanning row whose tokens a normaliser has changed, so that they do not tell their bytes.
        white_space: bool `[R_S]`: is the student token made of spaces and tabs alone?
        interior, spanning: bool `[R_S]`, of rows with a teacher row: does the student token begin inside that teacher
            token, does it reach over its end?
        reached: int64 `[e]`, the different student tokens that the next three name, as places in it. −1 is none.
        source: int64 `[R_S]`, of interior rows: the longest student token that the rest of the teacher token begins
            with.
        label: int64 `[R_S]`, of spanning rows: the student token itself.
        continued: a set for each interior row, in their order: the teacher tokens that go on from what the teacher
            token has before the student's first byte.
        target: int64 `[E]`, beside `continued.tokens`: the longest student token that the token's rest, behind that
            beginning, begins with.
        links: L sets, of teacher rows. Those of one spanning row are a chain: of every teacher token behind the first
            one that it touches, the token itself; of the last, all tokens that begin with the bytes left there.
        spanning_row: int64 `[L]`, the spanning row that each is of.
        interior_rows: the interior rows, in host memory.
        n_covered, n_white_space, n_spanning: how many rows have a teacher row; of these, are white space; span.
    """

    teacher_row: Tensor
    white_space: Tensor
    interior: Tensor
    spanning: Tensor
    reached: Tensor
    source: Tensor
    label: Tensor
    continued: TokenSets
    target: Tensor
    links: TokenSets
    spanning_row: Tensor
    interior_rows: np.ndarray
    n_covered: int
    n_white_space: int
    n_spanning: int

    def map(self, function) -> PrefixRows:
        """The same with `function` applied to its tensors."""
        sets = {name: _map(getattr(self, name), function) for name in ("continued", "links")}
        return replace(_map(self, function), **sets)


def _map(fields, function):
    return replace(fields, **{name: function(value) for name, value in vars(fields).items() if torch.is_tensor(value)})


def boundary_rows(teacher_row: np.ndarray) -> PrefixRows:
    """Of text that both sides split alike: every token begins and ends with its `teacher_row`, int64 `[R_S]`."""
    found, no, nowhere = _Found(), np.zeros(len(teacher_row), dtype=bool), np.full(len(teacher_row), -1)
    found.add(teacher_row, no, no, no, nowhere, nowhere)
    return found.rows()


class PrefixRowFinder:
    """Finds the `PrefixRows` of batches of one pair of tokenizers."""

    def __init__(self, student: Encoder, teacher: Encoder):
        self.student, self.teacher = student, teacher
        self.states: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # what `continued` has found

    @cached_property
    def student_search(self) -> PrefixSearch:
        return PrefixSearch(self.student.forms)

    @cached_property
    def teacher_search(self) -> PrefixSearch:
        return PrefixSearch(self.teacher.forms)

    def __call__(self, student, teacher) -> PrefixRows:
        """Of a batch's two sides, `modeling.text.batch.Side`."""
        batch = _Found()
        starts = [np.cumsum([0, *side.lengths]) for side in (teacher, student)]
        for example, ends in enumerate(zip(teacher.byte_ends, student.byte_ends)):
            labels = [side.labels[n[example] : n[example + 1]].numpy() for side, n in zip((teacher, student), starts)]
            first = [side.byte_starts[example] for side in (teacher, student)]
            self._find(batch, *labels, *ends, *first, int(starts[0][example]))
        return batch.rows()

    def _find(
        self, batch: _Found, teacher_ids, student_ids, teacher_ends, student_ends, t_first, s_first, first_row: int
    ) -> None:
        """Adds one response, whose first teacher token is row `first_row`; see `Side` for the others."""
        t_start, t_fits = _starts(self.teacher, teacher_ids, teacher_ends, t_first)
        s_start, s_fits = _starts(self.student, student_ids, student_ends, s_first)
        at = np.searchsorted(teacher_ends, s_start, side="right")
        inside = at < len(teacher_ids)
        at[~inside] = 0
        usable = inside & (t_start[at] <= s_start)
        usable &= aligned_tokens(teacher_ends, student_ends, *byte_groups(teacher_ends, student_ends))
        interior = usable & (t_start[at] < s_start)
        spanning = usable & (teacher_ends[at] < student_ends)
        usable &= (t_fits[at] | ~interior) & (s_fits | ~spanning)
        # A special token is none of those that go on from a beginning: nothing of it moves on.
        moves_on = usable & ~(interior & self.teacher.forms.is_special[teacher_ids[at]])
        interior, spanning = interior & usable, spanning & moves_on

        forms, student_forms = self.teacher.forms.forms, self.student.forms.forms
        source = np.full(len(student_ids), -1)
        for j in np.flatnonzero(interior):
            form, cut = forms[teacher_ids[at[j]]], s_start[j] - t_start[at[j]]
            batch.continued.add(form[:cut], self._continued)
            source[j] = self.student_search.longest(form[cut:])
        last = np.searchsorted(teacher_ends, student_ends - 1, side="right")
        for j in np.flatnonzero(spanning):
            for k in range(at[j] + 1, last[j]):
                batch.link(first_row + k, j, int(teacher_ids[k]), lambda token: (np.array([token]),))
            left = student_forms[student_ids[j]][t_start[last[j]] - s_start[j] :]
            batch.link(first_row + last[j], j, left, self._beginning_with)
        white = [len(form) > 0 and not form.strip(b" \t") for form in (student_forms[u] for u in student_ids)]
        label = np.where(spanning, student_ids, -1)
        batch.add(np.where(usable, first_row + at, -1), np.array(white), interior, spanning, source, label)

    def _beginning_with(self, prefix: bytes) -> tuple[np.ndarray]:
        lo, hi = self.teacher_search.beginning_with(prefix)
        return (self.teacher_search.order[lo:hi],)

    def _continued(self, prefix: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The teacher tokens that begin with `prefix` and are longer, and where the rest of each goes."""
        if prefix not in self.states:
            if len(self.states) == KEPT_STATES:
                self.states.clear()
            search = self.teacher_search
            lo, hi = search.beginning_with(prefix)
            starts, stops = search.starts[lo:hi], search.starts[lo + 1 : hi + 1]
            longer = stops - starts > len(prefix)
            starts, stops, tokens = starts[longer], stops[longer], search.order[lo:hi][longer]
            target = self.student_search.longest_in(search.data, starts + len(prefix), stops)
            self.states[prefix] = tokens, target.astype(np.int64)
        return self.states[prefix]


def _starts(encoder: Encoder, ids: np.ndarray, ends: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """`(starts, fits)`, `[n]` each: where each token begins, and whether its form is as long as what it covers.

    The first begins at byte `first` of the response, or before it.
    """
    starts = np.concatenate([[first], ends[:-1]]).astype(np.int64)
    return starts, ends - starts == encoder.forms.lengths[ids]


class _Sets:
    """`TokenSets` in the making: sets with equal keys are stored once."""

    def __init__(self):
        self.places: dict = {}
        self.first: list[int] = []
        self.size: list[int] = []
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.total = 0

    def add(self, key, make) -> None:
        """One more set: `make(key)` gives its arrays, of equal lengths, the first its tokens."""
        if key not in self.places:
            arrays = make(key)
            self.places[key] = self.total, len(arrays[0])
            self.parts.append(arrays)
            self.total += len(arrays[0])
        first, size = self.places[key]
        self.first.append(first)
        self.size.append(size)

    def column(self, place: int) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int64), *(part[place] for part in self.parts)])

    def of_rows(self, rows: list[int] | np.ndarray) -> TokenSets:
        columns = [np.array(values, dtype=np.int64) for values in (rows, self.first, self.size)]
        return TokenSets(*map(torch.from_numpy, (*columns, self.column(0))), np.cumsum([0, *self.size]))


class _Found:
    """The `PrefixRows` of a batch in the making."""

    def __init__(self):
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.n_rows = 0
        self.continued, self.links = _Sets(), _Sets()
        self.teacher_rows: list[int] = []  # of the links, as the next
        self.spanning_rows: list[int] = []

    def link(self, teacher_row: int, j: int, key, make) -> None:
        self.links.add(key, make)
        self.teacher_rows.append(teacher_row)
        self.spanning_rows.append(self.n_rows + j)

    def add(self, *columns: np.ndarray) -> None:
        self.columns.append(columns)
        self.n_rows += len(columns[0])

    def rows(self) -> PrefixRows:
        nothing = [np.zeros(0, dtype=kind) for kind in (np.int64, bool, bool, bool, np.int64, np.int64)]
        columns = [np.concatenate(parts) for parts in zip(nothing, *self.columns)]
        teacher_row, white_space, interior, spanning, source, label = columns
        interior_rows = np.flatnonzero(interior)
        ids = source, label, self.continued.column(1)
        # The last one stands for −1.
        is_reached = np.zeros(1 + max(int(part.max(initial=-1)) for part in ids) + 1, dtype=bool)
        for part in ids:
            is_reached[part] = True
        is_reached[-1] = False
        place = np.where(is_reached, np.cumsum(is_reached) - 1, -1)
        tensors = (*columns[:4], np.flatnonzero(is_reached), *(place[part] for part in ids))
        *tensors, target = map(torch.from_numpy, tensors)
        return PrefixRows(
            *tensors,
            continued=self.continued.of_rows(interior_rows),
            target=target,
            links=self.links.of_rows(self.teacher_rows),
            spanning_row=torch.tensor(self.spanning_rows, dtype=torch.int64),
            interior_rows=interior_rows,
            n_covered=int((teacher_row >= 0).sum()),
            n_white_space=int(((teacher_row >= 0) & white_space).sum()),
            n_spanning=int(spanning.sum()),
        )
