import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling import divergences
from modeling.divergences import chunk_rows, cross_entropy, in_row_chunks, kl_divergence, restricted_kl

LN2, LN3 = math.log(2), math.log(3)


def random_logits(*shape, seed=0, dtype=torch.float32, requires_grad=False):
    values = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(requires_grad)


def explicit_kl(p_logits, q_logits, temperature):
    """τ² Σ p (log p − log q), entry by entry, differentiable."""
    rows = []
    for p_row, q_row in zip(p_logits / temperature, q_logits / temperature):
        p, q = p_row.exp() / p_row.exp().sum(), q_row.exp() / q_row.exp().sum()
        rows.append(temperature**2 * sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q)))
    return torch.stack(rows)


class TestInRowChunks:
    def test_one_chunk_is_a_small_share_of_the_rows(self):
        assert [chunk_rows(torch.zeros(1, 1), n) for n in (0, 1, 512, 513, 6400)] == [8, 8, 8, 9, 100]

    @pytest.mark.parametrize("chunk", [1, 2, 5, 7, 8])
    def test_value_and_gradient_do_not_depend_on_the_chunk(self, chunk, monkeypatch):
        monkeypatch.setattr(divergences, "MIN_CHUNK_ROWS", chunk)
        a = random_logits(7, 4, seed=1, dtype=torch.float64, requires_grad=True)
        b = random_logits(7, 4, seed=2, dtype=torch.float64, requires_grad=True)
        weight = torch.arange(7.0, dtype=torch.float64)

        def product(x, y):
            return (x.sin() * y).sum(-1)

        result = in_row_chunks(product, a, b)
        torch.testing.assert_close(result, product(a, b))
        gradients = torch.autograd.grad((result * weight).sum(), (a, b))
        torch.testing.assert_close(gradients, torch.autograd.grad((product(a, b) * weight).sum(), (a, b)))

    def test_no_rows(self):
        empty = torch.zeros(0, 5, requires_grad=True)
        result = in_row_chunks(lambda rows: rows.sum(-1), empty)
        assert result.shape == (0,)
        result.sum().backward()
        assert empty.grad.shape == (0, 5)

    def test_only_the_logits_are_kept_for_the_backward_pass(self):
        kept = []
        logits = random_logits(40, 50, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            cross_entropy(logits, torch.zeros(40, dtype=torch.long))
        assert len(kept) == 2 and logits.data_ptr() in kept


class TestCrossEntropy:
    def test_hand_computed(self):
        # softmax(ln 3, 0) = (3/4, 1/4)
        logits = torch.tensor([[LN3, 0.0], [LN3, 0.0], [0.0, 0.0]])
        result = cross_entropy(logits, torch.tensor([0, 1, 1]))
        assert result.tolist() == pytest.approx([math.log(4 / 3), math.log(4), LN2], abs=1e-6)

    def test_value_and_gradient(self):
        logits = random_logits(20, 31, requires_grad=True)
        labels = torch.arange(20)
        result = cross_entropy(logits, labels)
        expected = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        weight = torch.linspace(-1, 2, 20)
        (gradient,) = torch.autograd.grad((result * weight).sum(), logits)
        (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), logits)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)

    def test_gradcheck(self):
        logits = random_logits(9, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(9) % 4
        assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits(self, dtype):
        logits = random_logits(12, 3000, dtype=dtype, requires_grad=True)
        labels = torch.arange(12)
        result = cross_entropy(logits, labels)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, F.cross_entropy(logits.float(), labels, reduction="none"))
        result.sum().backward()
        assert logits.grad.dtype == dtype

    def test_padded_columns_get_no_gradient(self):
        padded = random_logits(10, 16, requires_grad=True)
        cross_entropy(padded[:, :11], torch.arange(10)).sum().backward()
        assert (padded.grad[:, 11:] == 0).all()
        contiguous = padded.detach()[:, :11].contiguous().requires_grad_()
        cross_entropy(contiguous, torch.arange(10)).sum().backward()
        torch.testing.assert_close(padded.grad[:, :11], contiguous.grad)


class TestKlDivergence:
    def test_hand_computed(self):
        # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; the other way round
        # 1/2 ln(2/3) + 1/2 ln 2 = 0.143841
        p, q = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
        assert kl_divergence(p, q).item() == pytest.approx(0.130812, abs=1e-6)
        assert kl_divergence(q, p).item() == pytest.approx(0.143841, abs=1e-6)
        # τ = 2 halves the logits: twice the logits give the same p, and τ² = 4 times the divergence
        assert kl_divergence(2 * p, q, temperature=2.0).item() == pytest.approx(4 * 0.130812, abs=1e-5)

    @given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
    @settings(max_examples=20, deadline=None)
    def test_value_and_both_gradients(self, seed, temperature):
        p = random_logits(10, 7, seed=seed, requires_grad=True)
        q = random_logits(10, 7, seed=seed + 1, requires_grad=True)
        result = kl_divergence(p, q, temperature)
        expected = explicit_kl(p.double(), q.double(), temperature)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(result.sum(), (p, q))
        expected_gradients = torch.autograd.grad(expected.sum(), (p, q))
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)

    def test_gradcheck(self):
        p = random_logits(9, 5, seed=3, dtype=torch.float64, requires_grad=True)
        q = random_logits(9, 5, seed=4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a, b, 1.7), (p, q))

    def test_the_teacher_needs_no_gradient(self):
        teacher, student = random_logits(9, 5, seed=3), random_logits(9, 5, seed=4, requires_grad=True)
        for result in (kl_divergence(teacher, student), kl_divergence(student, teacher)):
            (gradient,) = torch.autograd.grad(result.sum(), student)
            torch.testing.assert_close(gradient.sum(-1), torch.zeros(9), rtol=0, atol=1e-5)
            assert gradient.abs().sum() > 0

    def test_bfloat16_and_padded_heads(self):
        teacher = random_logits(9, 300, seed=5, dtype=torch.bfloat16)
        student = random_logits(9, 280, seed=6, dtype=torch.bfloat16, requires_grad=True)
        result = kl_divergence(teacher[:, :250], student[:, :250])
        assert result.dtype == torch.float32
        expected = explicit_kl(teacher[:, :250].double(), student[:, :250].double(), 1.0)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        result.sum().backward()
        assert (student.grad[:, 250:] == 0).all()

    def test_equal_logits_are_zero_apart(self):
        logits = random_logits(5, 9, requires_grad=True)
        result = kl_divergence(logits.detach(), logits)
        result.sum().backward()
        torch.testing.assert_close(result, torch.zeros(5), rtol=0, atol=1e-6)
        torch.testing.assert_close(logits.grad, torch.zeros(5, 9), rtol=0, atol=1e-6)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
            kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


class TestRestrictedKl:
    def test_hand_computed(self):
        # the masked column, however large, leaves (3/4, 1/4) against (1/2, 1/2)
        teacher = torch.tensor([[LN3, 50.0, 0.0]])
        student = torch.tensor([[1.0, 90.0, 1.0]], requires_grad=True)
        result = restricted_kl(teacher, student, torch.tensor([[True, False, True]]))
        result.sum().backward()
        assert result.item() == pytest.approx(0.130812, abs=1e-6)
        # gradient q^S − q^T
        assert student.grad.tolist() == [pytest.approx([-0.25, 0.0, 0.25], abs=1e-6)]

    @given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
    @settings(max_examples=20, deadline=None)
    def test_equals_the_kl_of_the_kept_columns(self, seed, temperature):
        teacher = random_logits(6, 8, seed=seed)
        student = random_logits(6, 8, seed=seed + 1, requires_grad=True)
        mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[:, 0] = True
        result = restricted_kl(teacher, student, mask, temperature)
        expected = torch.cat(
            [
                explicit_kl(t[m][None].double(), s[m][None].double(), temperature)
                for t, s, m in zip(teacher, student, mask)
            ]
        )
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(result.sum(), student)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
        assert (gradient[~mask] == 0).all()

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_no_column_gives_exactly_zero(self):
        teacher = random_logits(3, 4, seed=1)
        student = random_logits(3, 4, seed=2, requires_grad=True)
        mask = torch.tensor([[True] * 4, [False] * 4, [False, True, False, False]])
        with torch.autograd.detect_anomaly(check_nan=True):
            result = restricted_kl(teacher, student, mask)
            result.sum().backward()
        # one column is a certain category on both sides
        assert result[1:].tolist() == [0.0, 0.0] and result[0] > 0
        assert (student.grad[1] == 0).all() and (student.grad[2] == 0).all()

    def test_the_teacher_is_a_constant(self):
        teacher = random_logits(3, 4, seed=1, requires_grad=True)
        student = random_logits(3, 4, seed=2, requires_grad=True)
        restricted_kl(teacher, student, torch.ones(3, 4, dtype=torch.bool)).sum().backward()
        assert teacher.grad is None and student.grad is not None

    def test_gradcheck(self):
        teacher = random_logits(4, 6, seed=1, dtype=torch.float64)
        student = random_logits(4, 6, seed=2, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3, [False] * 5 + [True]])
        assert torch.autograd.gradcheck(lambda z: restricted_kl(teacher, z, mask, 0.8), student)

    def test_half_precision_logits(self):
        teacher = random_logits(3, 50, seed=1, dtype=torch.bfloat16)
        student = random_logits(3, 50, seed=2, dtype=torch.float16)
        mask = torch.ones(3, 50, dtype=torch.bool)
        result = restricted_kl(teacher, student, mask)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, kl_divergence(teacher.float(), student.float()))


def test_cross_entropy_of_no_token_has_a_gradient_of_0():
    logits = torch.zeros(0, 5, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    cross_entropy(logits * weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert weight.grad == 0
