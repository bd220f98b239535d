"""Byte-prefix marginalization of one response, from its definition: slow, in float64, sharing no code with the project.

A side is its vocabulary (bytes of each token, special flags, byte-fallback flags), its EOS, the ids of the response's
tokens, and the byte at which each ends. Logits are `[tokens, vocabulary]`, row j predicting token j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_MASS = 1e-9
REST_FLOOR = 1e-12  # of p[⊥]
KNOWN: dict = {}  # what depends on two vocabularies alone, by the identity of both lists of forms, which are kept here


@dataclass
class Side:
    forms: list[bytes]
    special: list[bool]
    fallback: list[bool]
    eos: int
    ids: list[int]
    ends: list[int]
    start: int = 0  # where the first of them begins

    def starts(self) -> list[int]:
        """Where each token begins."""
        return [self.start, *self.ends[:-1]]

    def tells_its_bytes(self, i: int) -> bool:
        return len(self.forms[self.ids[i]]) == self.ends[i] - self.starts()[i]

    def candidates(self) -> list[int]:
        """The tokens of text, in the order of preference of equal ones."""
        ids = [v for v, form in enumerate(self.forms) if form and not self.special[v]]
        return sorted(ids, key=lambda v: (self.fallback[v], v))

    def preferred(self) -> dict[bytes, int]:
        """The token that each form is written with."""
        found: dict[bytes, int] = {}
        for v in self.candidates():
            found.setdefault(self.forms[v], v)
        return found


def longest(preferred: dict[bytes, int], text: bytes) -> int | None:
    for length in range(len(text), 0, -1):
        if text[:length] in preferred:
            return preferred[text[:length]]
    return None


def softmax(row: Tensor, temperature: float) -> Tensor:
    powers = torch.exp(row.double() / temperature)
    return powers / powers.sum()


def covers_the_same_bytes(teacher: Side, student: Side, j: int) -> bool:
    """Is s_j in a group of the exact alignment that covers the same bytes on both sides?"""
    common = sorted(set(teacher.ends) & set(student.ends))
    if teacher.ends[-1] == student.ends[-1]:
        return True
    # What follows the last common end belongs to the group that ends there.
    return len(common) > 1 and student.ends[j] <= common[-2]


@dataclass
class Row:
    """Of one student token: q of every student token, q of ⊥, and what kind of row it is."""

    q: Tensor
    rest: float
    interior: bool
    spanning: bool


class Pair:
    """The text tokens of two vocabularies, and which student token each piece of the teacher's bytes goes to."""

    def __init__(self, teacher: Side, student: Side):
        self.preferred, self.candidates = student.preferred(), teacher.candidates()
        self.found: dict[bytes, int] = {}
        self.nowhere = len(student.forms)  # ⊥ stands behind the student's tokens
        # Whole teacher tokens. EOS goes to EOS, other special tokens go nowhere.
        self.whole = torch.full((len(teacher.forms),), self.nowhere)
        self.whole[self.candidates] = torch.tensor([self.phi(teacher.forms[v]) for v in self.candidates])
        self.whole[teacher.eos] = student.eos

    def phi(self, form: bytes) -> int:
        if form not in self.found:
            token = longest(self.preferred, form)
            self.found[form] = self.nowhere if token is None else token
        return self.found[form]


def pair_of(teacher: Side, student: Side) -> Pair:
    key = id(teacher.forms), teacher.eos, id(student.forms), student.eos
    if key not in KNOWN:
        KNOWN[key] = Pair(teacher, student), teacher.forms, student.forms
    return KNOWN[key][0]


def target(teacher: Side, student: Side, p: list[Tensor], j: int, spanning: bool):
    """The `Row` of s_j, where `p` are the teacher's rows; "no row" where the text has none; "no mass" where π is too
    small."""
    pair = pair_of(teacher, student)
    starts, begin, end = teacher.starts(), student.starts()[j], student.ends[j]
    at = [i for i in range(len(teacher.ids)) if starts[i] <= begin < teacher.ends[i]]
    if not at or not covers_the_same_bytes(teacher, student, j):
        return "no row"
    i = at[0]
    c = teacher.forms[teacher.ids[i]][: begin - starts[i]]
    interior, reaches_over = begin > starts[i], end > teacher.ends[i]
    if (interior and not teacher.tells_its_bytes(i)) or (reaches_over and not student.tells_its_bytes(j)):
        return "no row"

    if interior:
        taking_part = [v for v in pair.candidates if teacher.forms[v].startswith(c) and teacher.forms[v] != c]
        weight = p[i][taking_part]
        if weight.sum() < LEAST_MASS:
            return "no mass"
        weight = weight / weight.sum()
        goes_to = torch.tensor([pair.phi(teacher.forms[v][len(c) :]) for v in taking_part])
    else:
        taking_part, weight, goes_to = range(len(teacher.forms)), p[i], pair.whole
    q = torch.zeros(len(student.forms) + 1, dtype=torch.float64).index_add(0, goes_to, weight)

    said = teacher.ids[i]
    reaches_over = reaches_over and said in taking_part
    if spanning and reaches_over:
        last = next(k for k in range(len(teacher.ids)) if starts[k] < end <= teacher.ends[k])
        left = student.forms[student.ids[j]][starts[last] - begin :]
        x = weight[taking_part.index(said)].item()
        for k in range(i + 1, last):
            x *= p[k][teacher.ids[k]].item()
        x *= p[last][[v for v in pair.candidates if teacher.forms[v].startswith(left)]].sum().item()
        source = goes_to[taking_part.index(said)]
        x = min(x, q[source].item())
        q[source] -= x
        q[student.ids[j]] += x
    return Row(q[:-1], q[-1].item(), interior, reaches_over)


def kl(p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    return (p[some] * (torch.log(p[some]) - torch.log(q[some]))).sum()


def jsd(q: Tensor, p: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q.clamp(min=1e-12))
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def bpm(
    teacher: Side,
    student: Side,
    z_teacher: Tensor,
    z_student: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    spanning: bool = True,
    mask_whitespace: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """KD_j of every student token, differentiable, and the sums of what is logged."""
    sums = {"residual_mass": 0.0, "residual_mass, of": 0, "interior": 0, "spanning": 0, "dropped": 0}
    values, rows = [], [softmax(row, temperature) for row in z_teacher]
    for j, u in enumerate(student.ids):
        row = target(teacher, student, rows, j, spanning)
        form = student.forms[u]
        masked = mask_whitespace and form != b"" and set(form) <= set(b" \t")
        if isinstance(row, Row):
            sums["interior"] += row.interior
            sums["spanning"] += row.spanning
        elif row == "no mass":
            sums["interior"] += 1
        if row != "no row" and not masked:
            sums["residual_mass"] += row.rest if isinstance(row, Row) else 1.0
            sums["residual_mass, of"] += 1
        if masked or not isinstance(row, Row):
            sums["dropped"] += 1
            values.append(z_student[j].double().sum() * 0)
            continue
        p = softmax(z_student[j], temperature)
        has_mass = row.q > 0
        rest = p[~has_mass].sum().clamp(min=REST_FLOOR)  # 1 − Σ over the tokens with q > 0
        q = torch.cat([row.q[has_mass], torch.tensor([row.rest], dtype=torch.float64)])
        values.append(temperature**2 * jsd(q, torch.cat([p[has_mass], rest[None]]), beta))
    return torch.stack(values), sums
