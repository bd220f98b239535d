"""Strict, GOLD, SimCT and ALM for one example, from their definitions: slow, in float64, sharing no code with the
project.

Units are found from the bytes at which tokens end, and pairs of tokens from their bytes. Each function gives
`Σ (student tokens that a unit covers) × (its divergence)`, differentiable with respect to the student's logits, and the
sums that are logged, `{name: (sum, count)}`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = torch.zeros((), dtype=torch.float64)
PAIRS: dict = {}  # what `pairs` has found, by the identity of both lists of forms, which are kept beside it


@dataclass
class Side:
    """One side of an example.

    Attributes:
        forms: the bytes of every token, by id.
        special: which of them are special.
        fallback: which of them are bytes that text is written with only where there is no other token.
        roles: of EOS, BOS …, the ids.
        tokens: of the response.
        ends: the byte of the response at which each token ends.
        logits: of each token `[len(forms)]`, those that predict it.
        start: the byte at which the first of them begins.
    """

    forms: list[bytes]
    special: list[bool]
    fallback: list[bool]
    roles: dict[str, int]
    tokens: list[int]
    ends: list[int]
    logits: tuple[Tensor, ...]
    start: int = 0

    def log_p(self, row: int, temperature: float = 1.0) -> Tensor:
        return log_softmax(self.logits[row].double() / temperature)

    def own(self, row: int, temperature: float = 1.0) -> Tensor:
        return self.log_p(row, temperature)[self.tokens[row]]


def pairs(teacher: Side, student: Side, special: bool = False) -> Tensor:
    """`[pairs, 2]`: teacher id, student id, of equal bytes; of several ids of a side, the one text is written with."""
    known = PAIRS.setdefault((id(teacher.forms), id(student.forms)), (teacher.forms, student.forms, {}))[-1]
    if special not in known:
        known[special] = torch.tensor(_pairs(teacher, student, special), dtype=torch.long).view(-1, 2)
    return known[special]


def _pairs(teacher: Side, student: Side, special: bool) -> list[tuple[int, int]]:
    role_pairs, taken = [], (set(), set())
    for role in ("eos", "bos", "pad", "unk"):
        v, u = teacher.roles.get(role), student.roles.get(role)
        if v is not None and u is not None and v not in taken[0] and u not in taken[1]:
            role_pairs.append((v, u))
            taken[0].add(v)
            taken[1].add(u)
    first = []
    for side, used in zip((teacher, student), taken):
        ids: dict[tuple[bytes, bool], int] = {}
        for by_fallback in (False, True):
            for i, form in enumerate(side.forms):
                if form and i not in used and side.fallback[i] == by_fallback:
                    ids.setdefault((form, side.special[i]), i)
        first.append(ids)
    found = [(v, first[1][key]) for key, v in first[0].items() if key in first[1]] + role_pairs
    return sorted(found if special else [(v, u) for v, u in found if not (teacher.special[v] or student.special[u])])


def units(teacher: Side, student: Side) -> list[tuple[list[int], list[int]]]:
    """Teacher and student positions that cover the same bytes, as few as can be, without special tokens."""
    found, start = [], 0
    for end in sorted(set(teacher.ends) & set(student.ends)):
        found.append([[i for i, e in enumerate(side.ends) if start < e <= end] for side in (teacher, student)])
        start = end
    if found and teacher.ends[-1] != student.ends[-1]:
        found.pop()  # what follows the last common end belongs to it
    if teacher.start != student.start:
        found = found[1:]

    def is_text(side: Side, positions: list[int]) -> bool:
        return not any(side.special[side.tokens[k]] for k in positions)

    return [(i, j) for i, j in found if is_text(teacher, i) and is_text(student, j)]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (torch.exp(log_p) * (log_p - log_q)).sum()


def log_softmax(scores: Tensor) -> Tensor:
    return scores - torch.log(torch.exp(scores - scores.max().detach()).sum()) - scores.max().detach()


def strict(
    teacher: Side, student: Side, topk: int, temperature: float, divergence: str = "reverse", span_weight: float = 0.0
) -> tuple[Tensor, dict]:
    shared, total, sums = pairs(teacher, student), ZERO, dict.fromkeys(("shared", "t shared", "topk", "t topk"), 0.0)
    n_units = 0
    for i, j in units(teacher, student):
        if len(i) == len(j) == 1:
            by_student = student.logits[j[0]][shared[:, 1]].sort(descending=True, stable=True).indices
            chosen = shared[by_student[:topk]] if topk else shared
            log_s, log_t = (
                log_softmax(side.logits[row].double()[chosen[:, place]] / temperature)
                for side, row, place in ((student, j[0], 1), (teacher, i[0], 0))
            )
            if divergence == "forward":
                value = kl(log_t, log_s)
            elif divergence == "reverse":
                value = kl(log_s, log_t)
            else:
                log_m = torch.log((torch.exp(log_s) + torch.exp(log_t)) / 2)
                value = (kl(log_s, log_m) + kl(log_t, log_m)) / 2
            total = total + temperature**2 * value
            n_units += 1
            p, q = torch.exp(student.log_p(j[0]).detach()), torch.exp(teacher.log_p(i[0]))
            for name, some in (("shared", shared), ("topk", chosen)):
                sums[name] += p[some[:, 1]].sum().item()
                sums[f"t {name}"] += q[some[:, 0]].sum().item()
        else:
            difference = sum(student.own(k) for k in j) - sum(teacher.own(k) for k in i)
            total = total + len(j) * span_weight * difference**2
    names = ("shared_mass", "teacher_shared_mass", "topk_mass", "teacher_topk_mass")
    means = {name: (value, n_units) for name, value in zip(names, sums.values())}
    means["coverage"] = (n_units, len(student.tokens))
    means["teacher_coverage"] = (n_units, len(teacher.tokens))
    return total, means


def gold(
    teacher: Side,
    student: Side,
    temperature: float,
    beta: float = 0.5,
    hybrid: bool = True,
    matched_weight: float | None = None,
) -> tuple[Tensor, dict]:
    matched = pairs(teacher, student, special=True) if hybrid else torch.zeros(0, 2, dtype=torch.long)
    weight = len(matched) / len(teacher.forms) if matched_weight is None else matched_weight
    others = [torch.ones(len(side.forms), dtype=torch.bool) for side in (teacher, student)]
    for place, of_side in enumerate(others):
        of_side[matched[:, place]] = False
    total, sums, covered = ZERO, {"jsd_loss": 0.0, "l1_loss": 0.0}, 0
    for i, j in units(teacher, student):
        merged = []
        for side, rows in ((teacher, i), (student, j)):
            p = torch.exp(side.log_p(rows[-1], temperature))
            for row in rows[:-1]:
                p = p * torch.exp(side.own(row, temperature))
            merged.append(p)
        t, s = (p[matched[:, place]].clamp(min=1e-8) for place, p in enumerate(merged))
        if beta == 0:
            jsd = (t * torch.log(t / s)).sum()
        elif beta == 1:
            jsd = (s * torch.log(s / t)).sum()
        else:
            m = beta * t + (1 - beta) * s
            jsd = (beta * t * torch.log(t / m) + (1 - beta) * s * torch.log(s / m)).sum()
        t, s = (torch.sort(p[of_side], descending=True).values for p, of_side in zip(merged, others))
        n = min(len(t), len(s))
        l1 = (t[:n] - s[:n]).abs().sum() + t[n:].sum() + s[n:].sum()
        total = total + len(j) * (weight * jsd + (1 - weight) * l1)
        covered += len(j)
        sums["jsd_loss"] += len(j) * jsd.item()
        sums["l1_loss"] += len(j) * l1.item()
    n = len(student.tokens)
    means = {name: (value, 1) for name, value in sums.items()}
    return total, means | {"coverage": (covered, n)}


def simct(teacher: Side, student: Side, temperature: float) -> tuple[Tensor, dict]:
    shared, total, covered, spans, shares = pairs(teacher, student), ZERO, 0, 0, [0.0, 0.0]
    for i, j in units(teacher, student):
        log_pi = []
        for place, side, rows in ((0, teacher, i), (1, student, j)):
            scores = side.log_p(rows[0])[shared[:, place]]
            if not len(i) == len(j) == 1:
                own = sum(side.own(row) for row in rows) / len(rows)
                scores = torch.cat([scores, own[None]])
            log_pi.append(log_softmax(scores / temperature))
        total = total + len(j) * temperature**2 * kl(log_pi[1], log_pi[0])
        covered += len(j)
        if not len(i) == len(j) == 1:
            spans += 1
            shares = [share + math.exp(log[-1].item()) for share, log in zip(shares, log_pi)]
    names = ("teacher_span_share", "span_share")
    means = {name: (share, spans) for name, share in zip(names, shares)}
    return total, means | {"coverage": (covered, len(student.tokens))}


def alm(
    teacher: Side, student: Side, debias: str = "space", threshold: float = 0.1, temperature: float = 100.0
) -> tuple[Tensor, dict]:
    white_space = (b" ", b"\t", b"\n", b"\r", b"\v", b"\f")
    cuts = [
        torch.tensor(
            [form[:1] in white_space and not special for form, special in zip(side.forms, side.special)]
        ).index_fill(0, torch.tensor(side.roles["eos"]), True)
        for side in (teacher, student)
    ]

    def boundary(place: int, rows: list[int]) -> Tensor | None:
        """ln of the probability that the text may be cut behind these rows; None where no row follows."""
        side = (teacher, student)[place]
        if rows[-1] + 1 == len(side.tokens):
            return None
        return torch.log(torch.exp(side.log_p(rows[-1] + 1))[cuts[place]].sum())

    found, chunks = units(teacher, student), []
    for number, (i, j) in enumerate(found):
        follows = number and found[number - 1][1][-1] + 1 == j[0]
        joined = False
        if debias == "space" and follows:
            log_space = boundary(0, found[number - 1][0])
            joined = torch.exp(log_space).item() <= threshold
        if joined:
            chunks[-1] = (chunks[-1][0] + i, chunks[-1][1] + j)
        else:
            chunks.append((i, j))
    total, covered = ZERO, 0
    for chunk in chunks:
        powers = []
        for place, (side, rows) in enumerate(zip((teacher, student), chunk)):
            log_likelihood = sum(side.own(row) for row in rows)
            after = boundary(place, rows) if debias == "space" else None
            powers.append((log_likelihood + (ZERO if after is None else after)) / temperature - 1e-6)
        p, q = torch.exp(powers[0]), torch.exp(powers[1])
        value = p * (torch.log(p) - torch.log(q)) + (1 - p) * (torch.log(1 - p) - torch.log(1 - q))
        total = total + len(chunk[1]) * value
        covered += len(chunk[1])
    return total, {"coverage": (covered, len(student.tokens)), "chunk_tokens": (covered, len(chunks))}
