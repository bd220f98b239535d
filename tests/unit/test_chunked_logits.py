"""Every loss of logits that do not exist as a whole, held to the same loss of those that do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling import divergences
from modeling.alignment import Groups, entropy
from modeling.chunked_logits import ChunkedLogits
from modeling.contextual_mapping import DirectionMap, contextual_kl
from modeling.divergences import (
    cross_entropy,
    cross_entropy_and,
    cross_entropy_and_columns,
    cross_entropy_and_kl,
    kl_divergence,
    sorted_distance_rows,
)
from modeling.output_head import OutputHead

ROWS, HIDDEN, COLUMNS, TOKENS, TEACHER_TOKENS = 11, 3, 15, 13, 9


class Side:
    """Hidden states and a head, with the logits that they make, computed once by hand and once in chunks."""

    def __init__(self, seed, n_rows, columns, n_tokens, grad=False, dtype=torch.float64, bias=True, **factors):
        random = torch.Generator().manual_seed(seed)

        def tensor(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_(grad)

        self.hidden, self.weight = tensor(n_rows, HIDDEN), tensor(columns, HIDDEN)
        self.bias = tensor(columns) if bias else None
        self.head = OutputHead(self.weight, self.bias, **factors)
        self.n_tokens = n_tokens

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def whole(self):
        logits = F.linear(self.hidden, self.weight, self.bias)
        logits = logits * self.head.multiplier / self.head.divisor
        if self.head.cap is not None:
            logits = self.head.cap * torch.tanh(logits / self.head.cap)
        return logits[:, : self.n_tokens]

    def chunked(self, chunk):
        return ChunkedLogits(self.hidden, self.head, self.n_tokens, chunk)


def student(**options):
    return Side(0, ROWS, COLUMNS, TOKENS, grad=True, **options)


LABELS = torch.arange(ROWS) % TOKENS
TWICE_AND_0 = torch.stack([LABELS, LABELS, 0 * LABELS], dim=1)
GROUPS = Groups(  # 9 groups on the student's 11 rows and the teacher's 10
    teacher_group=np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
    student_group=np.array([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
    teacher_size=np.array([2, 1, 1, 1, 1, 1, 1, 1, 1]),
    student_size=np.array([1, 3, 1, 1, 1, 1, 1, 1, 1]),
)


def maps():
    none = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    to_student = np.array([3, 1, -1, 0, 12, 5, -1, 7, 2], dtype=np.int32)
    to_teacher = np.full(TOKENS, -1, dtype=np.int32)
    to_teacher[to_student[to_student >= 0]] = np.flatnonzero(to_student >= 0)
    return [DirectionMap(way, np.zeros(len(way) + 1, dtype=np.int32), *none) for way in (to_student, to_teacher)]


def cdm(s, t):
    result = contextual_kl(s, t, GROUPS, *maps(), topk=4, temperature=1.5, labels=LABELS)
    size = torch.from_numpy(GROUPS.student_size)
    return torch.cat([result.ce, result.kd * size, result.mapped_rate, result.teacher_mass])


def uld(s, t):
    return torch.cat(cross_entropy_and(sorted_distance_rows, s, LABELS, t.index_select(0, torch.arange(ROWS) % 10)))


LOSSES = {
    "cross_entropy": lambda s, t: cross_entropy(s, LABELS),
    "columns": lambda s, t: torch.cat([part.flatten() for part in cross_entropy_and_columns(s, LABELS, TWICE_AND_0)]),
    "ULD": uld,
    "CDM": cdm,
}
SAME_VOCABULARY = {
    "forward KL": lambda s, t: torch.cat(cross_entropy_and_kl(s, LABELS, t, 2.0)),
    "reverse KL": lambda s, t: torch.cat(cross_entropy_and_kl(s, LABELS, t, 2.0, reverse=True)),
    "kl_divergence": lambda s, t: kl_divergence(t, s, 2.0),
}
FACTORS = [{}, {"cap": 3.0}, {"multiplier": 0.25, "bias": False}, {"divisor": 4.0, "cap": 2.0}]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(divergences, "MIN_CHUNK_ROWS", 3)


def check(loss, side, teacher, chunk, student_chunked=True, teacher_chunked=True, **tolerance):
    weights = None
    results = []
    for chunked in (False, True):
        s = side.chunked(chunk) if chunked and student_chunked else side.whole()
        t = teacher.chunked(chunk) if chunked and teacher_chunked else teacher.whole()
        values = loss(s, t)
        weights = torch.linspace(0.5, 2, len(values), dtype=values.dtype) if weights is None else weights
        results.append((values, *torch.autograd.grad((values * weights).sum(), side.leaves)))
    for whole, in_chunks in zip(*results):
        assert in_chunks.dtype == whole.dtype
        torch.testing.assert_close(in_chunks, whole, **tolerance)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", [*LOSSES, *SAME_VOCABULARY])
def test_values_and_all_gradients_equal_those_of_whole_logits(name, chunk):
    for i, factors in enumerate(FACTORS if chunk == 4 else FACTORS[:2]):
        if name in LOSSES:
            teacher = Side(1, 10, TEACHER_TOKENS + 2, TEACHER_TOKENS, **factors)
        else:
            teacher = Side(1, ROWS, TOKENS, TOKENS, **factors)
        check({**LOSSES, **SAME_VOCABULARY}[name], student(**FACTORS[i]), teacher, chunk)


@pytest.mark.parametrize("student_chunked, teacher_chunked", [(True, False), (False, True)])
@pytest.mark.parametrize("name", [*LOSSES, *SAME_VOCABULARY])
def test_one_side_alone_in_chunks(name, student_chunked, teacher_chunked):
    teacher = Side(1, *((10, TEACHER_TOKENS, TEACHER_TOKENS) if name in LOSSES else (ROWS, TOKENS, TOKENS)))
    check({**LOSSES, **SAME_VOCABULARY}[name], student(), teacher, 4, student_chunked, teacher_chunked)


def test_a_teacher_without_a_linear_head():
    """Stored top logits are made dense by a function that has no weights."""
    s, t = student(), Side(1, ROWS, TOKENS, TOKENS)
    teacher = ChunkedLogits(t.hidden, lambda hidden: t.head(hidden), TOKENS, 4)
    expected = kl_divergence(t.whole(), s.whole(), 2.0)
    torch.testing.assert_close(kl_divergence(teacher, s.whole(), 2.0), expected)
    torch.testing.assert_close(entropy(teacher), entropy(t.whole()))


def test_float32_and_bfloat16():
    teacher = Side(1, 10, TEACHER_TOKENS, TEACHER_TOKENS, dtype=torch.float32)
    check(LOSSES["CDM"], student(dtype=torch.float32), teacher, 4, rtol=1e-5, atol=1e-6)
    # One bfloat16 product of each pair on both paths; weight gradients are summed in another order, and rounded once.
    check(LOSSES["cross_entropy"], student(dtype=torch.bfloat16), teacher, 4, rtol=2e-2, atol=2e-2)


def test_a_head_that_multiplies_in_half_precision_gives_gradients_in_the_weights():
    side = student(dtype=torch.float32)
    chunked = replace(side.chunked(4), head=replace(side.head, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(side.hidden, side.weight, side.bias)[:, :TOKENS]
    assert chunked.dtype == chunked[:3].dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(chunked[torch.tensor([5, 2])], logits[[5, 2]])
    in_chunks, whole = cross_entropy(chunked, LABELS), cross_entropy(logits, LABELS)
    torch.testing.assert_close(in_chunks, whole)
    for leaf, a, b in zip(
        side.leaves, torch.autograd.grad(in_chunks.sum(), side.leaves), torch.autograd.grad(whole.sum(), side.leaves)
    ):
        assert a.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_frozen_weights_get_no_gradient():
    side = student()
    for leaf in side.leaves[1:]:
        leaf.requires_grad_(False)
    cross_entropy(side.chunked(4), LABELS).sum().backward()
    assert side.weight.grad is None and side.bias.grad is None
    expected = torch.autograd.grad(F.cross_entropy(side.whole(), LABELS, reduction="sum"), side.hidden)[0]
    torch.testing.assert_close(side.hidden.grad, expected)


def test_no_rows():
    side = Side(0, 0, COLUMNS, TOKENS, grad=True)
    cross_entropy(side.chunked(4), LABELS[:0]).sum().backward()
    assert side.hidden.grad.shape == (0, HIDDEN) and not side.weight.grad.any()


def test_no_more_than_a_chunk_of_logits_is_ever_made():
    """Counts the largest tensor that any operation of forward and backward gives."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] in (TOKENS, COLUMNS):
                    self.rows = max(self.rows, tensor.shape[0])
            return result

    side, teacher = student(), Side(1, 10, TEACHER_TOKENS, TEACHER_TOKENS)
    with Largest() as largest:
        LOSSES["CDM"](side.chunked(4), teacher.chunked(4)).sum().backward()
    assert largest.rows == 4
