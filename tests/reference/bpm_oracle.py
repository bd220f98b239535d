"""Byte-prefix marginalization of one response, from its definition: slow, in float64, sharing no code with the project.

A side is its vocabulary (bytes of each token, special flags, byte-fallback flags), its EOS, the ids of the response's
tokens, and the byte at which each ends. Logits are `[tokens, vocabulary]`, row j predicting token j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_MASS = 1e-9
REST_FLOOR = 1e-12  # of p[⊥]


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
    """Of one student token: q of student tokens, q of ⊥, and what kind of row it is."""

    q: dict[int, float]
    rest: float
    interior: bool
    spanning: bool


def target(teacher: Side, student: Side, z_teacher: Tensor, j: int, temperature: float, spanning: bool, memo: dict):
    """The `Row` of s_j; "no row" where the text has none; "no mass" where π is too small."""
    if "preferred" not in memo:
        memo["preferred"], memo["candidates"] = student.preferred(), teacher.candidates()
        memo["p"] = [softmax(row, temperature).tolist() for row in z_teacher]
        memo["phi"] = {}
    starts, begin, end = teacher.starts(), student.starts()[j], student.ends[j]
    at = [i for i in range(len(teacher.ids)) if starts[i] <= begin < teacher.ends[i]]
    if not at or not covers_the_same_bytes(teacher, student, j):
        return "no row"
    i = at[0]
    c = teacher.forms[teacher.ids[i]][: begin - starts[i]]
    interior, reaches_over = begin > starts[i], end > teacher.ends[i]
    if (interior and not teacher.tells_its_bytes(i)) or (reaches_over and not student.tells_its_bytes(j)):
        return "no row"

    def phi(form: bytes) -> int | None:
        if form not in memo["phi"]:
            memo["phi"][form] = longest(memo["preferred"], form)
        return memo["phi"][form]

    p, goes_to, weight = memo["p"][i], {}, {}
    if interior:
        taking_part = [v for v in memo["candidates"] if teacher.forms[v].startswith(c) and teacher.forms[v] != c]
        mass = sum(p[v] for v in taking_part)
        if mass < LEAST_MASS:
            return "no mass"
        for v in taking_part:
            weight[v], goes_to[v] = p[v] / mass, phi(teacher.forms[v][len(c) :])
    else:
        if "boundary" not in memo:
            memo["boundary"] = {v: phi(teacher.forms[v]) for v in memo["candidates"]} | {teacher.eos: student.eos}
        weight, goes_to = dict(enumerate(p)), memo["boundary"]
    q: dict[int | None, float] = {None: 0.0}
    for v, mass in weight.items():
        u = goes_to.get(v)  # other special tokens go nowhere
        q[u] = q.get(u, 0.0) + mass

    said = teacher.ids[i]
    reaches_over = reaches_over and said in weight
    if spanning and reaches_over:
        last = next(k for k in range(len(teacher.ids)) if starts[k] < end <= teacher.ends[k])
        left = student.forms[student.ids[j]][starts[last] - begin :]
        x = weight[said]
        for k in range(i + 1, last):
            x *= memo["p"][k][teacher.ids[k]]
        x *= sum(memo["p"][last][v] for v in memo["candidates"] if teacher.forms[v].startswith(left))
        source = goes_to.get(said)
        x = min(x, q[source])
        q[source] -= x
        q[student.ids[j]] = q.get(student.ids[j], 0.0) + x
    rest = q.pop(None)
    return Row(q, rest, interior, reaches_over)


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
    values, memo = [], {}
    for j, u in enumerate(student.ids):
        row = target(teacher, student, z_teacher, j, temperature, spanning, memo)
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
        ids = [u for u, mass in row.q.items() if mass > 0]
        of_ids = p[ids]
        others = torch.ones(len(p), dtype=torch.bool)
        others[ids] = False
        rest = p[others].sum().clamp(min=REST_FLOOR)  # 1 − Σ over the tokens with q > 0
        q = torch.tensor([*(row.q[u] for u in ids), row.rest], dtype=torch.float64)
        values.append(temperature**2 * jsd(q, torch.cat([of_ids, rest[None]]), beta))
    return torch.stack(values), sums
