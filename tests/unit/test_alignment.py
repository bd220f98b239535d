"""Aligned groups: by hand, by the oracles, in one byte a cell; and what is counted about them."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.losses.alignment import entropy_weights
from modeling.text.alignment import (
    Groups,
    aligned_tokens,
    byte_groups,
    dtw_groups,
    one_to_one_tokens,
    same_index_rows,
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


def weights_of(entropy, lengths):
    """Of examples of so many tokens, one after another."""
    example = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return entropy_weights(entropy, example, len(lengths))


class TestEntropyWeights:
    def test_hand_computed(self):
        # h = 0: 3σ(−2) + 3 = 3.36; h = 0.5: 3σ(0) + 3 = 4.5; h = 1: 3σ(2) + 3 = 5.64
        assert weights_of(torch.tensor([1.0, 2.0, 3.0]), [3]).tolist() == [3, 4, 5]

    def test_thresholds(self):
        # σ(4h − 2) reaches 1/3 at h = 0.5 − ln(2)/4 = 0.3267, and 2/3 at h = 0.6733
        h = torch.tensor([0.0, 0.326, 0.327, 0.673, 0.674, 1.0])
        assert weights_of(h, [6]).tolist() == [3, 3, 4, 4, 5, 5]

    def test_of_no_response(self):
        assert weights_of(torch.zeros(0), []).tolist() == []

    def test_every_example_has_its_own_range(self):
        values = torch.tensor([0.0, 1.0, 10.0, 10.0, 10.0, 5.0, 100.0, 200.0])
        weights = weights_of(values, [2, 3, 1, 2])
        assert weights.tolist() == [3, 5, 3, 3, 3, 3, 3, 5]
        assert not weights.is_floating_point()

    @given(st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=4))
    @settings(max_examples=40, deadline=None)
    def test_equals_the_oracle(self, seed, lengths):
        values = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = [w for part in values.split(lengths) for w in oracle.weights(part.tolist())]
        assert weights_of(values, lengths).tolist() == expected


class TestDtwGroups:
    @pytest.mark.parametrize(
        ("distance", "weights", "expected"),
        [
            ([[0, 9, 9], [9, 0, 9], [9, 9, 0]], (), ([0, 1, 2], [0, 1, 2])),
            ([[5]], (), ([0], [0])),
            ([[1, 2, 3, 4]], (), ([0], [0, 0, 0, 0])),
            ([[1], [2], [3]], (), ([0, 0, 0], [0])),
            # Teacher "today", EOS; student "to", "day", EOS.  D: 3 5 5+5 / 3+5 8 5 → the EOS pair is reached from
            # (1, 2) by a diagonal, at no cost.
            ([[3, 2, 5], [5, 5, 0]], (), ([0, 1], [0, 0, 1])),
            # A tie takes the diagonal first: all paths cost 0. From (3, 2) to (2, 1); then one column is left.
            ([[0, 0], [0, 0]], (), ([0, 1], [0, 1])),
            ([[0, 0], [0, 0], [0, 0]], (), ([0, 0, 1], [0, 1])),
            # Then the teacher step before the student step. D = [[0, 0, 5], [0, 9, 0], [5, 0, 0]]: at (3, 3) the
            # diagonal holds 9, (2, 3) and (3, 2) hold 0. By (2, 3), and on by the diagonal to (1, 2): groups
            # {t1 | s1 s2} and {t2 t3 | s3}.
            ([[0, 0, 5], [0, 9, 0], [5, 0, 0]], (), ([0, 1, 1], [0, 0, 1])),
            # Weights move the path. D with weight 1 everywhere: [[1, 3], [2, 3], [5, 3]]; at (3, 2) the diagonal (2, 1)
            # holds 2 and the teacher step (2, 2) holds 3: groups {t1 t2 | s1}, {t3 | s2}.
            ([[1, 2], [1, 2], [3, 1]], (), ([0, 0, 1], [0, 1])),
            # t2 five times as dear: D = [[1, 3], [6, 11], [9, 7]]; the diagonal holds 6 against 11.
            ([[1, 2], [1, 2], [3, 1]], ([1, 5, 1],), ([0, 0, 1], [0, 1])),
            # s1 five times as dear: D = [[5, 7], [10, 7], [25, 8]]; now (2, 2) holds 7 against 10, and comes from
            # (1, 1) by the diagonal: groups {t1 | s1}, {t2 t3 | s2}.
            ([[1, 2], [1, 2], [3, 1]], (None, [5, 1]), ([0, 1, 1], [0, 1])),
            # No overflow with the largest costs: 16-bit distances at full weight, 65535 · 25 a step.
            (np.full((3, 3), 65535, dtype=np.uint16), ([5] * 3, [5] * 3), ([0, 1, 2], [0, 1, 2])),
        ],
    )
    def test_by_hand(self, distance, weights, expected):
        assert align(distance, *weights) == expected

    def test_index_picks_rows_and_columns_of_the_table(self):
        # distinct texts: teacher "aaa", "bc", student "aaa", "b", "c"; both EOS are the last entry, at cost 0
        table = np.array([[0, 3, 3, 5], [3, 1, 1, 5], [5, 5, 5, 0]], dtype=np.uint16)
        teacher_group, student_group = dtw_groups(table, [0, 1, 0, 2], [0, 1, 2, 0, 3], [3, 4, 5, 3], [5, 4, 3, 3, 3])
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
from modeling.text.alignment import dtw_groups

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


class TestStatistics:
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


class TestGroups:
    def groups(self):
        """1–1, 2–1 and 1–1 in one response, 1–1 and 1–2 in the next; whose second group ends at other bytes."""
        ends = [(np.array([1, 2, 4, 5]), np.array([1, 4, 5])), (np.array([2, 4]), np.array([2, 3, 5]))]
        return Groups.of(ends, [map32([0, 1, 1, 2], [0, 1, 2]), map32([0, 1], [0, 1, 1])])

    def test_numbers_run_on(self):
        groups = self.groups()
        assert len(groups) == 5
        assert groups.teacher.group.tolist() == [0, 1, 1, 2, 3, 4]
        assert groups.student.group.tolist() == [0, 1, 2, 3, 4, 4]
        assert groups.teacher.size.tolist() == groups.teacher.host_size.tolist() == [1, 2, 1, 1, 1]
        assert groups.student.size.tolist() == groups.student.host_size.tolist() == [1, 1, 1, 1, 2]
        assert {t.dtype for side in (groups.teacher, groups.student) for t in (side.group, side.size)} == {torch.int64}
        assert (groups.one_to_one, groups.aligned) == (3, 4)
        assert groups.one_to_one_rows().tolist() == [0, -1, 3, 4, -1, -1]

    def test_of_no_response(self):
        groups = Groups.of([], [])
        assert len(groups) == groups.one_to_one == groups.aligned == 0
        assert groups.one_to_one_rows().tolist() == groups.to("cpu").teacher.group.tolist() == []

    def test_moving_them_is_one_transfer(self, monkeypatch):
        """To a device, and to pinned memory: their tensors stay views of one."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # where there is no accelerator
        groups = self.groups()
        for moved in (groups, groups.to(torch.device("cpu")), groups.pin_memory(), groups.to("meta")):
            tensors = [t for side in (moved.teacher, moved.student) for t in (side.group, side.size)]
            assert [t.shape for t in tensors] == [(6,), (5,), (6,), (5,)]
            assert all(t._base is moved.packed for t in tensors)
            assert (moved.one_to_one, moved.aligned, len(moved)) == (3, 4, 5)
            assert moved.student.host_size.tolist() == [1, 1, 1, 1, 2]
            if moved.packed.device.type == "cpu":
                assert [t.tolist() for t in tensors] == [
                    t.tolist() for side in (groups.teacher, groups.student) for t in (side.group, side.size)
                ]
        assert groups.pin_memory().packed is not groups.packed and groups.to("meta").packed.device.type == "meta"


def map32(*groups):
    return tuple(np.array(group, dtype=np.int32) for group in groups)


def test_rows_of_the_same_index():
    assert same_index_rows([(2, 3), (0, 0), (4, 2), (1, 1)]).tolist() == [0, 1, -1, 2, 3, 6]
    assert same_index_rows([]).tolist() == []
    assert same_index_rows([(0, 0)]).dtype == np.int64
