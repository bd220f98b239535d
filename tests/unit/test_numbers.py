"""Numbers at the edge: infinite logits in every dtype, NaN, nothing to compare."""

import math

import pytest
import torch

from modeling.losses.alignment import entropy_weights
from modeling.losses.divergences import (
    kl_rows,
    kl_to_target_rows,
    moved_distribution_rows,
    restricted_kl,
    sorted_distance_rows,
)
from modeling.losses.logits import entropy
from modeling.losses.mapping import contextual_kl
from modeling.losses.rows import StudentRows
from tests.unit.helpers import DTYPES, direction, gradients, groups_of, mapper_of, random_logits

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _small_chunks(small_chunks):
    pass


# ------------------------------------------------------------------------------------- a token that a model rules out
# A logit of −inf is a probability of 0. Every value and gradient must be what is left when the column is taken out.

KEPT, RULED_OUT = [0, 1, 3, 4, 6, 7, 9], [2, 5, 8]


def logits_with_holes(dtype, seed, n_rows=11):
    z = random_logits(n_rows, 10, seed=seed, dtype=dtype)
    z[:, RULED_OUT] = -INF
    return z


def read(function):
    return lambda s, t, y: StudentRows(s, y).read(function, t)


LOSSES = {
    "cross-entropy": lambda s, t, y: StudentRows(s, y).ce,
    "cross-entropy beside a divergence": lambda s, t, y: both(s, t, y)[0],
    "forward KL": read(lambda s, t: kl_rows(t, s, 2.0)),
    "forward KL beside cross-entropy": lambda s, t, y: both(s, t, y)[1],
    "reverse KL": read(lambda s, t: kl_rows(s, t, 2.0)),
    "ULD": read(lambda s, t: sorted_distance_rows(s, t, 2.0)),
    "KL to a target": read(lambda s, t: kl_to_target_rows(t.float().softmax(-1), s, 2.0)),
    "restricted KL": lambda s, t, y: restricted_kl(t, s, torch.ones(s.shape, dtype=torch.bool), 2.0),
}
FORWARD = ("forward KL", "forward KL beside cross-entropy", "restricted KL")


def both(student, teacher, labels):
    rows = StudentRows(student, labels)
    return rows.ce, rows.read(lambda s, t: kl_rows(t, s, 2.0), teacher)


def check_without_columns(got, expected, student, small):
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (gradient,), (wanted,) = gradients(got, [student]), gradients(expected, [small])
    assert not gradient[:, RULED_OUT].any()
    rtol = 1e-5 if student.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient[:, KEPT], wanted, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_columns_that_both_sides_rule_out_are_as_if_not_there(loss, dtype):
    student, teacher = logits_with_holes(dtype, 1).requires_grad_(), logits_with_holes(dtype, 2)
    small, places = student.detach()[:, KEPT].requires_grad_(), torch.arange(11) % len(KEPT)
    got = LOSSES[loss](student, teacher, torch.tensor(KEPT)[places])
    check_without_columns(got, LOSSES[loss](small, teacher[:, KEPT], places), student, small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contextual_kl_with_tokens_ruled_out(dtype):
    """More candidates than tokens with any probability: the value is that of the vocabularies without the others."""
    student, teacher = logits_with_holes(dtype, 7).requires_grad_(), logits_with_holes(dtype, 8)
    small, groups, results = student.detach()[:, KEPT].requires_grad_(), groups_of([1] * 11, [1] * 11), []
    for s, t in ((student, teacher), (small, teacher[:, KEPT])):
        same, rows = direction(range(s.shape[1])), StudentRows(s, torch.zeros(11, dtype=torch.int64))
        results.append(contextual_kl(rows, t, groups, mapper_of(same, same), topk=s.shape[1], temperature=2.0))
    torch.testing.assert_close(results[0].teacher_mass, torch.ones(11), rtol=1e-5, atol=1e-6)
    check_without_columns(results[0].kd, results[1].kd, student, small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", FORWARD)
def test_a_token_that_only_the_teacher_rules_out_costs_nothing_forwards(loss, dtype):
    """Σ p (log p − log q) with p = 0 at the token, straight from the definition."""
    student, teacher = random_logits(4, 10, seed=3, dtype=dtype, requires_grad=True), logits_with_holes(dtype, 4, 4)
    p, log_q = (teacher.double() / 2).softmax(-1), (student.detach().double() / 2).log_softmax(-1)
    expected = 4 * torch.stack([sum(x * (x.log() - y) for x, y in zip(*row) if x > 0) for row in zip(p, log_q)])
    got = LOSSES[loss](student, teacher, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    wanted = 2 * (log_q.exp() - p)  # τ² ∂KL/∂z = τ (q − p)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", FORWARD)
def test_a_token_that_only_the_student_rules_out_costs_infinitely_much(loss):
    """Never a large number in its place."""
    student = torch.tensor([[0.0, -INF, 1.0], [0.0, 1.0, 2.0]])
    got = LOSSES[loss](student, torch.zeros(2, 3), torch.tensor([0, 0]))
    assert got[0] == INF and torch.isfinite(got[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_nan_or_an_infinity_is_never_turned_into_a_number(loss, bad):
    clean, spoilt, labels = random_logits(2, 6), random_logits(2, 6), torch.tensor([0, 0])
    spoilt[1, 3] = bad
    results = [LOSSES[loss](spoilt, clean, labels)]
    if not loss.startswith("cross-entropy"):
        results.append(LOSSES[loss](clean, spoilt, labels))
    for got in results:
        assert torch.isfinite(got[0]) and not torch.isfinite(got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_with_tokens_ruled_out(dtype):
    z = logits_with_holes(dtype, 6)
    p = z.double().softmax(-1)
    expected = torch.tensor([-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()])
    certain = torch.full((2, 5), -INF, dtype=dtype)
    certain[:, 2] = 7.0
    for of in (entropy, lambda z: StudentRows(z, torch.zeros(len(z), dtype=torch.int64)).entropy()):
        torch.testing.assert_close(of(z), expected, rtol=1e-5, atol=1e-6)
        assert of(certain).tolist() == [0.0, 0.0]
    example = torch.tensor([0] * 11 + [1] * 2)
    assert set(entropy_weights(torch.cat([entropy(z), entropy(certain)]), example, 2).tolist()) <= {3, 4, 5}


@pytest.mark.parametrize("bad", [NAN, INF])
def test_entropy_of_a_bad_logit_is_no_number(bad):
    z = random_logits(2, 6)
    z[1, 3] = bad
    assert torch.isfinite(entropy(z)).tolist() == [True, False]


def test_moved_distribution_with_tokens_ruled_out():
    teacher = torch.tensor([[0.0, -INF, math.log(3.0), NAN]])
    moved = moved_distribution_rows(teacher[:, :3], torch.tensor([1, 0, 1]), 3, 1.0)
    assert moved.tolist() == [[0.0, pytest.approx(1.0), 0.0]]
    assert torch.isnan(moved_distribution_rows(teacher, torch.tensor([1, 0, 1, 2]), 3, 1.0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_that_are_all_equal(loss, dtype):
    z = torch.full((3, 8), 2.5, dtype=dtype, requires_grad=True)
    got = LOSSES[loss](z, z.detach(), torch.arange(3))
    (gradient,) = torch.autograd.grad(got.sum(), z)
    if loss.startswith("cross-entropy"):
        assert got.tolist() == pytest.approx([math.log(8)] * 3)
    else:
        assert got.tolist() == pytest.approx([0.0] * 3, abs=1e-6) and gradient.abs().max() < 1e-6
    assert entropy(z).tolist() == pytest.approx([math.log(8)] * 3)
    assert entropy_weights(entropy(z), torch.zeros(3, dtype=torch.int64), 1).tolist() == [3, 3, 3]  # h = 0
