"""The divergences as row functions: by hand, by their definitions, and by numerical gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling.losses.divergences import (
    kl_rows,
    kl_to_target_rows,
    moved_distribution_rows,
    restricted_kl,
    sorted_distance_rows,
)
from tests.reference import baseline_oracles
from tests.unit.helpers import assert_same, random_logits

LN2, LN3 = math.log(2), math.log(3)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0])
SEEDS = st.integers(0, 10**6)


def cases(n):
    return settings(max_examples=n, deadline=None)


class TestKL:
    def test_by_hand(self):
        # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; the other way round
        # 1/2 ln(2/3) + 1/2 ln 2 = 0.143841
        p, q = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
        assert kl_rows(p, q).item() == pytest.approx(0.130812, abs=1e-6)
        assert kl_rows(q, p).item() == pytest.approx(0.143841, abs=1e-6)
        # τ = 2 halves the logits: twice the logits give the same p, and τ² = 4 times the divergence
        assert kl_rows(2 * p, q, temperature=2.0).item() == pytest.approx(4 * 0.130812, abs=1e-5)

    @given(SEEDS, TEMPERATURES)
    @cases(20)
    def test_the_oracle_and_both_gradients(self, seed, temperature):
        p, q = (random_logits(10, 7, seed=seed + i, requires_grad=True) for i in (0, 1))
        assert_same(kl_rows(p, q, temperature), baseline_oracles.fkd(p, q, temperature), p, q)
        assert_same(kl_rows(p, q, temperature), baseline_oracles.rkd(q, p, temperature), p, q)

    def test_gradcheck(self):
        p, q = (random_logits(9, 5, seed=i, dtype=torch.float64, requires_grad=True) for i in (3, 4))
        assert torch.autograd.gradcheck(lambda a, b: kl_rows(a, b, 1.7), (p, q))

    def test_equal_logits_are_zero_apart(self):
        logits = random_logits(5, 9, requires_grad=True)
        result = kl_rows(logits.detach(), logits) + kl_rows(logits, logits.detach())
        assert_same(result, 0 * logits.sum(-1), logits, atol=1e-6)

    def test_a_token_that_one_side_all_but_excludes(self):
        a, b = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -300.0]], requires_grad=True)
        for result in (kl_rows(a, b), kl_rows(b, a)):
            (gradient,) = torch.autograd.grad(result.sum(), b)
            assert result.item() == 0 and not gradient.any()

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
            kl_rows(torch.zeros(2, 3), torch.zeros(2, 4))


class TestSortedDistance:
    def test_by_hand(self):
        # (3/4, 1/4) against (1/2, 1/4, 1/4): 1/4 + 0 + 1/4; the order of the tokens does not matter
        student = torch.tensor([[0.0, LN3], [LN3, 0.0]])
        teacher = torch.tensor([[0.0, LN2, 0.0], [LN2, 0.0, 0.0]])
        assert sorted_distance_rows(student, teacher).tolist() == pytest.approx([0.5, 0.5])
        assert sorted_distance_rows(teacher, student).tolist() == pytest.approx([0.5, 0.5])
        assert sorted_distance_rows(2 * student, 2 * teacher, temperature=2.0).tolist() == pytest.approx([0.5, 0.5])

    @given(SEEDS, TEMPERATURES, st.integers(2, 20), st.integers(2, 20))
    @example(127, 0.5, 2, 2)  # two that differ by less than a float32 tells: a kink
    @cases(25)
    def test_the_oracle(self, seed, temperature, teacher_columns, student_columns):
        teacher = random_logits(9, teacher_columns, seed=seed)
        student = random_logits(9, student_columns, seed=seed + 1, requires_grad=True)
        expected = baseline_oracles.uld(teacher, student, temperature)
        assert_same(sorted_distance_rows(student, teacher, temperature), expected, student, atol=5e-5)

    def test_equal_distributions_have_no_gradient(self):
        student = random_logits(3, 7, requires_grad=True)
        result = sorted_distance_rows(student, student.detach()[:, torch.randperm(7)])
        result.sum().backward()
        torch.testing.assert_close(result, torch.zeros(3), rtol=0, atol=1e-6)
        assert student.grad.abs().max() < 1  # of a subgradient at a kink, rounding decides the sign

    def test_gradcheck(self):
        teacher = random_logits(4, 6, seed=1, dtype=torch.float64)
        student = random_logits(4, 9, seed=2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: sorted_distance_rows(z, teacher, 1.3), student)


class TestMovedDistribution:
    def test_one_student_token_takes_the_mass_of_all_that_map_to_it(self):
        # teacher (1/8, 1/8, 2/8, 4/8); tokens 0 and 3 both map to 0, token 1 to 2, token 2 to nothing
        teacher = torch.tensor([[0.0, 0.0, LN2, 2 * LN2]])
        moved = moved_distribution_rows(teacher, torch.tensor([0, 2, -1, 0]), vocab_size=4, temperature=1.0)
        # what is mapped is 6/8
        assert moved.tolist() == [pytest.approx([5 / 6, 0, 1 / 6, 0])]

    @given(SEEDS, TEMPERATURES)
    @cases(15)
    def test_kl_to_it_is_the_oracle(self, seed, temperature):
        random = np.random.default_rng(seed)
        static = random.integers(-1, 7, 12)
        static[0] = 0
        teacher, student = random_logits(6, 12, seed=seed), random_logits(6, 7, seed=seed + 1, requires_grad=True)
        mapping = {v: int(u) for v, u in enumerate(static) if u >= 0}
        teacher_ids = random.choice(sorted(mapping), 6).tolist()
        targets, distilled = baseline_oracles.mined_targets(
            *(teacher, teacher_ids, [mapping[v] for v in teacher_ids], 7, [([i], [i]) for i in range(6)], mapping),
            temperature,
        )
        assert all(distilled)
        target = moved_distribution_rows(teacher, torch.from_numpy(static), 7, temperature)
        torch.testing.assert_close(target.double(), torch.tensor(targets, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        expected = baseline_oracles.mined(targets, student, temperature)
        assert_same(kl_to_target_rows(target, student, temperature), expected, student)

    def test_kl_to_a_one_hot_target_is_cross_entropy(self):
        student, labels = random_logits(6, 7, requires_grad=True), torch.arange(6)
        expected = F.cross_entropy(student.double(), labels, reduction="none")
        assert_same(kl_to_target_rows(F.one_hot(labels, 7).float(), student), expected, student)


class TestRestrictedKL:
    def test_by_hand(self):
        # the masked column, however large, leaves (3/4, 1/4) against (1/2, 1/2)
        teacher = torch.tensor([[LN3, 50.0, 0.0]])
        student = torch.tensor([[1.0, 90.0, 1.0]], requires_grad=True)
        result = restricted_kl(teacher, student, torch.tensor([[True, False, True]]))
        result.sum().backward()
        assert result.item() == pytest.approx(0.130812, abs=1e-6)
        # gradient q^S − q^T
        assert student.grad.tolist() == [pytest.approx([-0.25, 0.0, 0.25], abs=1e-6)]

    @given(SEEDS, TEMPERATURES)
    @cases(20)
    def test_equals_the_kl_of_the_kept_columns(self, seed, temperature):
        teacher, student = random_logits(6, 8, seed=seed), random_logits(6, 8, seed=seed + 1, requires_grad=True)
        mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[:, 0] = True
        kept = [(t[m][None], s[m][None]) for t, s, m in zip(teacher, student, mask)]
        expected = torch.cat([baseline_oracles.fkd(t, s, temperature) for t, s in kept])
        assert_same(restricted_kl(teacher, student, mask, temperature), expected, student)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_no_column_gives_exactly_zero(self):
        teacher, student = random_logits(3, 4, seed=1), random_logits(3, 4, seed=2, requires_grad=True)
        mask = torch.tensor([[True] * 4, [False] * 4, [False, True, False, False]])
        with torch.autograd.detect_anomaly(check_nan=True):
            result = restricted_kl(teacher, student, mask)
            result.sum().backward()
        # one column is a certain category on both sides
        assert result[1:].tolist() == [0.0, 0.0] and result[0] > 0
        assert not student.grad[1:].any()

    def test_the_teacher_is_a_constant(self):
        teacher, student = (random_logits(3, 4, seed=i, requires_grad=True) for i in (1, 2))
        restricted_kl(teacher, student, torch.ones(3, 4, dtype=torch.bool)).sum().backward()
        assert teacher.grad is None and student.grad is not None

    def test_gradcheck(self):
        teacher = random_logits(4, 6, seed=1, dtype=torch.float64)
        student = random_logits(4, 6, seed=2, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3, [False] * 5 + [True]])
        assert torch.autograd.gradcheck(lambda z: restricted_kl(teacher, z, mask, 0.8), student)

    def test_half_precision_logits(self):
        teacher, student = random_logits(3, 50, dtype=torch.bfloat16), random_logits(3, 50, seed=1, dtype=torch.float16)
        result = restricted_kl(teacher, student, torch.ones(3, 50, dtype=torch.bool))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, kl_rows(teacher.float(), student.float()))
