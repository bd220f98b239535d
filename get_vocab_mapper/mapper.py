"""A vocabulary mapper: which student token a teacher token stands for, and back.

It holds a static map in both directions (-1 is "none"; 0 is an id like any other) and, for the contextual step of CDM,
the similar tokens of every token that has no exact match.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from get_vocab_mapper.token_forms import TokenForms

KINDS = ("em", "mined", "prefixem", "published")
DEFAULT_THRESHOLD = 0.3

_SCRIPTS = {"em": "get_em_mapper.py", "mined": "get_MinED_mapper.py", "prefixem": "get_prefixEM_mapper.py"}


def build_command(
    kind: str,
    output: str | os.PathLike,
    teacher_forms: TokenForms | None = None,
    student_forms: TokenForms | None = None,
    threshold: float | str = DEFAULT_THRESHOLD,
) -> str:
    """The command line that builds a mapper (of kind "em" where a kind has no script), for messages."""
    words = ["python", f"get_vocab_mapper/{_SCRIPTS.get(kind, _SCRIPTS['em'])}"]
    words += ["--teacher", "TEACHER" if teacher_forms is None else teacher_forms.name]
    words += ["--student", "STUDENT" if student_forms is None else student_forms.name]
    words += ["--output", str(output)]
    if str(threshold) != str(DEFAULT_THRESHOLD):
        words += ["--simi_threshold", str(threshold)]
    return shlex.join(words)


def check_threshold(threshold: float) -> None:
    """Raises ValueError where θ is no share of a length."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"The similarity threshold must be between 0 and 1, and is {threshold}.")


@dataclass(frozen=True)
class Side:
    """What a mapper remembers of one of its tokenizers."""

    name: str
    vocab_size: int
    fingerprint: str

    @classmethod
    def of(cls, forms: TokenForms) -> "Side":
        return cls(forms.name, len(forms), forms.fingerprint)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.vocab_size} tokens)"


@dataclass(frozen=True)
class Direction:
    """The map from one side's V tokens to the other side's.

    The similar tokens of each token are a row of a sparse matrix (CSR).

    Attributes:
        static: int32 [V], an id of the other side or -1.
        indptr: int32 [V + 1]; row v is `indices[indptr[v]:indptr[v + 1]]`.
        indices: int32 [pairs], ids of the other side; each row by growing distance, then growing id.
        distances: float32 [pairs], normalised Levenshtein distances.
    """

    static: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    distances: np.ndarray

    def row(self, token_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and the distances of one token's similar tokens."""
        span = slice(self.indptr[token_id], self.indptr[token_id + 1])
        return self.indices[span], self.distances[span]

    def below(self, threshold: float) -> "Direction":
        """The same map without the similar pairs at `threshold` or beyond."""
        return self._keeping(self.distances < np.float32(threshold))

    def _keeping(self, keep: np.ndarray) -> "Direction":
        kept_before = np.concatenate(([0], np.cumsum(keep)))
        indptr = kept_before[self.indptr].astype(np.int32)
        return replace(self, indptr=indptr, indices=self.indices[keep], distances=self.distances[keep])

    def with_ends(self, stop_ids: Sequence[int], other_stop_ids: Sequence[int]) -> "Direction":
        """The same map, in which this side's stop tokens map to the first of the other's, and nothing else to any."""
        stop_ids, other_stop_ids = list(stop_ids), list(other_stop_ids)
        static = np.where(np.isin(self.static, other_stop_ids), np.int32(-1), self.static)
        static[stop_ids] = other_stop_ids[0]
        rows = np.repeat(np.arange(len(static)), np.diff(self.indptr))
        keep = ~(np.isin(rows, stop_ids) | np.isin(self.indices, other_stop_ids))
        return replace(self._keeping(keep), static=static)


@dataclass(frozen=True)
class VocabMapper:
    """A vocabulary mapper between a teacher (V_T tokens) and a student (V_S tokens).

    Attributes:
        kind: "em", "mined", "prefixem", or "published" for a file in the layout of the published scripts.
        threshold: θ, between 0 and 1; the directions hold the similar pairs at a distance below it.
        teacher, student: the tokenizers that it was built for.
        to_student: from the V_T teacher ids to student ids.
        to_teacher: from the V_S student ids to teacher ids.
    """

    kind: str
    threshold: float
    teacher: Side
    student: Side
    to_student: Direction
    to_teacher: Direction

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}")
        check_threshold(self.threshold)

    def with_threshold(self, threshold: float) -> "VocabMapper":
        """The mapper with a smaller θ.

        Raises:
            ValueError: `threshold` is above the mapper's own; the pairs between the two were never stored.
        """
        if threshold > self.threshold:
            raise ValueError(f"The mapper holds similar tokens below {self.threshold} only, none up to {threshold}.")
        if threshold == self.threshold:
            return self
        to_student, to_teacher = self.to_student.below(threshold), self.to_teacher.below(threshold)
        return replace(self, threshold=threshold, to_student=to_student, to_teacher=to_teacher)

    def mutual_pairs(self, special: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that the map sends to each other in both directions: each stands in one pair at most.

        Args:
            special: bool [V_T] and [V_S] (`TokenForms.is_special`): pairs with such a token are left out. None keeps
                all, those of equal roles (EOS …) too.

        Returns:
            int64 [n] each: teacher ids, growing, and the student id of each.
        """
        teacher_ids = np.flatnonzero(self.to_student.static >= 0)
        student_ids = self.to_student.static[teacher_ids].astype(np.int64)
        keep = self.to_teacher.static[student_ids] == teacher_ids
        if special is not None:
            keep &= ~(special[0][teacher_ids] | special[1][student_ids])
        return teacher_ids[keep], student_ids[keep]

    def with_ends(self, teacher_stop_ids: Sequence[int], student_stop_ids: Sequence[int]) -> "VocabMapper":
        """The mapper for two models whose stop tokens are known: they match each other by role, whatever their text.

        A file is made for tokenizers, which declare one EOS; a run's models and chat templates name the others.

        Args:
            teacher_stop_ids, student_stop_ids: of each side, the token that its responses end with first.
        """
        return replace(
            self,
            to_student=self.to_student.with_ends(teacher_stop_ids, student_stop_ids),
            to_teacher=self.to_teacher.with_ends(student_stop_ids, teacher_stop_ids),
        )

    def check_tokenizers(self, teacher_forms: TokenForms, student_forms: TokenForms, source: str) -> None:
        """Raises ValueError, naming the mapper's `source`, if either tokenizer is not the one that it was built for."""
        built_for, given = (self.teacher, self.student), (Side.of(teacher_forms), Side.of(student_forms))
        wrong = [
            f"the {role} is {here}, whose tokens differ"
            for role, here, there in zip(("teacher", "student"), given, built_for)
            if here.fingerprint != there.fingerprint
        ]
        if not wrong:
            return
        pair = f"the teacher tokenizer {self.teacher} and the student tokenizer {self.student}"
        command = build_command(self.kind, "NEW.safetensors", teacher_forms, student_forms, self.threshold)
        here, advice = f"and here {', '.join(wrong)}", "Give the mapper of this pair"
        if [side.fingerprint for side in given] == [side.fingerprint for side in reversed(built_for)]:
            here, advice = "which have changed places here", "Exchange the two models"
        raise ValueError(f"{source} was built for {pair}, {here}. {advice}, or build it: {command}")
