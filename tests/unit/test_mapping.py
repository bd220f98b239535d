"""Contextual mapping (CDM, steps 4 and 5): by hand, its parts against slow ones, and what the gradient reaches.

The whole method is held to its oracle in test_rigs.py, on random tokenizers.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.losses.mapping import contextual_kl, gather, group_means, group_topk, match_pairs
from modeling.losses.rows import StudentRows
from modeling.text.alignment import Groups
from tests.reference import cdm_oracle as oracle
from tests.unit.helpers import Made, assert_same, direction, groups_of, mapper_of, random_logits

LN3 = math.log(3)
SEEDS = st.integers(0, 10**6)


def contextual(student, teacher, groups, to_student, to_teacher, topk=100, temperature=1.0):
    rows = StudentRows(student, torch.zeros(len(student), dtype=torch.int64))
    return contextual_kl(rows, teacher, groups, mapper_of(to_student, to_teacher), topk, temperature)


def one_group(student, teacher, to_student, to_teacher, **options):
    """Of all rows."""
    groups = groups_of([len(teacher)], [len(student)])
    return contextual(student, teacher, groups, direction(to_student), direction(to_teacher), **options)


# ---------------------------------------------------------------------------------------------------------- by hand


class TestByHand:
    def test_one_pair_of_tokens(self):
        # Top 2 of both sides are ids 0 and 1, crosswise the same. q^T = (3/4, 1/4), q^S = (1/2, 1/2) in both
        # directions: KD = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812. Gradient of each half: (q^S − q^T) / 2.
        student = torch.tensor([[2.0, 2.0, -9.0, -9.0]], requires_grad=True)
        result = one_group(student, torch.tensor([[LN3, 0.0, -9.0]]), [1, 0, -1], [1, 0, -1, -1], topk=2)
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812], abs=1e-6)
        assert student.grad[0].tolist() == pytest.approx([0.25, -0.25, 0.0, 0.0], abs=1e-6)
        assert result.mapped_rate.tolist() == [1.0]
        # 4 of 4 + e⁻⁹
        assert result.teacher_mass.tolist() == pytest.approx([4 / (4 + math.exp(-9))], abs=1e-6)

    def test_means_of_several_tokens(self):
        # The same mean logits, of two tokens a side: each student token has half the gradient.
        teacher = torch.tensor([[2 * LN3, 5.0, -9.0], [0.0, -5.0, -9.0]])
        student = torch.tensor([[4.0, 0.0, -9.0, -9.0], [0.0, 4.0, -9.0, -9.0]], requires_grad=True)
        result = one_group(student, teacher, [1, 0, -1], [1, 0, -1, -1], topk=2)
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812], abs=1e-6)
        assert student.grad.tolist() == [pytest.approx([0.125, -0.125, 0.0, 0.0], abs=1e-6)] * 2

    def test_a_student_token_in_two_pairs_counts_twice(self):
        # Both teacher tokens map to student token 0: there are two categories, and q^S = (1/2, 1/2) whatever
        # its logit. q^T = (3/4, 1/4): KL = 0.130812, halved since the other direction is empty; no gradient.
        student = torch.tensor([[5.0, 1.0, 0.0]], requires_grad=True)
        result = one_group(student, torch.tensor([[LN3, 0.0, -9.0]]), [0, 0, -1], [-1, -1, -1], topk=2)
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812 / 2], abs=1e-6)
        assert student.grad.abs().max() < 1e-7
        assert result.mapped_rate.tolist() == [0.5]

    def test_temperature(self):
        # τ = 2: twice the logits give the same q, and τ² = 4 times the divergence
        student, teacher = torch.tensor([[2.0, 2.0, -9.0]]), torch.tensor([[2 * LN3, 0.0, -9.0]])
        result = one_group(student, teacher, [1, 0, -1], [1, 0, -1], topk=2, temperature=2.0)
        assert result.kd.tolist() == pytest.approx([4 * 0.130812], abs=1e-5)
        # the teacher's mass is that of its distribution as it is: 9 + 1 of 9 + 1 + e⁻⁹
        assert result.teacher_mass.tolist() == pytest.approx([10 / (10 + math.exp(-9))], abs=1e-6)

    def test_static_match_outside_the_students_top_k(self):
        # k = 1: teacher token 0 maps to student token 2, the student's least likely one
        student, teacher = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 0.0, 0.0]])
        result = one_group(student, teacher, [2, -1, -1], [-1, -1, 0], topk=1)
        assert result.mapped_rate.tolist() == [0.5]
        assert result.kd.tolist() == [0.0]  # one category is certain on both sides
        assert result.teacher_mass.item() == pytest.approx(math.exp(3) / (math.exp(3) + 2), rel=1e-6)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_no_pairs_at_all(self):
        student, ways = random_logits(3, 5, requires_grad=True), (direction([-1] * 4), direction([-1] * 5))
        with torch.autograd.detect_anomaly(check_nan=True):
            result = contextual(student, random_logits(2, 4), groups_of([1, 1], [2, 1]), *ways)
            result.kd.sum().backward()
        for values in (result.kd, result.mapped_rate, result.teacher_mass):
            assert values.tolist() == [0.0, 0.0]
        assert not student.grad.any()

    def test_k_is_never_more_than_the_smaller_vocabulary(self):
        # V_T = 3: 3 candidates of 6 student tokens; all map, so the rate is 1
        result = one_group(random_logits(1, 6), random_logits(1, 3), [0, 1, 2], [0, 1, 2, 0, 1, 2], topk=100)
        assert result.mapped_rate.tolist() == [1.0]

    def test_a_batch_without_responses_gives_no_groups_and_no_loss(self):
        student, ways = torch.zeros(0, 5, requires_grad=True), (direction([-1] * 7), direction([-1] * 5))
        result = contextual(student, torch.zeros(0, 7), Groups.of([], []), *ways)
        assert [part.shape for part in (result.kd, result.mapped_rate, result.teacher_mass)] == [(0,)] * 3
        result.kd.sum().backward()
        assert student.grad.shape == (0, 5)


# ------------------------------------------------------------------------------------------------------ the gradient


def batch(dtype=torch.float32):
    """`(student, teacher, groups, to_student, to_teacher)` with matches of every kind."""
    to_student = direction([3, -1, 0, 5, -1, 7, -1, 11, 2, -1], {1: [(0.1, 1), (0.1, 4)], 4: [(0.2, 8)]})
    to_teacher = direction([2, -1, 8, 0, -1, 3, -1, 5, -1, -1, -1, 7], {1: [(0.1, 1)], 8: [(0.2, 4)]})
    groups = groups_of([1, 3, 1, 1], [2, 1, 3, 1])
    student, teacher = random_logits(7, 12, seed=5, dtype=dtype), random_logits(6, 10, seed=6, dtype=dtype)
    return student.requires_grad_(), teacher, groups, to_student, to_teacher


def test_gradcheck():
    student, *rest = batch(torch.float64)
    assert torch.autograd.gradcheck(lambda z: contextual(z, *rest, topk=5, temperature=1.3).kd, student)


def test_only_what_step_5_reads_has_a_gradient():
    student, teacher, *rest = batch()
    result = contextual(student, teacher.requires_grad_(), *rest, topk=3)
    assert not result.mapped_rate.requires_grad and not result.teacher_mass.requires_grad
    result.kd.sum().backward()
    assert teacher.grad is None
    # at most 2k columns of a token are read
    assert 0 < (student.grad != 0).sum(1).max() <= 6


def test_padded_heads():
    """Padding larger than every logit is not seen."""
    student, teacher, *rest = batch()
    padded_student = torch.cat([student.detach(), torch.full((7, 5), 99.0)], dim=1).requires_grad_()
    padded_teacher = torch.cat([teacher, torch.full((6, 3), 99.0)], dim=1)
    expected = contextual(student, teacher, *rest, topk=5)
    result = contextual(padded_student[:, :12], padded_teacher[:, :10], *rest, topk=5)
    torch.testing.assert_close((result.kd, result.teacher_mass), (expected.kd, expected.teacher_mass))
    result.kd.sum().backward()
    expected.kd.sum().backward()
    torch.testing.assert_close(padded_student.grad[:, :12], student.grad)
    assert not padded_student.grad[:, 12:].any()


def test_wrong_sizes_are_refused():
    student, teacher, groups, *ways = batch()
    with pytest.raises(ValueError, match="knows 12 student tokens, but the student logits have 11 columns"):
        contextual(student[:, :11], teacher, groups, *ways)
    with pytest.raises(ValueError, match="knows 10 teacher tokens"):
        contextual(student, torch.zeros(6, 13), groups, *ways)
    with pytest.raises(ValueError, match="cover 6 teacher tokens, but there are 5 rows"):
        contextual(student, teacher[:5], groups, *ways)
    with pytest.raises(ValueError, match="student ids beyond"):
        contextual(student, teacher, groups, replace(ways[0], static=np.full(10, 12, np.int32)), ways[1])


# ------------------------------------------------------------------------------------------------------------- top k


def topk_of(logits, sizes, k, **options):
    return group_topk(logits, groups_of(sizes, sizes).student, k, **options)


class TestTopK:
    @given(
        SEEDS,
        st.lists(st.integers(1, 4), min_size=1, max_size=30),
        st.sampled_from([40, 41]),  # of columns: few values and many ties, also at the last place
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    @settings(max_examples=25, deadline=None)
    def test_the_largest_means_in_order(self, seed, sizes, columns, dtype):
        logits = torch.randint(-3, 4, (sum(sizes), columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
        means = torch.stack([rows.float().sum(0) / len(rows) for rows in logits.split(sizes)])
        result = topk_of(logits, sizes, 7, with_logsumexp=True)
        assert result.values.dtype == torch.float32 and result.ids.dtype == torch.int64
        check_topk(result, means, 7)
        torch.testing.assert_close(result.logsumexp, means.logsumexp(1))

    @given(
        SEEDS,
        st.integers(1000, 1100),  # wide enough to be searched in blocks, and seldom a multiple of one
        st.sampled_from([2, 30, 10**6]),  # distinct values
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @settings(max_examples=25, deadline=None)
    def test_wide_rows(self, seed, columns, distinct, dtype):
        logits = torch.randint(0, distinct, (9, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
        check_topk(topk_of(logits, [1] * 9, 6), logits.float(), 6)

    def test_k_of_the_whole_vocabulary(self):
        logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
        assert topk_of(logits, [1, 1], 3).ids.tolist() == [[1, 2, 0], [0, 1, 2]]

    def test_one_group_longer_than_a_chunk(self):
        logits = random_logits(700, 9)
        means = torch.stack([logits[0], logits[1:651].mean(0), logits[651:].mean(0)])
        result, expected = topk_of(logits, [1, 650, 49], 4), means.topk(4)
        torch.testing.assert_close(result.values, expected.values)
        assert torch.equal(result.ids, expected.indices)

    def test_no_gradient_and_any_row_stride(self):
        padded, sizes = random_logits(20, 15, requires_grad=True), [1] * 10 + [3] * 3 + [1]
        result, expected = (
            topk_of(logits, sizes, 5) for logits in (padded[:, :11], padded.detach()[:, :11].contiguous())
        )
        assert not result.values.requires_grad and result.logsumexp is None
        assert torch.equal(result.ids, expected.ids) and torch.equal(result.values, expected.values)
        assert torch.equal(padded, random_logits(20, 15))  # the logits are left as they were

    def test_no_matrix_of_all_groups_is_built(self):
        with Made() as made:
            topk_of(random_logits(640, 500), [2] * 320, 5, with_logsumexp=True)
        made.shapes = [shape for shape in made.shapes if shape != (640, 500)]  # the logits themselves
        assert max(map(math.prod, made.shapes)) <= 10 * 500  # a 64th of the rows


def check_topk(result, means, k):
    """The k largest values; where several are equal at the k-th place, any of them; in order of value, then id."""
    assert torch.equal(result.values, means.topk(k).values)
    assert torch.equal(result.values, means.gather(1, result.ids))
    for values, ids in zip(result.values.tolist(), result.ids.tolist()):
        assert len(set(ids)) == k
        pairs = [(-value, i) for value, i in zip(values, ids)]
        assert pairs == sorted(pairs)


# ------------------------------------------------------------------------------------------------------------- pairs


class TestMatchPairs:
    def match(self, top_ids, other_top_ids, way, other_vocab_size=10):
        result = match_pairs(np.array(top_ids), np.array(other_top_ids), way, other_vocab_size)
        assert result.dtype == np.int64
        return result.tolist()

    @pytest.mark.parametrize(
        ("static", "similar", "top_ids", "other_top_ids", "expected"),
        [
            # id 0 is a real token: a static entry 0, a candidate of id 0, and a similar token of id 0
            ([0, -1], {1: [(0.2, 0)]}, [[0, 1]], [[0, 5]], [[0, 0]]),
            ([0, -1], {1: [(0.2, 0)]}, [[0, 1]], [[4, 5]], [[0, -1]]),
            # the static entry comes first, and needs no candidate
            ([7, -1], {0: [(0.0, 3)], 1: [(0.1, 3)]}, [[0, 1]], [[3, 4]], [[7, 3]]),
            # the nearest candidate wins; there may be none
            ([-1], {0: [(0.1, 2), (0.2, 9), (0.25, 1)]}, [[0]] * 3, [[1, 9], [1, 2], [5, 6]], [[9], [2], [-1]]),
            # of equally near ones, that of better rank
            ([-1], {0: [(0.1, 2), (0.1, 6), (0.1, 8), (0.2, 4)]}, [[0]] * 2, [[4, 8, 2], [4, 6, 8]], [[8], [6]]),
            # every group on its own
            ([-1] * 2, {0: [(0.1, 2)], 1: [(0.1, 3)]}, [[0, 1], [1, 0]], [[2, 5], [3, 5]], [[2, -1], [3, -1]]),
            # the two sides may have different numbers of candidates
            ([-1], {0: [(0.1, 2)]}, [[0]], [[5, 6, 7, 2]], [[2]]),
        ],
    )
    def test_by_hand(self, static, similar, top_ids, other_top_ids, expected):
        assert self.match(top_ids, other_top_ids, direction(static, similar)) == expected

    def test_equal_distance_goes_to_the_larger_logit_then_the_lower_id(self):
        way = direction([-1, -1], {0: [(0.1, 1), (0.1, 2)]})
        student_top = topk_of(torch.tensor([[0.0, 3.0, 4.0], [0.0, 4.0, 4.0]]), [1, 1], 3).ids.numpy()
        assert self.match([[0], [0]], student_top, way, 3) == [[2], [1]]

    def test_unknown_ids_are_refused(self):
        for top_ids, other_top_ids, found in (([[1]], [[5]], "1 and 5"), ([[0]], [[10]], "0 and 10")):
            with pytest.raises(ValueError, match=f"got {found}"):
                self.match(top_ids, other_top_ids, direction([-1]))

    @given(SEEDS)
    @settings(max_examples=60, deadline=None)
    def test_equals_the_search_by_names(self, seed):
        random = np.random.default_rng(seed)
        static = np.where(random.random(20) < 0.3, random.integers(0, 15, 20), -1).tolist()
        # few distinct distances: many ties
        similar = {v: [(random.integers(1, 4) / 10, u) for u in range(15) if random.random() < 0.4] for v in range(20)}
        near = {f"t{v}": {f"s{u}": d for d, u in row} for v, row in similar.items()}
        own = oracle.Side([], [], None, {f"t{v}": f"s{u}" for v, u in enumerate(static) if u >= 0}, near)
        top_ids, other_top_ids = (
            np.stack([random.permutation(n)[:k] for _ in range(4)]) for n, k in ((20, 6), (15, 5))
        )
        found = self.match(top_ids, other_top_ids, direction(static, similar), 15)
        for mine, others, matches in zip(top_ids, other_top_ids, found):
            pairs = oracle.pairs(own, [f"t{v}" for v in mine], [f"s{u}" for u in others])
            assert [(f"t{v}", f"s{u}") for v, u in zip(mine, matches) if u >= 0] == pairs


# ------------------------------------------------------------------------------------------------------ chosen columns


def test_the_columns_of_the_means():
    logits = random_logits(6, 9, dtype=torch.float64, requires_grad=True)
    side, columns = groups_of([1, 3, 2], [1, 3, 2]).student, torch.tensor([[0, 8, 8], [0, 3, 0], [2, 1, 0]])
    means = torch.stack([logits[:1].mean(0), logits[1:4].mean(0), logits[4:].mean(0)]).gather(1, columns)
    constant = group_means(gather(logits, columns, side), side)
    assert not constant.requires_grad
    torch.testing.assert_close(constant, means.detach())
    rows = StudentRows(logits, torch.zeros(6, dtype=torch.int64))
    assert_same(group_means(rows.columns(columns[side.group]), side), means, logits, rtol=1e-12)


def test_half_precision_logits_are_averaged_in_float32():
    logits = torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16, requires_grad=True)
    side, columns = groups_of([2], [2]).student, torch.tensor([[0]])
    rows = StudentRows(logits, torch.zeros(2, dtype=torch.int64))
    result = group_means(rows.columns(columns[side.group]), side)
    result.sum().backward()
    for values in (result, group_means(gather(logits, columns, side), side)):
        assert values.dtype == torch.float32 and values.item() == 0.5 + 2.0**-10
    assert logits.grad.tolist() == [[0.5], [0.5]]
