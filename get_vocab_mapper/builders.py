"""Build vocabulary mappers. `build_em`, `build_mined` and `build_prefixem` differ in the static map alone.

Two tokens match exactly
- if both tokenizers declare them for the same role: EOS first, then BOS, PAD, UNK. Role matches are one to one: a role
  is skipped where an earlier one has taken its token on either side, and a token that is matched by role takes part in
  no match by text;
- else if their forms are equal, and both are special or neither is. Where several ids of a side share a form, every id
  of the other side with that form maps to the one that text is written with: the first of them in
  `TokenForms.by_preference`. So every other id of that form has an exact match too, though nothing maps to it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from get_vocab_mapper.mapper import DEFAULT_THRESHOLD, Direction, Side, VocabMapper, check_threshold
from get_vocab_mapper.near_strings import nearest_strings, similar_strings
from get_vocab_mapper.prefix_search import PrefixSearch
from get_vocab_mapper.token_forms import ROLES, TokenForms


class Matches(NamedTuple):
    """A static map in both directions.

    Attributes:
        to_student: int32 [V_T], a student id or -1.
        to_teacher: int32 [V_S], a teacher id or -1.
    """

    to_student: np.ndarray
    to_teacher: np.ndarray


def build_em(
    teacher_forms: TokenForms, student_forms: TokenForms, threshold: float = DEFAULT_THRESHOLD, progress: bool = True
) -> VocabMapper:
    """EM: a token maps to its exact match, and to nothing without one.

    Args:
        teacher_forms, student_forms: both vocabularies.
        threshold: θ of the similar tokens, between 0 and 1.
        progress: show progress bars.
    """
    pair = _Pair(teacher_forms, student_forms)
    return pair.mapper("em", pair.exact, threshold, progress)


def build_mined(
    teacher_forms: TokenForms, student_forms: TokenForms, threshold: float = DEFAULT_THRESHOLD, progress: bool = True
) -> VocabMapper:
    """MinED: every other teacher token that is not special maps to the nearest student token.

    Nearest is the smallest Levenshtein distance between the texts, spaces kept; ties go to the smaller
    difference in length, then the longer common prefix (both in characters), then the first by preference.
    Special student tokens are no candidates. Source: FuseLLM, arXiv 2401.10491. Arguments as for `build_em`.
    """
    pair = _Pair(teacher_forms, student_forms)
    candidates = student_forms.by_preference[~student_forms.is_special[student_forms.by_preference]]
    static = pair.exact.to_student.copy()
    distance = np.zeros(len(teacher_forms), dtype=np.int64)
    if len(candidates):
        queries = _unmatched(teacher_forms, static)
        found = nearest_strings(
            [teacher_forms.texts[v] for v in queries],
            [student_forms.texts[u] for u in candidates],
            "nearest tokens" if progress else None,
        )
        static[queries] = candidates[found[:, 0]]
        distance[queries] = found[:, 1]
    return pair.mapper("mined", pair.with_inverse(static, distance), threshold, progress)


def build_prefixem(
    teacher_forms: TokenForms, student_forms: TokenForms, threshold: float = DEFAULT_THRESHOLD, progress: bool = True
) -> VocabMapper:
    """PrefixEM: every other teacher token maps to the longest student token that begins it, if there is one.

    That is the longest student form, in bytes, which is a proper prefix of the teacher's; the first id by preference
    where several share that form. Special and empty student tokens are no candidates. Arguments as for `build_em`.
    """
    pair = _Pair(teacher_forms, student_forms)
    static = pair.exact.to_student.copy()
    queries = _unmatched(teacher_forms, static)
    static[queries] = PrefixSearch(student_forms).longest_of_each([teacher_forms.forms[v][:-1] for v in queries])
    # All that map to one student token share the whole of it, so among them preference alone decides.
    no_cost = np.zeros(len(teacher_forms), dtype=np.int64)
    return pair.mapper("prefixem", pair.with_inverse(static, no_cost), threshold, progress)


BUILDERS = {"em": build_em, "mined": build_mined, "prefixem": build_prefixem}


def build_published(
    static: np.ndarray, teacher_forms: TokenForms, student_forms: TokenForms, threshold: float, progress: bool
) -> VocabMapper:
    """What the published layout holds, int32 [V_T], with its inverse and the similar tokens. Arguments as above."""
    pair = _Pair(teacher_forms, student_forms)
    distance = np.zeros(len(teacher_forms), dtype=np.int64)
    for v in np.flatnonzero(static >= 0):
        distance[v] = Levenshtein.distance(teacher_forms.texts[v], student_forms.texts[static[v]])
    return pair.mapper("published", Matches(static, pair.inverse(static, distance)), threshold, progress)


@dataclass(frozen=True)
class _Pair:
    """Two vocabularies and their exact matches: what every mapper between them is made from."""

    teacher: TokenForms
    student: TokenForms

    @cached_property
    def exact(self) -> Matches:
        return exact_matches(self.teacher, self.student)

    def inverse(self, static: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """For each student token, the teacher token that maps to it: exact, then lowest cost, then by preference.

        Args:
            static: int32 [V_T], the map to invert.
            cost: int64 [V_T].

        Returns:
            int32 [V_S], -1 where no teacher token maps to it.
        """
        mapped = self.teacher.by_preference[static[self.teacher.by_preference] >= 0]
        inexact = static[mapped] != self.exact.to_student[mapped]
        order = np.lexsort((cost[mapped], inexact))  # stable
        back = np.full(len(self.student), -1, dtype=np.int32)
        best_last = mapped[order[::-1]]
        back[static[best_last]] = best_last  # of several writes to one place the last one stays
        return back

    def with_inverse(self, static: np.ndarray, cost: np.ndarray) -> Matches:
        """The map with its `inverse`; a student token that has an exact match keeps it."""
        back = self.exact.to_teacher
        return Matches(static, np.where(back >= 0, back, self.inverse(static, cost)))

    def mapper(self, kind: str, static: Matches, threshold: float, progress: bool) -> VocabMapper:
        """The mapper of this static map, with the similar tokens."""
        check_threshold(threshold)
        v, u, rank, distances = _similar_pairs(self, threshold, progress)
        return VocabMapper(
            kind=kind,
            threshold=float(threshold),
            teacher=Side.of(self.teacher),
            student=Side.of(self.student),
            to_student=_direction(static.to_student, v, u, rank, distances),
            to_teacher=_direction(static.to_teacher, u, v, rank, distances),
        )


def exact_matches(teacher_forms: TokenForms, student_forms: TokenForms) -> Matches:
    """The exact match of every token of either side; the module's docstring says what an exact match is."""
    teacher_role, student_role = {}, {}
    for role in ROLES:
        v, u = teacher_forms.roles.get(role), student_forms.roles.get(role)
        if v is not None and u is not None and v not in teacher_role and u not in student_role:
            teacher_role[v], student_role[u] = u, v
    return Matches(
        to_student=_matches_of(teacher_forms, teacher_role, student_forms, student_role),
        to_teacher=_matches_of(student_forms, student_role, teacher_forms, teacher_role),
    )


def _matches_of(
    side: TokenForms, by_role: dict[int, int], other: TokenForms, other_by_role: dict[int, int]
) -> np.ndarray:
    matches = np.full(len(side), -1, dtype=np.int32)
    for special in (False, True):
        takes_part = other.is_special == special
        takes_part[list(other_by_role)] = False
        id_of_form = preferred_ids(other, takes_part)
        for v in np.flatnonzero(side.is_special == special):
            matches[v] = id_of_form.get(side.forms[v], -1)
    for v, u in by_role.items():
        matches[v] = u
    return matches


def preferred_ids(forms: TokenForms, takes_part: np.ndarray) -> dict[bytes, int]:
    """The first id by preference of each form, among those that take part (bool [V]). No text, b"", is left out."""
    preferred: dict[bytes, int] = {}
    for token_id in forms.by_preference[takes_part[forms.by_preference]].tolist():
        form = forms.forms[token_id]
        if form:
            preferred.setdefault(form, token_id)
    return preferred


def _unmatched(forms: TokenForms, matches: np.ndarray) -> np.ndarray:
    """Ids of the tokens that have no exact match and may be compared by their text."""
    return np.flatnonzero((matches < 0) & ~forms.is_special)


def _similar_pairs(
    pair: _Pair, threshold: float, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All similar pairs among the tokens without an exact match.

    Returns:
        int32 [pairs] teacher ids, student ids, and the rank of each pair's distance among the distinct
        distances; float32, the distinct distances in growing order.
    """
    # Tokens that differ in spaces alone (`the`, ` the`) share their distances, so each text is searched once.
    teacher_groups = _ids_by_text(pair.teacher, _unmatched(pair.teacher, pair.exact.to_student))
    student_groups = _ids_by_text(pair.student, _unmatched(pair.student, pair.exact.to_teacher))
    left, right, lev, total = similar_strings(
        teacher_groups.texts, student_groups.texts, threshold, "similar tokens" if progress else None
    )
    base = int(lev.max(initial=0)) + 1
    present, rank = np.unique(total.astype(np.int64) * base + lev, return_inverse=True)
    del lev, total
    fractions = (present % base) / np.maximum(present // base, 1)
    distances, rank_of_fraction = np.unique(fractions, return_inverse=True)
    rank = rank_of_fraction.astype(np.int32)[rank]

    left_count = teacher_groups.counts[left]
    right_count = student_groups.counts[right]
    copies = left_count * right_count
    pairs = int(copies.sum())
    if pairs > np.iinfo(np.int32).max:
        raise ValueError(f"{pairs} pairs of similar tokens are too many to store. Lower --simi_threshold.")
    nth = np.arange(pairs) - np.repeat(np.cumsum(copies) - copies, copies)
    width = np.repeat(right_count, copies)
    v = teacher_groups.ids[np.repeat(teacher_groups.starts[left], copies) + nth // width]
    u = student_groups.ids[np.repeat(student_groups.starts[right], copies) + nth % width]
    return v, u, np.repeat(rank, copies), distances.astype(np.float32)


@dataclass(frozen=True)
class _Groups:
    """Token ids grouped by spaceless text: group g is `ids[starts[g]:starts[g] + counts[g]]`."""

    texts: list[str]
    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def _ids_by_text(forms: TokenForms, ids: np.ndarray) -> _Groups:
    members: dict[str, list[int]] = {}
    for token_id in ids:
        members.setdefault(forms.spaceless[token_id], []).append(token_id)
    counts = np.fromiter(map(len, members.values()), dtype=np.int64, count=len(members))
    flat = np.array([token_id for group in members.values() for token_id in group], dtype=np.int32)
    return _Groups(texts=list(members), ids=flat, starts=np.cumsum(counts) - counts, counts=counts)


def _direction(
    static: np.ndarray, row: np.ndarray, column: np.ndarray, rank: np.ndarray, distances: np.ndarray
) -> Direction:
    """A static map with similar pairs (own id, other id, rank of the distance), sorted by row, distance and column."""
    # One integer holds all three keys: sorting it is many times faster than a sort over three arrays.
    column_bits = int(column.max(initial=0)).bit_length()
    rank_bits = len(distances).bit_length()
    key = row.astype(np.uint64) << np.uint64(rank_bits + column_bits)
    key |= rank.astype(np.uint64) << np.uint64(column_bits)
    key |= column.astype(np.uint64)
    key.sort()
    indices = (key & np.uint64((1 << column_bits) - 1)).astype(np.int32)
    key >>= np.uint64(column_bits)
    sorted_rank = (key & np.uint64((1 << rank_bits) - 1)).astype(np.int32)
    counts = np.bincount(row, minlength=len(static))
    return Direction(
        static=static,
        indptr=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        indices=indices,
        distances=distances[sorted_rank],
    )


def report(mapper: VocabMapper, teacher_forms: TokenForms, student_forms: TokenForms, examples: int = 10) -> str:
    """What the mapper holds, with examples, as text for a person to read."""
    exact = exact_matches(teacher_forms, student_forms)
    lines = [f"{mapper.kind} mapper, similar tokens below {mapper.threshold}"]
    for role, side, direction, matches in (
        ("teacher", mapper.teacher, mapper.to_student, exact.to_student),
        ("student", mapper.student, mapper.to_teacher, exact.to_teacher),
    ):
        mapped = int((direction.static >= 0).sum())
        row_lengths = np.diff(direction.indptr)
        lines += [
            f"{role} {side.name}: {side.vocab_size} tokens",
            f"  exact match: {int((matches >= 0).sum())}",
            f"  mapped: {mapped} ({100 * mapped / max(side.vocab_size, 1):.1f} %)",
            f"  with similar tokens: {int((row_lengths > 0).sum())}, pairs {len(direction.indices)}, "
            f"longest row {int(row_lengths.max(initial=0))}",
        ]

    def example(v: int, u: int, note: str = "") -> str:
        return f"  {v} {teacher_forms.texts[v]!r} -> {u} {student_forms.texts[u]!r}{note}"

    static, matches = mapper.to_student.static, exact.to_student
    lines.append("exact matches, for example:")
    lines += [example(v, static[v]) for v in _spread((matches >= 0) & (static == matches), examples)]
    others = _spread((static >= 0) & (static != matches), examples)
    if len(others):
        lines.append("other static entries, for example:")
    for v in others:
        distance = Levenshtein.distance(teacher_forms.texts[v], student_forms.texts[static[v]])
        lines.append(example(v, static[v], f"  (edit distance {distance})"))
    lines.append("similar tokens, the nearest of each, for example:")
    for v in _spread(np.diff(mapper.to_student.indptr) > 0, examples):
        ids, distances = mapper.to_student.row(v)
        lines.append(example(v, ids[0], f"  (distance {distances[0]:.3f}, of {len(ids)})"))
    return "\n".join(lines)


def _spread(chosen: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the ids where bool [V] is true, evenly spread: a vocabulary's first tokens are of one sort."""
    ids = np.flatnonzero(chosen)
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)]
