"""How two tokenizers meet on some rows: what can be said of a pair before any training, without its models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from get_vocab_mapper.builders import Matches
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder


@dataclass(frozen=True)
class PairFigures:
    """Of the response tokens of some examples.

    Attributes:
        matches: how many tokens of the student's vocabulary have an exact match in the teacher's.
        tokens: response tokens of the student and of the teacher, as are the next two pairs.
        matched: the shares of them that have an exact match.
        one_to_one: the shares of them in byte groups of one token a side.
        groups: how many byte groups have so many `(teacher, student)` tokens.
    """

    matches: int
    tokens: tuple[int, int]
    matched: tuple[float, float]
    one_to_one: tuple[float, float]
    groups: Counter[tuple[int, int]]

    @classmethod
    def of(cls, student: Encoder, teacher: Encoder, found: Matches, examples: Sequence[dict]) -> PairFigures:
        """Of prepared examples, of which one has a response at least, and the exact matches of the two tokenizers."""
        batch = ResponseCollator(student, teacher, "byte")(list(examples))
        sides = (batch.student, found.to_teacher), (batch.teacher, found.to_student)
        sizes = batch.groups.teacher.host_size, batch.groups.student.host_size
        alone = int(((sizes[0] == 1) & (sizes[1] == 1)).sum())
        tokens = len(batch.student.labels), len(batch.teacher.labels)
        return cls(
            matches=int((found.to_teacher >= 0).sum()),
            tokens=tokens,
            matched=tuple(float(np.mean(of_side[side.labels.numpy()] >= 0)) for side, of_side in sides),
            one_to_one=tuple(alone / n for n in tokens),
            groups=Counter(zip(*(side.tolist() for side in sizes))),
        )

    def __str__(self) -> str:
        (student, teacher), (s_matched, t_matched), (s_alone, t_alone) = self.tokens, self.matched, self.one_to_one
        return (
            f"{student:,} student and {teacher:,} teacher tokens; {self.matches:,} exact matches, which cover "
            f"{s_matched:.1%} and {t_matched:.1%} of them; {s_alone:.1%} and {t_alone:.1%} in groups of one token each"
        )
