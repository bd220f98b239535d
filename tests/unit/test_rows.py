"""Whatever is read of the student's rows has the values and gradients of plain autograd on whole logits."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from modeling.losses import logits as logits_module
from modeling.losses.divergences import kl_rows
from modeling.losses.logits import ChunkedLogits, PickedRows, as_float, chunk_rows, entropy, loss_memory
from modeling.losses.rows import StudentRows
from tests.reference import cdm_oracle
from tests.unit.helpers import DTYPES, Headed, Made, assert_same, gradients, random_logits

R, V = 11, 13
LABELS = torch.arange(R) % V
SETS = torch.tensor([1, 4, 5, 12]), torch.tensor([4])
COLUMNS = torch.stack([LABELS, LABELS, 0 * LABELS], dim=1)  # one of them twice


def kl(student, teacher):
    return kl_rows(teacher, student, 2.0)


def two_numbers(student):
    return torch.stack([student.sin().sum(-1), student.amax(-1)], -1)


def reads_of(logits, teacher):
    """Every kind of reading: a divergence, two numbers a row, three columns, the cross-entropy, two sets of
    tokens; each `[R, c]`."""
    rows = StudentRows(logits, LABELS)
    masses = torch.stack([rows.log_mass(ids) for ids in SETS], 1)
    return rows.read(kl, teacher)[:, None], rows.read(two_numbers), rows.columns(COLUMNS), rows.ce[:, None], masses


def all_reads(logits, teacher):
    """`[R, 9]`"""
    return torch.cat(reads_of(logits, teacher), dim=1)


def plainly(logits, teacher):
    log_p, log_q = (z.double().div(2).log_softmax(-1) for z in (teacher, logits))
    z = logits.double()
    ce = F.cross_entropy(z, LABELS, reduction="none")
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)
    masses = torch.stack([z.log_softmax(-1)[:, ids].logsumexp(-1) for ids in SETS], 1)
    numbers = z.sin().sum(-1, True), z.amax(-1, True), z.gather(1, COLUMNS)
    return torch.cat([kl[:, None], *numbers, ce[:, None], masses], dim=1)


def student(**options):
    return Headed(0, R, V, **options)


def teacher(**options):
    return Headed(9, R, V, requires_grad=False, **options)


HEADS = ({}, {"cap": 3.0}, {"multiplier": 0.25, "bias": False}, {"divisor": 4.0, "cap": 2.0})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_plain_autograd(chunk, head, monkeypatch):
    """Of whole logits, a view of a padded head, and of logits in chunks, on one side or both."""
    monkeypatch.setattr(logits_module, "CPU_ROWS", chunk)
    s, t = student(**head), teacher(**head)
    expected = plainly(s.whole(), t.whole())
    for logits in (s.whole(), s.chunked(chunk)):
        for other in (t.whole(), t.chunked(chunk)):
            assert_same(all_reads(logits, other), expected, *s.leaves, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    logits, t = random_logits(R, V, dtype=torch.float64, requires_grad=True), teacher().whole()
    assert torch.autograd.gradcheck(lambda z: all_reads(z, t), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_float32_and_the_gradient_is_in_the_dtype_of_the_logits(dtype, small_chunks):
    t = random_logits(R, 256, seed=1, dtype=dtype)[:, :250]
    padded = random_logits(R, 272, dtype=dtype, requires_grad=True)
    exact = padded.detach().double().requires_grad_()
    got, expected = all_reads(padded[:, :250], t), plainly(exact[:, :250], t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,), (wanted,) = gradients(got, [padded]), gradients(expected, [exact])
    assert gradient.dtype == dtype and not gradient[:, 250:].any()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def test_cross_entropy_by_hand():
    # softmax(ln 3, 0) = (3/4, 1/4)
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    ce = StudentRows(logits, torch.tensor([0, 1, 1])).ce
    ce.sum().backward()
    assert ce.tolist() == pytest.approx([math.log(4 / 3), math.log(4), math.log(2)], abs=1e-6)
    assert logits.grad.flatten().tolist() == pytest.approx([-1 / 4, 1 / 4, 3 / 4, -3 / 4, 1 / 2, -1 / 2], abs=1e-6)


def test_cross_entropy_of_a_real_vocabulary():
    """As exact as float32 can hold it: torch's own cross-entropy is several times as far off."""
    logits = random_logits(48, 151_665, dtype=torch.float32, requires_grad=True)
    exact, labels = logits.detach().double().requires_grad_(), torch.arange(48) * 3001
    ce, expected = StudentRows(logits, labels).ce.double().sum(), F.cross_entropy(exact, labels, reduction="sum")
    assert ce.item() == pytest.approx(expected.item(), rel=1e-7)
    (gradient,), (wanted,) = torch.autograd.grad(ce, logits), torch.autograd.grad(expected, exact)
    assert (gradient - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("chunked", [False, True])
def test_no_rows(chunked):
    s = Headed(0, 0, V)
    rows = StudentRows(s.chunked() if chunked else s.whole(), LABELS[:0])
    values = rows.read(kl, torch.zeros(0, V)), rows.read(two_numbers), rows.columns(COLUMNS[:0]), rows.ce
    assert [value.shape for value in values] == [(0,), (0, 2), (0, 3), (0,)] and rows.entropy().shape == (0,)
    sum(value.sum() for value in values).backward()
    assert s.hidden.grad.shape == (0, 3) and not s.weight.grad.any() and not s.bias.grad.any()


# ------------------------------------------------------------------------------------------------- passes and memory


def test_one_pass_gives_the_cross_entropy_too():
    """Whatever comes first; each further read is one pass more."""
    made = []

    def head(hidden):
        made.append(len(hidden))
        return hidden

    hidden = random_logits(R, V, dtype=torch.float64)
    expected = F.cross_entropy(hidden, LABELS, reduction="none")
    for first in (StudentRows.entropy, lambda rows: rows.read(two_numbers), lambda rows: rows.ce):
        made.clear()
        rows = StudentRows(ChunkedLogits(hidden, head, V, 4), LABELS)
        first(rows)
        torch.testing.assert_close(rows.ce, expected)
        assert rows.ce is rows.ce and sum(made) == R
        rows.read(two_numbers)
        assert sum(made) == 2 * R


def test_only_the_logits_are_kept_for_the_backward_pass():
    kept = []
    logits = random_logits(40, 50, requires_grad=True)
    rows = StudentRows(logits, torch.arange(40))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rows = StudentRows(logits, torch.arange(40))
        rows.ce, rows.read(two_numbers), rows.columns(torch.zeros(40, 2, dtype=torch.int64))
    assert kept == [logits.data_ptr()]


def test_all_reads_share_one_gradient():
    """However many there are, one tensor of the size of the logits is made, in the backward pass."""
    logits, t = random_logits(R, V, requires_grad=True), random_logits(R, V, seed=1)
    with Made() as forward:
        values = all_reads(logits, t)
    with Made() as backward:
        values.sum().backward()
    assert forward.shapes.count((R, V)) == 0 and backward.shapes.count((R, V)) == 1


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_more_than_a_chunk_of_chunked_logits_is_ever_made(chunk):
    s, t = student(), teacher()
    with Made() as made:
        all_reads(s.chunked(chunk), t.chunked(chunk)).sum().backward()
    assert max(shape[0] for shape in made.shapes if len(shape) == 2 and shape[1] in (V, V + 2)) == chunk


def test_how_many_rows_a_chunk_has():
    on_cpu, on_gpu = torch.device("cpu"), torch.device("cuda")
    assert [chunk_rows(n, 1, on_cpu) for n in (0, 1, 512, 513, 6400)] == [8, 8, 8, 9, 100]
    assert chunk_rows(10, 10**9, on_gpu) == 1
    assert chunk_rows(2000, 2**18, on_gpu) == 1000  # a GiB holds 1,024 such rows
    with loss_memory(0.5):
        assert [chunk_rows(n, 2**18, on_gpu) for n in (0, 1, 512, 513, 1025)] == [1, 1, 512, 257, 342]
        assert chunk_rows(513, 2**18, on_cpu) == 257  # said by name, it holds on a CPU too


# ------------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("chunked", [False, True])
def test_what_the_loss_does_not_use_costs_nothing(chunked, small_chunks):
    s, calls = student(), []

    def counted(rows):
        calls.append(len(rows))
        return rows.sum(-1)

    def rows_of():
        rows = StudentRows(s.chunked() if chunked else s.whole(), LABELS)
        return rows, rows.read(counted), rows.columns(COLUMNS)

    expected = {"ce": F.cross_entropy(s.whole(), LABELS, reduction="none"), "columns": s.whole().gather(1, COLUMNS)}
    for name, wanted in expected.items():
        rows, _, columns = rows_of()
        calls.clear()
        assert_same({"ce": rows.ce, "columns": columns}[name], wanted, *s.leaves, rtol=1e-9, atol=1e-9)
        assert not calls


@pytest.mark.parametrize("chunked", [False, True])
def test_a_graph_may_be_gone_through_again(chunked, small_chunks):
    """With other weights, and other reads among those that the loss uses."""
    s, t = student(), teacher()
    got = reads_of(s.chunked() if chunked else s.whole(), t.whole())
    expected = plainly(s.whole(), t.whole()).split([1, 2, 3, 1, 2], dim=1)
    for used in ((0, 1, 2, 3), (3,), (0,), (1, 2, 3)):
        both = (torch.cat([parts[i] for i in used], dim=1) for parts in (got, expected))
        assert_same(*both, *s.leaves, rtol=1e-9, atol=1e-9)


def test_other_arguments_may_not_want_a_gradient():
    rows, others = StudentRows(student().whole(), LABELS), Headed(5, R, V)
    frozen = Headed(5, R, V)
    frozen.hidden = frozen.hidden.detach()
    for other in (others.whole(), others.chunked(), PickedRows(others.whole(), LABELS), frozen.chunked()):
        with pytest.raises(ValueError, match="only the student's logits get a gradient"):
            rows.read(kl, other)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_a_row_function_that_closes_over_something_to_be_trained_is_refused(chunked, derived):
    """In the backward pass, where it would be dropped."""
    s, factor = student(), torch.ones(V, dtype=torch.float64, requires_grad=True)
    used = factor.exp() if derived else factor
    rows = StudentRows(s.chunked() if chunked else s.whole(), LABELS)
    value = rows.read(lambda z: (z * used).sum(-1))
    with pytest.raises(ValueError, match="reads a tensor that wants a gradient"):
        (value.sum() + rows.ce.sum()).backward()
    assert factor.grad is None


def test_without_a_gradient_nothing_is_kept():
    t = teacher()
    for logits in (t.whole(), t.chunked()):
        values = all_reads(logits, t.whole())
        assert not values.requires_grad
        torch.testing.assert_close(values, plainly(t.whole(), t.whole()))


def test_frozen_weights_get_no_gradient():
    s = student()
    for leaf in s.leaves[1:]:
        leaf.requires_grad_(False)
    assert_same(all_reads(s.chunked(), teacher().whole()), plainly(s.whole(), teacher().whole()), s.hidden)
    all_reads(s.chunked(), teacher().whole()).sum().backward()
    assert s.weight.grad is None and s.bias.grad is None


def test_rows_without_a_linear_head():
    """Stored top logits are made dense by a function that has no weights."""
    s, t = student(), teacher()
    made = ChunkedLogits(t.hidden, lambda hidden: t.head(hidden), V, 4)
    assert_same(all_reads(s.whole(), made), plainly(s.whole(), t.whole()), *s.leaves)
    torch.testing.assert_close(entropy(made), entropy(t.whole()))
    order = torch.tensor([3, -1, 3, 10])
    torch.testing.assert_close(PickedRows(made, order)[1:4], t.whole()[[0, 3, 10]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_multiplies_in_half_precision_gives_gradients_in_the_weights(dtype):
    """As under autocast (float32 weights), or with weights that are so themselves."""
    s, t = student(dtype=dtype), teacher(dtype=torch.float32).whole()
    chunked = replace(s.chunked(), head=replace(s.head, dtype=torch.bfloat16))
    logits = F.linear(*(part.bfloat16() for part in s.leaves))[:, :V]
    assert chunked.dtype == chunked[:3].dtype == torch.bfloat16
    torch.testing.assert_close(chunked[torch.tensor([5, 2])], logits[[5, 2]])
    got, expected = all_reads(chunked, t), all_reads(logits, t)
    torch.testing.assert_close(got, expected)
    for leaf, gradient, wanted in zip(s.leaves, gradients(got, s.leaves), gradients(expected, s.leaves)):
        assert gradient.dtype == leaf.dtype == dtype
        # Weights' gradients are summed in another order, and rounded once.
        torch.testing.assert_close(gradient, wanted, rtol=3e-2, atol=3e-2)


# ----------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize("n_rows", [1, 8, 21, 600])  # one chunk, exactly one, several, larger ones
def test_entropy_equals_the_explicit_sum(n_rows):
    logits = random_logits(n_rows, 30)
    result = entropy(logits)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(cdm_oracle.entropies(logits), rel=1e-5, abs=1e-6)
    assert torch.equal(StudentRows(logits, torch.zeros(n_rows, dtype=torch.int64)).entropy(), result)


def test_entropy_by_hand():
    # uniform over 4: ln 4; (3/4, 1/4): 3/4 ln(4/3) + 1/4 ln 4 = 0.562335; one certain token: 0
    logits = torch.tensor([[7.0, 7, 7, 7], [math.log(3), 0, -200, -200], [300, 0, 0, 0]])
    assert entropy(logits).tolist() == pytest.approx([math.log(4), 0.562335, 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_of_half_precision_and_padded_heads_is_a_float32_constant(dtype):
    padded = random_logits(9, 2010, dtype=dtype, requires_grad=True)
    for values in (entropy(padded[:, :2000]), StudentRows(padded[:, :2000], torch.arange(9)).entropy()):
        assert values.dtype == torch.float32 and not values.requires_grad
        torch.testing.assert_close(values, entropy(as_float(padded.detach())[:, :2000].contiguous()))
