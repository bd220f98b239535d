import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.alignment import Groups, concatenate_groups, dtw_groups, entropy, entropy_weights, group_sizes
from modeling.contextual_mapping import (
    DirectionMap,
    contextual_kl,
    gather_group_logits,
    group_topk,
    match_pairs,
)
from tests.reference import cdm_oracle as oracle

EOS = "<eos>"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def direction_map(static, similar=None):
    """A DirectionMap from a list of ids (−1 for none) and {id: [(distance, other id), …]}."""
    rows = [sorted((similar or {}).get(v, [])) for v in range(len(static))]
    entries = [entry for row in rows for entry in row]
    return DirectionMap(
        static=np.array(static, dtype=np.int32),
        indptr=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        indices=np.array([other for _, other in entries], dtype=np.int32),
        distances=np.array([distance for distance, _ in entries], dtype=np.float32),
    )


def groups_of(teacher_sizes, student_sizes):
    sizes = np.array(teacher_sizes), np.array(student_sizes)
    return Groups(*(np.repeat(np.arange(len(size)), size) for size in sizes), *sizes)


# Random examples, as the oracle's sides


def random_pieces(random, text):
    borders = [
        0,
        *sorted(random.choice(np.arange(1, len(text)), random.integers(0, len(text)), replace=False)),
    ]
    return [text[a:b] for a, b in zip(borders, [*borders[1:], len(text)])]


def random_batch(seed, n_examples=2, scale=2.0, rounding=None):
    """The oracle's `(teacher, student)` of some random texts, all of two common vocabularies."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("ab c"), random.integers(1, 13))) for _ in range(n_examples)]
    responses = [[random_pieces(random, text) for text in texts] for _ in range(2)]
    vocabularies = []
    for pieces in responses:
        extra = {"".join(random.choice(list("abcd "), random.integers(1, 6))) for _ in range(25)}
        vocabulary = sorted({*extra, EOS, *(piece for response in pieces for piece in response)})
        random.shuffle(vocabulary)
        vocabularies.append([str(token) for token in vocabulary])
    exact = {token: token for token in set(vocabularies[0]) & set(vocabularies[1])}
    examples = []
    for e in range(n_examples):
        sides = []
        for own, other in ((0, 1), (1, 0)):
            vocabulary = vocabularies[own]
            tokens = [vocabulary.index(piece) for piece in [*responses[own][e], EOS]]
            logits = torch.from_numpy(scale * random.standard_normal((len(tokens), len(vocabulary))))
            if rounding is not None:
                logits = logits.to(rounding).double()
            similar = oracle.similar_tokens(vocabulary, vocabularies[other], 0.3)
            sides.append(oracle.Side(vocabulary, tokens, logits, exact, similar))
        examples.append(tuple(sides))
    return examples


def arrays_of(own, other):
    ids = {token: v for v, token in enumerate(other.vocabulary)}
    static = [ids[own.match[token]] if token in own.match else -1 for token in own.vocabulary]
    similar = {
        own.vocabulary.index(token): [(distance, ids[near]) for near, distance in row.items()]
        for token, row in own.similar.items()
    }
    return direction_map(static, similar)


def dtw_of(teacher, student):
    """The fast alignment of one example, from the table of edit distances that a collator would hold."""
    sides = (teacher, student)
    distinct = [sorted(set(side.tokens)) for side in sides]
    texts = [[oracle.without_spaces(side.vocabulary[v]) for v in ids] for side, ids in zip(sides, distinct)]
    distance = np.array([[oracle.levenshtein(a, b) for b in texts[1]] for a in texts[0]])
    index = [[ids.index(v) for v in side.tokens] for side, ids in zip(sides, distinct)]
    weights = [entropy_weights(entropy(side.logits.float()), [len(side.tokens)]).numpy() for side in sides]
    return dtw_groups(distance, *index, *weights)


def fast_cdm(examples, topk, temperature, dtype=torch.float32):
    """(Σ_g |J_g| KD_g, its gradient, the ContextualKL, the groups) of a whole batch."""
    groups = concatenate_groups([dtw_of(teacher, student) for teacher, student in examples])
    teacher_logits = torch.cat([teacher.logits for teacher, _ in examples]).to(dtype)
    student_logits = torch.cat([student.logits for _, student in examples]).to(dtype).requires_grad_()
    teacher, student = examples[0]
    result = contextual_kl(
        student_logits,
        teacher_logits,
        groups,
        arrays_of(teacher, student),
        arrays_of(student, teacher),
        topk,
        temperature,
    )
    kd_sum = (torch.from_numpy(groups.student_size) * result.kd).sum()
    (gradient,) = torch.autograd.grad(kd_sum, student_logits)
    return kd_sum, gradient, result, groups


class TestAgainstTheOracle:
    @given(st.integers(0, 10**6), st.sampled_from([1, 3, 8, 1000]), st.sampled_from([0.7, 1.0, 2.0]))
    @settings(max_examples=25, deadline=None)
    def test_whole_method(self, seed, topk, temperature):
        examples = random_batch(seed)
        kd_sum, gradient, result, groups = fast_cdm(examples, topk, temperature)
        expected = [oracle.cdm(teacher, student, topk, temperature) for teacher, student in examples]

        sizes = [(len(i), len(j)) for e in expected for i, j in e.groups]
        assert list(zip(groups.teacher_size, groups.student_size)) == sizes
        assert result.kd.dtype == torch.float32
        assert result.kd.tolist() == pytest.approx([x for e in expected for x in e.kd], rel=1e-5, abs=1e-5)
        assert result.mapped_rate.tolist() == pytest.approx([x for e in expected for x in e.mapped_rate])
        assert result.teacher_mass.tolist() == pytest.approx(
            [x for e in expected for x in e.teacher_mass], rel=1e-5, abs=1e-6
        )
        assert kd_sum.item() == pytest.approx(sum(e.kd_sum for e in expected), rel=1e-5, abs=1e-5)
        expected_gradient = torch.cat([e.gradient for e in expected])
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)

    def test_the_random_examples_reach_every_kind_of_match(self):
        kinds = {"static": 0, "contextual": 0, "none": 0, "several tokens": 0}
        for seed in range(10):
            for teacher, student in random_batch(seed):
                for i, j in oracle.align(teacher, student):
                    kinds["several tokens"] += len(i) > 1 or len(j) > 1
                    rows = teacher.logits[i].mean(0), student.logits[j].mean(0)
                    tops = [
                        oracle.top_tokens(row, side.vocabulary, 8)
                        for row, side in zip(rows, (teacher, student))
                    ]
                    static = sum(token in teacher.match for token in tops[0])
                    found = len(oracle.pairs(teacher, *tops))
                    kinds["static"] += static
                    kinds["contextual"] += found - static
                    kinds["none"] += len(tops[0]) - found
        assert min(kinds.values()) >= 20

    @pytest.mark.parametrize("seed", range(5))
    def test_bfloat16_logits(self, seed):
        # rounded logits are full of ties, which both sides must decide alike
        examples = random_batch(seed, scale=0.2, rounding=torch.bfloat16)
        kd_sum, gradient, result, _ = fast_cdm(examples, 6, 1.0, dtype=torch.bfloat16)
        expected = [oracle.cdm(teacher, student, 6, 1.0) for teacher, student in examples]
        assert result.kd.dtype == torch.float32 and gradient.dtype == torch.bfloat16
        assert kd_sum.item() == pytest.approx(sum(e.kd_sum for e in expected), rel=1e-5, abs=1e-5)
        expected_gradient = torch.cat([e.gradient for e in expected])
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-2, atol=2e-3)

    def test_float64_stays_float64(self):
        examples = random_batch(11)
        kd_sum, gradient, _, _ = fast_cdm(examples, 8, 1.5, dtype=torch.float64)
        expected = [oracle.cdm(teacher, student, 8, 1.5) for teacher, student in examples]
        assert kd_sum.item() == pytest.approx(sum(e.kd_sum for e in expected), rel=1e-12)
        torch.testing.assert_close(
            gradient, torch.cat([e.gradient for e in expected]), rtol=1e-10, atol=1e-12
        )

    def test_given_groups(self):
        # the byte alignment, or any other, only replaces the groups
        teacher, student = random_batch(3, n_examples=1)[0]
        byte = oracle.byte_alignment(teacher, student)
        expected = oracle.cdm(teacher, student, 8, 1.0, groups=byte)
        result = contextual_kl(
            student.logits.float(),
            teacher.logits.float(),
            groups_of([len(i) for i, _ in byte], [len(j) for _, j in byte]),
            arrays_of(teacher, student),
            arrays_of(student, teacher),
            topk=8,
        )
        assert result.kd.tolist() == pytest.approx(expected.kd, rel=1e-5, abs=1e-5)
        assert all(expected.aligned)


class TestContextualKlByHand:
    def test_one_pair_of_tokens(self):
        # Top 2 of both sides are ids 0 and 1, crosswise the same. q^T = (3/4, 1/4), q^S = (1/2, 1/2) in both
        # directions: KD = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812. Gradient of each half: (q^S − q^T) / 2.
        teacher = torch.tensor([[math.log(3), 0.0, -9.0]])
        student = torch.tensor([[2.0, 2.0, -9.0, -9.0]], requires_grad=True)
        result = contextual_kl(
            student,
            teacher,
            groups_of([1], [1]),
            direction_map([1, 0, -1]),
            direction_map([1, 0, -1, -1]),
            topk=2,
        )
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812], abs=1e-6)
        assert student.grad[0].tolist() == pytest.approx([0.25, -0.25, 0.0, 0.0], abs=1e-6)
        assert result.mapped_rate.tolist() == [1.0]
        # 4 of 4 + e⁻⁹
        assert result.teacher_mass.tolist() == pytest.approx([4 / (4 + math.exp(-9))], abs=1e-6)

    def test_means_of_several_tokens(self):
        # The same mean logits, of two tokens a side: each student token has half the gradient.
        teacher = torch.tensor([[2 * math.log(3), 5.0, -9.0], [0.0, -5.0, -9.0]])
        student = torch.tensor([[4.0, 0.0, -9.0, -9.0], [0.0, 4.0, -9.0, -9.0]], requires_grad=True)
        result = contextual_kl(
            student,
            teacher,
            groups_of([2], [2]),
            direction_map([1, 0, -1]),
            direction_map([1, 0, -1, -1]),
            topk=2,
        )
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812], abs=1e-6)
        assert student.grad.tolist() == [pytest.approx([0.125, -0.125, 0.0, 0.0], abs=1e-6)] * 2

    def test_a_student_token_in_two_pairs_counts_twice(self):
        # Both teacher tokens map to student token 0: there are two categories, and q^S = (1/2, 1/2) whatever
        # its logit. q^T = (3/4, 1/4): KL = 0.130812, halved since the other direction is empty; no gradient.
        teacher = torch.tensor([[math.log(3), 0.0, -9.0]])
        student = torch.tensor([[5.0, 1.0, 0.0]], requires_grad=True)
        result = contextual_kl(
            student,
            teacher,
            groups_of([1], [1]),
            direction_map([0, 0, -1]),
            direction_map([-1, -1, -1]),
            topk=2,
        )
        result.kd.sum().backward()
        assert result.kd.tolist() == pytest.approx([0.130812 / 2], abs=1e-6)
        assert student.grad.abs().max() < 1e-7
        assert result.mapped_rate.tolist() == [0.5]

    def test_temperature(self):
        # τ = 2: twice the logits give the same q, and τ² = 4 times the divergence
        teacher = torch.tensor([[2 * math.log(3), 0.0, -9.0]])
        student = torch.tensor([[2.0, 2.0, -9.0]])
        maps = direction_map([1, 0, -1]), direction_map([1, 0, -1])
        result = contextual_kl(student, teacher, groups_of([1], [1]), *maps, topk=2, temperature=2.0)
        assert result.kd.tolist() == pytest.approx([4 * 0.130812], abs=1e-5)
        # the teacher's mass is that of its distribution as it is: 9 + 1 of 9 + 1 + e⁻⁹
        assert result.teacher_mass.tolist() == pytest.approx([10 / (10 + math.exp(-9))], abs=1e-6)

    def test_static_match_outside_the_students_top_k(self):
        # k = 1: teacher token 0 maps to student token 2, the student's least likely one
        teacher = torch.tensor([[3.0, 0.0, 0.0]])
        student = torch.tensor([[3.0, 2.0, 1.0]])
        result = contextual_kl(
            student,
            teacher,
            groups_of([1], [1]),
            direction_map([2, -1, -1]),
            direction_map([-1, -1, 0]),
            topk=1,
        )
        assert result.mapped_rate.tolist() == [0.5]
        assert result.kd.tolist() == [0.0]  # one category is certain on both sides
        assert result.teacher_mass.item() == pytest.approx(math.exp(3) / (math.exp(3) + 2), rel=1e-6)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_no_pairs_at_all(self):
        student = torch.randn(3, 5, generator=generator(0), requires_grad=True)
        teacher = torch.randn(2, 4, generator=generator(1))
        with torch.autograd.detect_anomaly(check_nan=True):
            result = contextual_kl(
                student, teacher, groups_of([1, 1], [2, 1]), direction_map([-1] * 4), direction_map([-1] * 5)
            )
            result.kd.sum().backward()
        for values in (result.kd, result.mapped_rate, result.teacher_mass):
            assert values.tolist() == [0.0, 0.0]
        assert (student.grad == 0).all()

    def test_k_is_never_more_than_the_smaller_vocabulary(self):
        # V_T = 3: 3 candidates of 6 student tokens; all map, so the rate is 1
        student = torch.randn(1, 6, generator=generator(0))
        teacher = torch.randn(1, 3, generator=generator(1))
        maps = direction_map([0, 1, 2]), direction_map([0, 1, 2, 0, 1, 2])
        assert contextual_kl(student, teacher, groups_of([1], [1]), *maps, topk=100).mapped_rate.tolist() == [
            1.0
        ]


class TestContextualKlGradient:
    def batch(self, dtype=torch.float32):
        student = 2 * torch.randn(7, 12, generator=generator(5), dtype=dtype)
        teacher = 2 * torch.randn(6, 10, generator=generator(6), dtype=dtype)
        teacher_map = direction_map(
            [3, -1, 0, 5, -1, 7, -1, 11, 2, -1], {1: [(0.1, 1), (0.1, 4)], 4: [(0.2, 8)]}
        )
        student_map = direction_map(
            [2, -1, 8, 0, -1, 3, -1, 5, -1, -1, -1, 7], {1: [(0.1, 1)], 8: [(0.2, 4)]}
        )
        return student, teacher, groups_of([1, 3, 1, 1], [2, 1, 3, 1]), teacher_map, student_map

    def test_gradcheck(self):
        student, *rest = self.batch(torch.float64)
        student.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z: contextual_kl(z, *rest, topk=5, temperature=1.3).kd, student
        )

    def test_only_what_step_5_reads_has_a_gradient(self):
        student, teacher, groups, *maps = self.batch()
        student.requires_grad_()
        teacher.requires_grad_()
        result = contextual_kl(student, teacher, groups, *maps, topk=3)
        assert not result.mapped_rate.requires_grad and not result.teacher_mass.requires_grad
        result.kd.sum().backward()
        assert teacher.grad is None
        # at most 2k columns of a token are read
        assert (student.grad != 0).sum(1).max() <= 6
        assert (student.grad != 0).any()

    def test_padded_heads(self):
        student, teacher, groups, *maps = self.batch()
        student.requires_grad_()
        expected = contextual_kl(student, teacher, groups, *maps, topk=5)
        expected.kd.sum().backward()
        # padding larger than every logit: it must not be seen
        padded_student = torch.cat([student.detach(), torch.full((7, 5), 99.0)], dim=1).requires_grad_()
        padded_teacher = torch.cat([teacher, torch.full((6, 3), 99.0)], dim=1)
        result = contextual_kl(padded_student[:, :12], padded_teacher[:, :10], groups, *maps, topk=5)
        result.kd.sum().backward()
        torch.testing.assert_close(result.kd, expected.kd)
        torch.testing.assert_close(result.teacher_mass, expected.teacher_mass)
        torch.testing.assert_close(padded_student.grad[:, :12], student.grad)
        assert (padded_student.grad[:, 12:] == 0).all()

    def test_wrong_sizes_are_refused(self):
        student, teacher, groups, *maps = self.batch()
        with pytest.raises(
            ValueError, match="knows 12 student tokens, but the student logits have 11 columns"
        ):
            contextual_kl(student[:, :11], teacher, groups, *maps)
        with pytest.raises(ValueError, match="knows 10 teacher tokens"):
            contextual_kl(student, torch.zeros(6, 13), groups, *maps)
        with pytest.raises(ValueError, match="cover 6 teacher tokens, but there are 5 rows"):
            contextual_kl(student, teacher[:5], groups, *maps)
        with pytest.raises(ValueError, match="student ids beyond"):
            contextual_kl(
                student, teacher, groups, maps[0]._replace(static=np.full(10, 12, np.int32)), maps[1]
            )


class TestGroupTopK:
    @given(
        st.integers(0, 10**6),
        st.lists(st.integers(1, 4), min_size=1, max_size=30),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    @settings(max_examples=25, deadline=None)
    def test_equals_a_stable_sort_of_the_means(self, seed, sizes, dtype):
        # few distinct values: ties everywhere, also at the last place
        random = torch.randint(-3, 4, (sum(sizes), 40), generator=generator(seed))
        logits = random.to(dtype)
        means = torch.stack([rows.float().sum(0) / len(rows) for rows in logits.split(sizes)])
        values, ids = means.sort(dim=1, descending=True, stable=True)
        result = group_topk(logits, np.array(sizes), 7, with_logsumexp=True)
        assert result.values.dtype == torch.float32 and result.ids.dtype == torch.int64
        assert torch.equal(result.ids, ids[:, :7])
        assert torch.equal(result.values, values[:, :7])
        torch.testing.assert_close(result.logsumexp, means.logsumexp(1))

    @given(
        st.integers(0, 10**6),
        st.integers(1000, 1100),  # wide enough to be searched in blocks, and seldom a multiple of one
        st.sampled_from([2, 30, 10**6]),  # distinct values
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @settings(max_examples=25, deadline=None)
    def test_wide_rows(self, seed, vocabulary, distinct, dtype):
        logits = torch.randint(0, distinct, (9, vocabulary), generator=generator(seed)).to(dtype)
        values, ids = logits.float().sort(dim=1, descending=True, stable=True)
        result = group_topk(logits, np.ones(9, dtype=np.int64), 6)
        assert torch.equal(result.ids, ids[:, :6]) and torch.equal(result.values, values[:, :6])

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_ties_at_the_last_place_take_the_lowest_ids(self, k):
        logits = torch.tensor([[0.0, 1.0, 5.0, 1.0, 1.0]])
        assert group_topk(logits, np.array([1]), k).ids.tolist() == [[2, 1, 3][:k]]

    def test_k_of_the_whole_vocabulary(self):
        logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
        assert group_topk(logits, np.array([1, 1]), 3).ids.tolist() == [[1, 2, 0], [0, 1, 2]]

    def test_one_group_longer_than_a_chunk(self):
        logits = torch.randn(700, 9, generator=generator(0))
        result = group_topk(logits, np.array([1, 650, 49]), 4)
        means = torch.stack([logits[0], logits[1:651].mean(0), logits[651:].mean(0)])
        torch.testing.assert_close(result.values, means.topk(4).values)
        assert torch.equal(result.ids, means.topk(4).indices)

    def test_no_gradient_and_any_row_stride(self):
        padded = torch.randn(20, 15, generator=generator(0), requires_grad=True)
        sizes = np.array([1] * 10 + [3] * 3 + [1])
        result = group_topk(padded[:, :11], sizes, 5)
        assert not result.values.requires_grad and result.logsumexp is None
        expected = group_topk(padded.detach()[:, :11].contiguous(), sizes, 5)
        assert torch.equal(result.ids, expected.ids) and torch.equal(result.values, expected.values)
        assert torch.equal(
            padded, torch.randn(20, 15, generator=generator(0))
        )  # the logits are left as they were

    def test_no_matrix_of_all_groups_is_built(self):
        logits = torch.randn(640, 500, generator=generator(0))
        largest = LargestTensor()
        with largest:
            group_topk(logits, np.array([2] * 320), 5, with_logsumexp=True)
        assert largest.numel <= 10 * 500  # a 64th of the rows


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches the size of every tensor that an operation creates; views of a larger one do not count."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None and not function.is_view:
                self.numel = max(self.numel, tensor.numel())
        return result


class TestMatchPairs:
    def match(self, top_ids, other_top_ids, direction, n_other_vocabulary=10):
        result = match_pairs(np.array(top_ids), np.array(other_top_ids), direction, n_other_vocabulary)
        assert result.dtype == np.int64
        return result.tolist()

    def test_id_0_is_a_real_token(self):
        # a static entry 0, a candidate of id 0, and a similar token of id 0
        direction = direction_map([0, -1], {1: [(0.2, 0)]})
        assert self.match([[0, 1]], [[0, 5]], direction) == [[0, 0]]
        assert self.match([[0, 1]], [[4, 5]], direction) == [[0, -1]]

    def test_the_static_entry_comes_first_and_needs_no_candidate(self):
        direction = direction_map([7, -1], {0: [(0.0, 3)], 1: [(0.1, 3)]})
        assert self.match([[0, 1]], [[3, 4]], direction) == [[7, 3]]

    def test_the_nearest_candidate_wins(self):
        direction = direction_map([-1], {0: [(0.1, 2), (0.2, 9), (0.25, 1)]})
        assert self.match([[0]], [[1, 9, 5]], direction) == [[9]]
        assert self.match([[0]], [[1, 5, 2]], direction) == [[2]]
        assert self.match([[0]], [[5, 6, 7]], direction) == [[-1]]

    def test_equally_near_candidates_by_rank(self):
        direction = direction_map([-1], {0: [(0.1, 2), (0.1, 6), (0.1, 8), (0.2, 4)]})
        assert self.match([[0]], [[4, 8, 2]], direction) == [[8]]
        assert self.match([[0]], [[4, 6, 8]], direction) == [[6]]

    def test_equal_distance_goes_to_the_larger_logit_then_the_lower_id(self):
        direction = direction_map([-1, -1], {0: [(0.1, 1), (0.1, 2)]})
        sizes = np.array([1, 1])
        student_top = group_topk(torch.tensor([[0.0, 3.0, 4.0], [0.0, 4.0, 4.0]]), sizes, 3).ids.numpy()
        assert self.match([[0], [0]], student_top, direction, 3) == [[2], [1]]

    def test_every_group_on_its_own(self):
        direction = direction_map([-1, -1], {0: [(0.1, 2)], 1: [(0.1, 3)]})
        assert self.match([[0, 1], [1, 0], [0, 1]], [[2, 5], [3, 5], [5, 6]], direction) == [
            [2, -1],
            [3, -1],
            [-1, -1],
        ]

    def test_the_two_sides_may_have_different_numbers_of_candidates(self):
        direction = direction_map([-1], {0: [(0.1, 2)]})
        assert self.match([[0]], [[5, 6, 7, 2]], direction) == [[2]]

    def test_unknown_ids_are_refused(self):
        with pytest.raises(ValueError, match="got 1 and 5"):
            self.match([[1]], [[5]], direction_map([-1]))
        with pytest.raises(ValueError, match="got 0 and 10"):
            self.match([[0]], [[10]], direction_map([-1]))

    @given(st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_equals_the_search_by_strings(self, seed):
        random = np.random.default_rng(seed)
        own_names, other_names = [f"a{v}" for v in range(20)], [f"b{v}" for v in range(15)]
        static = np.where(random.random(20) < 0.3, random.integers(0, 15, 20), -1)
        # few distinct distances: many ties
        similar = {
            v: [(random.integers(1, 4) / 10, u) for u in range(15) if random.random() < 0.4]
            for v in range(20)
        }
        own = oracle.Side(
            vocabulary=own_names,
            tokens=[],
            logits=None,
            match={own_names[v]: other_names[u] for v, u in enumerate(static) if u >= 0},
            similar={own_names[v]: {other_names[u]: d for d, u in row} for v, row in similar.items()},
        )
        top_ids = np.stack([random.permutation(20)[:6] for _ in range(4)])
        other_top_ids = np.stack([random.permutation(15)[:5] for _ in range(4)])
        result = self.match(top_ids, other_top_ids, direction_map(static.tolist(), similar), 15)
        for g in range(4):
            found = dict(
                oracle.pairs(
                    own, [own_names[v] for v in top_ids[g]], [other_names[u] for u in other_top_ids[g]]
                )
            )
            expected = [found.get(own_names[v]) for v in top_ids[g]]
            assert [other_names[u] if u >= 0 else None for u in result[g]] == expected


class TestGatherGroupLogits:
    def test_equals_the_columns_of_the_mean(self):
        logits = torch.randn(6, 9, generator=generator(0), dtype=torch.float64, requires_grad=True)
        group = torch.tensor([0, 1, 1, 1, 2, 2])
        columns = torch.tensor([[0, 8, 8], [-1, 3, 0], [2, 1, -1]])
        sizes = torch.from_numpy(group_sizes(group.numpy()))
        result = gather_group_logits(logits, group, sizes, columns)
        means = torch.stack([logits[:1].mean(0), logits[1:4].mean(0), logits[4:].mean(0)])
        torch.testing.assert_close(result, means.gather(1, columns.clamp(min=0)))
        assert torch.autograd.gradcheck(lambda z: gather_group_logits(z, group, sizes, columns), logits)

    def test_half_precision_logits_are_averaged_in_float32(self):
        logits = torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16, requires_grad=True)
        result = gather_group_logits(logits, torch.tensor([0, 0]), torch.tensor([2]), torch.tensor([[0]]))
        assert result.dtype == torch.float32
        assert result.item() == 0.5 + 2.0**-10
        result.sum().backward()
        assert logits.grad.tolist() == [[0.5], [0.5]]


def test_a_batch_without_responses_gives_no_groups_and_no_loss():
    student, teacher = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 7)
    to_student, to_teacher = direction_map([-1] * 7), direction_map([-1] * 5)
    result = contextual_kl(student, teacher, concatenate_groups([]), to_student, to_teacher)
    assert [len(part) for part in (result.kd, result.mapped_rate, result.teacher_mass)] == [0, 0, 0]
    assert result.kd.sum() == 0
    assert len(entropy_weights(entropy(student), [])) == 0
