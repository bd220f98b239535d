"""FKD, RKD, ULD and MinED for one example, from their definitions: slow, in float64, sharing no code with the project.

Every function gives one value a student response token, differentiable with respect to the student's logits. Logits
are `[tokens, vocabulary]`, row j predicting token j.
"""

import torch
from torch import Tensor

from tests.reference.cdm_oracle import cut_at_diagonals, dtw_path, levenshtein, without_spaces


def softmax(row: Tensor, temperature: float) -> Tensor:
    powers = torch.exp(row.double() / temperature)
    return powers / powers.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q):
        if a > 0:
            total = total + a * (torch.log(a) - torch.log(b))
    return total


def fkd(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return torch.stack(
        [temperature**2 * kl(softmax(t, temperature), softmax(s, temperature)) for t, s in zip(teacher, student)]
    )


def rkd(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return torch.stack(
        [temperature**2 * kl(softmax(s, temperature), softmax(t, temperature)) for t, s in zip(teacher, student)]
    )


def uld(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    values = []
    for j in range(len(student)):
        total = torch.zeros((), dtype=torch.float64)
        if j < len(teacher):
            p_student = sorted(softmax(student[j], temperature), reverse=True)
            p_teacher = sorted(softmax(teacher[j], temperature), reverse=True)
            zero = torch.zeros((), dtype=torch.float64)
            for k in range(max(len(p_student), len(p_teacher))):
                a = p_student[k] if k < len(p_student) else zero
                b = p_teacher[k] if k < len(p_teacher) else zero
                total = total + abs(a - b)
        values.append(total)
    return torch.stack(values)


def mined_groups(teacher_texts: list[str], student_texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """The aligned groups of two responses, given as the texts of their tokens; the last of each is its EOS."""
    cost = []
    for i, t in enumerate(teacher_texts):
        cost.append([])
        for j, s in enumerate(student_texts):
            both_eos = i == len(teacher_texts) - 1 and j == len(student_texts) - 1
            cost[-1].append(0 if both_eos else levenshtein(without_spaces(t), without_spaces(s)))
    return cut_at_diagonals(dtw_path(cost))


def mined_targets(
    teacher: Tensor,
    teacher_ids: list[int],
    student_ids: list[int],
    n_student: int,
    groups: list[tuple[list[int], list[int]]],
    mapping: dict[int, int],
    temperature: float,
) -> tuple[list[list[float]], list[bool]]:
    """The target of every student token, and whether it is the teacher's. `mapping` has no entry for an unmapped id."""
    targets, distilled = [], []
    for teacher_positions, student_positions in groups:
        for j in student_positions:
            q = [0.0] * n_student
            from_teacher = (
                len(teacher_positions) == len(student_positions) == 1
                and mapping.get(teacher_ids[teacher_positions[0]]) == student_ids[j]
            )
            if from_teacher:
                powers = torch.exp(teacher[teacher_positions[0]].double() / temperature).tolist()
                total = sum(power for v, power in enumerate(powers) if v in mapping)
                for v, u in mapping.items():
                    q[u] += powers[v] / total
            else:
                q[student_ids[j]] = 1.0
            targets.append(q)
            distilled.append(from_teacher)
    return targets, distilled


def mined(targets: list[list[float]], student: Tensor, temperature: float) -> Tensor:
    return torch.stack(
        [
            temperature**2 * kl(torch.tensor(q, dtype=torch.float64), softmax(s, temperature))
            for q, s in zip(targets, student)
        ]
    )
