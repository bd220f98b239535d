import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.alignment import (
    aligned_tokens,
    byte_groups,
    concatenate_groups,
    dtw_groups,
    entropy,
    entropy_and_logsumexp,
    entropy_weights,
    group_sizes,
    one_to_one_tokens,
)
from tests.reference import cdm_oracle as oracle


def align(distance, teacher_weights=None, student_weights=None):
    """dtw_groups for a distance matrix given position by position, as lists."""
    distance = np.asarray(distance)
    n_teacher, n_student = distance.shape
    teacher_group, student_group = dtw_groups(
        distance,
        np.arange(n_teacher),
        np.arange(n_student),
        np.ones(n_teacher, dtype=np.int64) if teacher_weights is None else teacher_weights,
        np.ones(n_student, dtype=np.int64) if student_weights is None else student_weights,
    )
    assert teacher_group.dtype == student_group.dtype == np.int32
    return teacher_group.tolist(), student_group.tolist()


def as_group_numbers(groups):
    """The oracle's [(teacher positions, student positions)] as one group number per token and side."""
    teacher = [g for g, (positions, _) in enumerate(groups) for _ in positions]
    student = [g for g, (_, positions) in enumerate(groups) for _ in positions]
    return teacher, student


class TestEntropy:
    @pytest.mark.parametrize("n_rows", [1, 8, 21, 600])  # one chunk, exactly one, several, larger ones
    def test_equals_the_explicit_sum(self, n_rows):
        logits = 4 * torch.randn(n_rows, 30, generator=torch.Generator().manual_seed(0))
        result = entropy(logits)
        assert result.dtype == torch.float32 and result.shape == (n_rows,)
        assert result.tolist() == pytest.approx(oracle.entropies(logits), rel=1e-5, abs=1e-6)

    def test_hand_computed(self):
        # uniform over 4: ln 4; (3/4, 1/4): 3/4 ln(4/3) + 1/4 ln 4 = 0.562335; one certain token: 0
        logits = torch.tensor([[7.0, 7, 7, 7], [np.log(3), 0, -200, -200], [300, 0, 0, 0]])
        assert entropy(logits).tolist() == pytest.approx([np.log(4), 0.562335, 0.0], abs=1e-6)

    def test_logsumexp_of_the_same_pass(self):
        logits = torch.tensor([[0.0, 0.0, np.log(2)], [-torch.inf, 300.0, -torch.inf]])
        for dtype in (torch.float32, torch.float64):
            _, logsumexp = entropy_and_logsumexp(logits.to(dtype))
            assert logsumexp.dtype == dtype
            assert logsumexp.tolist() == pytest.approx([np.log(4), 300.0], rel=1e-6)

    def test_a_logit_of_minus_infinity_is_a_probability_of_zero(self):
        logits = torch.tensor([[0.0, -torch.inf, 0.0], [1.0, -torch.inf, -torch.inf]])
        assert entropy(logits).tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_summed_in_float32(self, dtype):
        logits = torch.randn(9, 2000, generator=torch.Generator().manual_seed(1)).to(dtype)
        result = entropy(logits)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, entropy(logits.float()), rtol=1e-6, atol=1e-6)

    def test_padded_head_and_no_gradient(self):
        padded = torch.randn(10, 40, generator=torch.Generator().manual_seed(2), requires_grad=True)
        view = padded[:, :33]
        result = entropy(view)
        assert not result.requires_grad
        torch.testing.assert_close(result, entropy(view.detach().contiguous()))


class TestEntropyWeights:
    def test_hand_computed(self):
        # h = 0: 3σ(−2) + 3 = 3.36; h = 0.5: 3σ(0) + 3 = 4.5; h = 1: 3σ(2) + 3 = 5.64
        assert entropy_weights(torch.tensor([1.0, 2.0, 3.0]), [3]).tolist() == [3, 4, 5]

    def test_thresholds(self):
        # σ(4h − 2) reaches 1/3 at h = 0.5 − ln(2)/4 = 0.3267, and 2/3 at h = 0.6733
        h = torch.tensor([0.0, 0.326, 0.327, 0.673, 0.674, 1.0])
        assert entropy_weights(h, [6]).tolist() == [3, 3, 4, 4, 5, 5]

    def test_every_example_has_its_own_range(self):
        values = torch.tensor([0.0, 1.0, 10.0, 10.0, 10.0, 5.0, 100.0, 200.0])
        weights = entropy_weights(values, [2, 3, 1, 2])
        assert weights.tolist() == [3, 5, 3, 3, 3, 3, 3, 5]
        assert not weights.is_floating_point()

    @given(st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=4))
    @settings(max_examples=40, deadline=None)
    def test_equals_the_oracle(self, seed, lengths):
        values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = [w for part in values.split(lengths) for w in oracle.weights(part.tolist())]
        assert entropy_weights(values, lengths).tolist() == expected


class TestDtwGroups:
    def test_equal_tokens_pair_up(self):
        assert align([[0, 9, 9], [9, 0, 9], [9, 9, 0]]) == ([0, 1, 2], [0, 1, 2])

    def test_one_response_token_each(self):
        assert align([[5]]) == ([0], [0])

    def test_one_against_many(self):
        assert align([[1, 2, 3, 4]]) == ([0], [0, 0, 0, 0])
        assert align([[1], [2], [3]]) == ([0, 0, 0], [0])

    def test_teacher_token_split_by_the_student(self):
        # teacher "today", EOS; student "to", "day", EOS.  D: 3 5 5+5 / 3+5 8 5 → the EOS pair is reached from
        # (1, 2) by a diagonal, at no cost.
        assert align([[3, 2, 5], [5, 5, 0]]) == ([0, 1], [0, 0, 1])

    def test_a_tie_takes_the_diagonal_first(self):
        # all paths cost 0
        assert align([[0, 0], [0, 0]]) == ([0, 1], [0, 1])
        # from (3, 2): diagonal to (2, 1), then only the first column is left
        assert align([[0, 0], [0, 0], [0, 0]]) == ([0, 0, 1], [0, 1])

    def test_a_tie_takes_the_teacher_step_before_the_student_step(self):
        # D = [[0, 0, 5], [0, 9, 0], [5, 0, 0]]: at (3, 3) the diagonal holds 9, (2, 3) and (3, 2) hold 0.
        # By (2, 3), and on by the diagonal to (1, 2): groups {t1 | s1 s2} and {t2 t3 | s3}.
        assert align([[0, 0, 5], [0, 9, 0], [5, 0, 0]]) == ([0, 1, 1], [0, 0, 1])

    def test_weights_move_the_path(self):
        # D with weight 1 everywhere: [[1, 3], [2, 3], [5, 3]]; at (3, 2) the diagonal (2, 1) holds 2 and the
        # teacher step (2, 2) holds 3: groups {t1 t2 | s1}, {t3 | s2}.
        distance = [[1, 2], [1, 2], [3, 1]]
        assert align(distance) == ([0, 0, 1], [0, 1])
        # t2 five times as dear: D = [[1, 3], [6, 11], [9, 7]]; the diagonal holds 6 against 11.
        assert align(distance, [1, 5, 1]) == ([0, 0, 1], [0, 1])
        # s1 five times as dear: D = [[5, 7], [10, 7], [25, 8]]; now (2, 2) holds 7 against 10, and comes from
        # (1, 1) by the diagonal: groups {t1 | s1}, {t2 t3 | s2}.
        assert align(distance, None, [5, 1]) == ([0, 1, 1], [0, 1])

    def test_index_picks_rows_and_columns_of_the_table(self):
        # distinct texts: teacher "aaa", "bc", student "aaa", "b", "c"; both EOS are the last entry, at cost 0
        table = np.array([[0, 3, 3, 5], [3, 1, 1, 5], [5, 5, 5, 0]], dtype=np.uint16)
        teacher_group, student_group = dtw_groups(
            table, [0, 1, 0, 2], [0, 1, 2, 0, 3], [3, 4, 5, 3], [5, 4, 3, 3, 3]
        )
        assert teacher_group.tolist() == [0, 1, 2, 3]
        assert student_group.tolist() == [0, 1, 1, 2, 3]

    def test_an_empty_side_is_refused(self):
        with pytest.raises(ValueError, match="at least one token"):
            align(np.zeros((0, 3), dtype=np.int64))

    @given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
    @settings(max_examples=150, deadline=None)
    def test_equals_the_oracle(self, seed, n_teacher, n_student, largest):
        # small distances make for many ties
        random = np.random.default_rng(seed)
        distance = random.integers(0, largest, (n_teacher, n_student), endpoint=True)
        teacher_weights, student_weights = random.integers(3, 6, n_teacher), random.integers(3, 6, n_student)
        cost = distance * teacher_weights[:, None] * student_weights
        expected = oracle.cut_at_diagonals(oracle.dtw_path(cost.tolist()))
        assert align(distance, teacher_weights, student_weights) == as_group_numbers(expected)

    @given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60))
    @settings(max_examples=50, deadline=None)
    def test_groups_are_runs_that_cover_both_sides(self, seed, n_teacher, n_student):
        distance = np.random.default_rng(seed).integers(0, 9, (n_teacher, n_student), dtype=np.int32)
        for group in map(np.array, align(distance)):
            assert group[0] == 0 and set(np.diff(group)) <= {0, 1}
        teacher_group, student_group = align(distance)
        assert teacher_group[-1] == student_group[-1]

    def test_no_overflow_with_the_largest_costs(self):
        # 16-bit distances at full weight: 65535 · 25 a step
        assert align(np.full((3, 3), 65535, dtype=np.uint16), [5] * 3, [5] * 3) == ([0, 1, 2], [0, 1, 2])

    def test_at_least_20_times_as_fast_as_the_oracle(self):
        distance = np.random.default_rng(0).integers(0, 9, (200, 200))
        align(distance)  # compiles
        start = time.perf_counter()
        expected = oracle.cut_at_diagonals(oracle.dtw_path(distance.tolist()))
        slow = time.perf_counter() - start
        fast = []
        for _ in range(5):
            start = time.perf_counter()
            result = align(distance)
            fast.append(time.perf_counter() - start)
        assert result == as_group_numbers(expected)
        assert slow > 20 * min(fast)

    def test_8192_by_8192_takes_one_byte_a_cell(self):
        program = """
import resource
import numpy as np
from modeling.alignment import dtw_groups

def run(n):
    random = np.random.default_rng(0)
    table = random.integers(0, 12, (500, 500), dtype=np.uint8)
    index = random.integers(0, 500, n)
    weights = random.integers(3, 6, n)
    teacher_group, student_group = dtw_groups(table, index, index[::-1].copy(), weights, weights)
    assert teacher_group[-1] == student_group[-1] > 0

run(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        kibibytes = int(result.stdout) // (1024 if sys.platform == "darwin" else 1)
        assert kibibytes < 80 * 1024  # 8192² bytes are 65,536 KiB


class TestByteGroups:
    def test_hand_computed(self):
        # teacher |he|llo w|orld|EOS, student |hel|lo| |w|or|ld|EOS: both end at 7, 11 and 12
        teacher_group, student_group = byte_groups([2, 7, 11, 12], [3, 5, 6, 7, 9, 11, 12])
        assert teacher_group.tolist() == [0, 0, 1, 2]
        assert student_group.tolist() == [0, 0, 0, 0, 1, 1, 2]
        assert teacher_group.dtype == student_group.dtype == np.int32

    def test_the_rest_belongs_to_the_last_group(self):
        teacher_group, student_group = byte_groups([2, 5, 9], [2, 4, 8, 10])
        assert teacher_group.tolist() == [0, 0, 0]
        assert student_group.tolist() == [0, 0, 0, 0]

    def test_without_a_common_end_there_is_one_group(self):
        teacher_group, student_group = byte_groups([1, 3], [2, 4, 6])
        assert teacher_group.tolist() == [0, 0] and student_group.tolist() == [0, 0, 0]

    def test_tokens_of_no_bytes(self):
        # the second teacher token ends where the first does, and stays with it
        teacher_group, student_group = byte_groups([2, 2, 4], [2, 4])
        assert teacher_group.tolist() == [0, 0, 1] and student_group.tolist() == [0, 1]

    @given(
        st.lists(st.booleans(), min_size=1, max_size=30), st.lists(st.booleans(), min_size=30, max_size=30)
    )
    @settings(max_examples=60, deadline=None)
    def test_equals_the_oracle(self, teacher_cuts, student_cuts):
        text = "é" + "abcdefghij" * 3
        sides = []
        for cuts in (teacher_cuts, student_cuts):
            borders = [0, *(b + 1 for b, cut in enumerate(cuts) if cut), len(text)]
            pieces = [text[a:b] for a, b in pairwise(borders)]
            vocabulary = [*pieces, "<eos>"]
            sides.append(oracle.Side(vocabulary, list(range(len(vocabulary))), None, {}, {}))
        teacher, student = sides
        expected = oracle.byte_alignment(teacher, student)
        teacher_ends, student_ends = ([end for _, end in oracle.byte_spans(side)] for side in sides)
        groups = byte_groups(teacher_ends, student_ends)
        assert (groups[0].tolist(), groups[1].tolist()) == as_group_numbers(expected)
        assert aligned_tokens(teacher_ends, student_ends, *groups).all()
        assert one_to_one_tokens(*groups).tolist() == oracle.one_to_one(expected)


class TestStatistics:
    def test_group_sizes(self):
        assert group_sizes(np.array([0, 0, 1, 2, 2, 2])).tolist() == [2, 1, 3]

    def test_one_to_one_tokens(self):
        # groups 1–1, 2–1, 1–2, 1–1
        teacher_group, student_group = np.array([0, 1, 1, 2, 3]), np.array([0, 1, 2, 2, 3])
        assert one_to_one_tokens(teacher_group, student_group).tolist() == [True, False, False, False, True]

    def test_aligned_tokens(self):
        # group 0 ends at 3 on both sides; group 1 ends at 5 and 6; group 2 starts there; group 3 is 9 … 10
        teacher_ends, teacher_group = [3, 5, 9, 10], np.array([0, 1, 2, 3])
        student_ends, student_group = [1, 3, 6, 9, 10], np.array([0, 0, 1, 2, 3])
        result = aligned_tokens(teacher_ends, student_ends, teacher_group, student_group)
        assert result.tolist() == [True, True, False, False, True]

    def test_aligned_tokens_of_a_single_group(self):
        assert aligned_tokens([4], [2, 4], np.array([0]), np.array([0, 0])).tolist() == [True, True]
        assert aligned_tokens([5], [2, 4], np.array([0]), np.array([0, 0])).tolist() == [False, False]

    @given(st.integers(0, 10**6))
    @settings(max_examples=50, deadline=None)
    def test_aligned_tokens_equals_the_oracle(self, seed):
        random = np.random.default_rng(seed)
        text = "abcdefgh" * 3
        sides = []
        for _ in range(2):
            borders = [0, *sorted(random.choice(np.arange(1, 24), random.integers(1, 15), replace=False)), 24]
            pieces = [text[a:b] for a, b in pairwise(borders)]
            sides.append(oracle.Side([*pieces, "<eos>"], list(range(len(pieces) + 1)), None, {}, {}))
        teacher, student = sides
        distance = random.integers(0, 3, (len(teacher.tokens), len(student.tokens)))
        groups = oracle.cut_at_diagonals(oracle.dtw_path(distance.tolist()))
        ends = [[end for _, end in oracle.byte_spans(side)] for side in sides]
        result = aligned_tokens(*ends, *map(np.array, as_group_numbers(groups)))
        assert result.tolist() == oracle.aligned(teacher, student, groups)


class TestConcatenateGroups:
    def test_numbers_run_on(self):
        int32 = {"dtype": np.int32}
        groups = concatenate_groups(
            [
                (np.array([0, 1, 1], **int32), np.array([0, 1], **int32)),
                (np.array([0], **int32), np.array([0, 0], **int32)),
            ]
        )
        assert len(groups) == 3
        assert groups.teacher_group.tolist() == [0, 1, 1, 2]
        assert groups.student_group.tolist() == [0, 1, 2, 2]
        assert groups.teacher_size.tolist() == [1, 2, 1]
        assert groups.student_size.tolist() == [1, 1, 2]
        tensors = groups.tensors("cpu")
        names = ("teacher_group", "student_group", "teacher_size", "student_size")
        for name, tensor in zip(names, tensors):
            assert tensor.dtype == torch.int64
            assert tensor.tolist() == getattr(groups, name).tolist()
