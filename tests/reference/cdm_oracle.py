"""CDM (arXiv 2502.11104), step by step, for one example: slow, in float64, sharing no code with the project.

Tokens are strings, sets are Python sets and dictionaries, and nothing is done twice as fast as it reads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Side:
    """One side of an example.

    Attributes:
        vocabulary: the text of every token, by id; texts are distinct.
        tokens: the ids of the response, the last one being EOS.
        logits: float64 `[len(tokens), len(vocabulary)]`, row j predicting token j.
        match: token text → the other side's token text (exact, or what the mapper file says).
        similar: token text → {other side's token text: distance}.
    """

    vocabulary: list[str]
    tokens: list[int]
    logits: Tensor
    match: dict[str, str]
    similar: dict[str, dict[str, float]]


@dataclass
class Result:
    """Of one example: sums, statistics, and the gradient of `kd_sum` with respect to the student logits."""

    kd: list[float]  # per group
    kd_sum: float  # Σ_g |J_g| · KD_g
    gradient: Tensor
    groups: list[tuple[list[int], list[int]]]  # (teacher positions, student positions)
    mapped_rate: list[float]
    teacher_mass: list[float]


def levenshtein(a: str, b: str) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                substitute = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                table[i][j] = min(substitute, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[len(a)][len(b)]


def without_spaces(token: str) -> str:
    return token.replace(" ", "")


# Step 1


def entropies(logits: Tensor) -> list[float]:
    result = []
    for row in logits.double():
        total = sum(math.exp(z) for z in row.tolist())
        probabilities = [math.exp(z) / total for z in row.tolist()]
        result.append(-sum(p * math.log(p) for p in probabilities if p > 0))
    return result


def weights(entropy: list[float]) -> list[int]:
    low, high = min(entropy), max(entropy)
    result = []
    for value in entropy:
        h = (value - low) / (high - low) if high > low else 0.0
        result.append(math.floor(3 / (1 + math.exp(-(4 * h - 2))) + 3))
    return result


# Steps 2 and 3


def dtw_path(cost: list[list[int]]) -> list[tuple[int, int]]:
    """The path of least cost from the first to the last pair, as pairs in order."""
    n_rows, n_columns = len(cost), len(cost[0])
    total = {}

    def reachable(i: int, j: int) -> list[tuple[int, int]]:
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]  # the order in which ties are decided
        return [pair for pair in before if pair in total]

    for i in range(n_rows):
        for j in range(n_columns):
            total[i, j] = cost[i][j] + min((total[pair] for pair in reachable(i, j)), default=0)

    path = [(n_rows - 1, n_columns - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        path.append(min(reachable(i, j), key=total.__getitem__))  # min gives the first of equals
    return path[::-1]


def cut_at_diagonals(path: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    groups = []
    previous = None
    for i, j in path:
        if previous is None or (i > previous[0] and j > previous[1]):
            groups.append(([], []))
        teacher, student = groups[-1]
        if i not in teacher:
            teacher.append(i)
        if j not in student:
            student.append(j)
        previous = (i, j)
    return groups


def align(teacher: Side, student: Side) -> list[tuple[list[int], list[int]]]:
    teacher_weights = weights(entropies(teacher.logits))
    student_weights = weights(entropies(student.logits.detach()))
    cost = []
    for i, t in enumerate(teacher.tokens):
        cost.append([])
        for j, s in enumerate(student.tokens):
            both_eos = i == len(teacher.tokens) - 1 and j == len(student.tokens) - 1
            distance = levenshtein(without_spaces(teacher.vocabulary[t]), without_spaces(student.vocabulary[s]))
            cost[-1].append(0 if both_eos else distance * teacher_weights[i] * student_weights[j])
    return cut_at_diagonals(dtw_path(cost))


# Step 4


def top_tokens(row: Tensor, vocabulary: list[str], k: int, taken: list[int] | None = None) -> list[str]:
    """The k largest, by value, then by id. Of those that are equal at the k-th place, `taken` says which."""

    def in_order(ids) -> list[int]:
        return sorted(ids, key=lambda v: (-row[v].item(), v))

    ids = in_order(range(len(vocabulary)))[:k]
    if taken is not None:
        assert taken == in_order(set(taken)) and row[taken].tolist() == row[ids].tolist()
        ids = taken
    return [vocabulary[v] for v in ids]


def pairs(own: Side, own_top: list[str], other_top: list[str]) -> list[tuple[str, str]]:
    """(token, its match on the other side) for every token of `own_top` that has one."""
    found = []
    for token in own_top:
        if token in own.match:
            found.append((token, own.match[token]))
            continue
        near = own.similar.get(token, {})
        candidates = [other for other in other_top if other in near]
        if candidates:
            # other_top is in order of preference, and min gives the first of equals
            found.append((token, min(candidates, key=near.__getitem__)))
    return found


# Step 5


def kl_over_pairs(teacher_values: list[Tensor], student_values: list[Tensor], temperature: float) -> Tensor:
    teacher_total = sum(torch.exp(z / temperature) for z in teacher_values)
    student_total = sum(torch.exp(z / temperature) for z in student_values)
    result = torch.zeros((), dtype=torch.float64)
    for t, s in zip(teacher_values, student_values):
        p = torch.exp(t / temperature) / teacher_total
        q = torch.exp(s / temperature) / student_total
        result = result + p * (torch.log(p) - torch.log(q))
    return result


def cdm(
    teacher: Side,
    student: Side,
    topk: int,
    temperature: float,
    groups: list[tuple[list[int], list[int]]] | None = None,
    taken: Iterator[tuple[list[int], list[int]]] | None = None,
) -> Result:
    """The whole method.

    Args:
        groups: replace steps 1 to 3 where they are given.
        taken: gives for each group the ids of its top k, the teacher's and the student's: see `top_tokens`.
    """
    groups = align(teacher, student) if groups is None else groups
    student_logits = student.logits.double().clone().requires_grad_()
    teacher_logits = teacher.logits.double()
    teacher_id = {token: v for v, token in enumerate(teacher.vocabulary)}
    student_id = {token: v for v, token in enumerate(student.vocabulary)}
    k = min(topk, len(teacher.vocabulary), len(student.vocabulary))

    kd, mapped_rate, teacher_mass = [], [], []
    kd_sum = torch.zeros((), dtype=torch.float64)
    for teacher_positions, student_positions in groups:
        z_teacher = sum(teacher_logits[i] for i in teacher_positions) / len(teacher_positions)
        z_student = sum(student_logits[j] for j in student_positions) / len(student_positions)
        teacher_taken, student_taken = next(taken) if taken else (None, None)
        teacher_top = top_tokens(z_teacher, teacher.vocabulary, k, teacher_taken)
        student_top = top_tokens(z_student, student.vocabulary, k, student_taken)
        to_student = pairs(teacher, teacher_top, student_top)
        to_teacher = [(v, u) for u, v in pairs(student, student_top, teacher_top)]

        divergence = torch.zeros((), dtype=torch.float64)
        for direction in (to_student, to_teacher):
            if direction:
                divergence = divergence + kl_over_pairs(
                    [z_teacher[teacher_id[v]] for v, _ in direction],
                    [z_student[student_id[u]] for _, u in direction],
                    temperature,
                )
        divergence = temperature**2 / 2 * divergence
        kd.append(divergence.item())
        kd_sum = kd_sum + len(student_positions) * divergence
        mapped_rate.append((len(to_student) + len(to_teacher)) / (2 * k))
        probabilities = torch.exp(z_teacher) / torch.exp(z_teacher).sum()
        teacher_mass.append(sum(probabilities[teacher_id[v]].item() for v, _ in to_student))

    gradient = torch.zeros_like(student_logits)
    if kd_sum.requires_grad:
        (gradient,) = torch.autograd.grad(kd_sum, student_logits)
    return Result(
        kd=kd,
        kd_sum=kd_sum.item(),
        gradient=gradient,
        groups=groups,
        mapped_rate=mapped_rate,
        teacher_mass=teacher_mass,
    )


# Statistics, per student token


def one_to_one(groups: list[tuple[list[int], list[int]]]) -> list[bool]:
    return [len(i) == 1 and len(j) == 1 for i, j in groups for _ in j]
