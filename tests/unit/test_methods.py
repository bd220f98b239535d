"""Each method as a function of logits and a batch: against its definition, and what holds for all of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling.errors import InputError
from modeling.losses.result import Losses
from modeling.run_clm_distill_CDM import cdm_losses
from modeling.run_clm_llms_fkd import fkd_losses
from modeling.run_clm_llms_rkd import rkd_losses
from modeling.run_clm_MinED import mined_losses
from modeling.run_clm_uld import uld_losses
from tests.methods import METHODS
from tests.reference import baseline_oracles, cdm_oracle
from tests.unit.helpers import Headed, assert_same, random_logits, without_response

SHORT = 16  # characters: the oracles are slow


@pytest.fixture(autouse=True)
def _small_chunks(small_chunks):
    pass


def batch_of(pair, method, longest=None):
    """Of three rows, in so many characters each."""
    return pair.collator(method)(pair.prepared(method, slice(3), longest))


def widths(pair, method):
    """V_S and V_T."""
    return len(pair.student.forms), len(pair.teacher_of(method).forms)


def logits_for(pair, method, batch, dtype=torch.float32):
    """`(student, teacher)`: views of padded heads, the student's a leaf's."""
    sides = batch.student, batch.teacher or batch.student
    student, teacher = (
        random_logits(len(side.labels), width + 7, seed=seed, dtype=dtype)
        for seed, (side, width) in enumerate(zip(sides, widths(pair, method)))
    )
    leaf = student.requires_grad_()
    return leaf, leaf[:, : widths(pair, method)[0]], teacher[:, : widths(pair, method)[1]]


def by_example(batch, student, teacher):
    """Of each example: either side's logits, and its tokens."""
    sides = (student, batch.student), (teacher, batch.teacher)
    parts = [(z.split(side.lengths), side.labels.split(side.lengths)) for z, side in sides]
    return zip(parts[0][0], parts[1][0], (ids.tolist() for ids in parts[0][1]), (ids.tolist() for ids in parts[1][1]))


# ------------------------------------------------------------------------------------------------- their definitions


@pytest.mark.parametrize(("method", "losses", "oracle"), [("FKD", fkd_losses, "fkd"), ("RKD", rkd_losses, "rkd")])
def test_forward_and_reverse_kl(pair, method, losses, oracle):
    batch = batch_of(pair, method, SHORT)
    leaf, student, teacher = logits_for(pair, method, batch)
    got = losses(student, teacher, batch, temperature=1.5)
    expected = getattr(baseline_oracles, oracle)(teacher, student, 1.5)
    assert_same(got.kd, expected, leaf)
    assert_same(got.ce, F.cross_entropy(student.double(), batch.student.labels, reduction="none"), leaf)
    assert got.covered is None and not got.parts and not got.means


def test_universal_logit_distance(pair):
    batch = batch_of(pair, "ULD", SHORT)
    leaf, student, teacher = logits_for(pair, "ULD", batch)
    got = uld_losses(student, teacher, batch, temperature=1.5)
    examples = list(by_example(batch, student, teacher))
    assert_same(got.kd, torch.cat([baseline_oracles.uld(t, s, 1.5) for s, t, *_ in examples]), leaf)
    paired = [j < len(teacher_ids) for *_, student_ids, teacher_ids in examples for j in range(len(student_ids))]
    assert 0 < sum(paired) < len(paired)  # the rows must hold a student's token without a partner
    assert got.means == {"paired": (sum(paired), len(paired))}


def test_static_mapping(pair):
    batch, static = batch_of(pair, "MinED", SHORT), pair.mappers.static
    mapping = {v: u for v, u in enumerate(static.tolist()) if u >= 0}
    assert (static < 0).any() and 0 in mapping.values() and len(set(mapping.values())) < len(mapping)
    leaf, student, teacher = logits_for(pair, "MinED", batch)
    got = mined_losses(student, teacher, batch, static, temperature=1.5)
    kd, distilled, one_to_one = [], [], []
    for s, t, student_ids, teacher_ids in by_example(batch, student, teacher):
        groups = baseline_oracles.mined_groups(
            [pair.teacher.forms.texts[v] for v in teacher_ids], [pair.student.forms.texts[u] for u in student_ids]
        )
        targets, from_teacher = baseline_oracles.mined_targets(
            t, teacher_ids, student_ids, s.shape[1], groups, mapping, 1.5
        )
        kd.append(baseline_oracles.mined(targets, s, 1.5))
        distilled += from_teacher
        one_to_one += cdm_oracle.one_to_one(groups)
    assert 0 < sum(distilled) < sum(one_to_one) < len(one_to_one)
    assert_same(got.kd, torch.cat(kd), leaf)
    assert {name: (int(total), n) for name, (total, n) in got.means.items()} == {
        "distilled": (sum(distilled), len(distilled)),
        "one_to_one": (sum(one_to_one), len(one_to_one)),
        "aligned": (batch.groups.aligned, len(one_to_one)),
    }


def test_where_nothing_maps_the_target_is_the_token_to_be_predicted(pair):
    """The very token that cross-entropy asks for at the position, and not the next one."""
    batch = batch_of(pair, "MinED")
    leaf, student, teacher = logits_for(pair, "MinED", batch)
    nothing = torch.full((teacher.shape[1],), -1)
    nothing[0] = 1  # <unk>, which no text holds
    got = mined_losses(student, teacher, batch, nothing, temperature=1.0)
    assert_same(got.kd, got.ce, leaf)
    assert got.means["distilled"][0] == 0


def test_a_token_that_maps_to_id_0_is_distilled(pair):
    """Every teacher token maps to student token 0: where that is the token in the text, the target is all on it."""
    batch = batch_of(pair, "MinED")
    _, student, teacher = logits_for(pair, "MinED", batch)
    assert pair.student.eos_id == 0
    got = mined_losses(student, teacher, batch, torch.zeros(teacher.shape[1], dtype=torch.int64), temperature=1.0)
    # The EOS of each of the three responses, where it is alone with the teacher's.
    assert 1 <= got.means["distilled"][0] <= 3
    torch.testing.assert_close(got.kd, got.ce)


# CDM's own definition is held to random tokenizers in test_rigs.py.


@pytest.mark.parametrize("alignment", ["CDM", "CDM, byte"])
def test_two_teachers(pair, alignment):
    """β·CDM + (1 − β)·FKD, with the gradients of both; the second teacher has the student's tokenizer."""
    batch = batch_of(pair, alignment)
    leaf, student, teacher = logits_for(pair, alignment, batch)
    second = random_logits(*student.shape, seed=5)
    got = cdm_losses(student, teacher, batch, pair.mappers.em, 20, 2.0, second, cross_weight=0.3)
    cdm = cdm_losses(student, teacher, batch, pair.mappers.em, 20, 2.0)
    log_p, log_q = ((z.double() / 2).log_softmax(-1) for z in (second, student))
    fkd = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    assert_same(got.kd_sum()[None], 0.3 * cdm.kd_sum()[None] + 0.7 * fkd[None], leaf, atol=1e-4)
    torch.testing.assert_close(got.parts["kd_cdm_loss"], cdm.kd_sum())
    torch.testing.assert_close(got.parts["kd_fkd_loss"].double(), fkd)
    assert got.means.keys() == cdm.means.keys() and not cdm.parts
    torch.testing.assert_close(got.mean(0.5), 0.5 * cdm.ce.mean() + 0.5 * got.kd_sum() / len(cdm.ce))


# ----------------------------------------------------------------------------------------------- what holds for all


def as_numbers(losses):
    """All that is logged: sums over a batch, and pairs of sums."""
    numbers = {"ce": losses.ce.sum().item(), **{name: part.item() for name, part in losses.parts.items()}}
    if losses.kd is not None:
        numbers["kd"] = losses.kd_sum().item()
    for name, (total, count) in losses.means.items():
        numbers[name], numbers[f"{name}, of"] = float(total), float(count)
    return numbers


@pytest.mark.parametrize("method", METHODS)
def test_chunked_logits_give_what_whole_ones_do(pair, method):
    """Values, what is logged, and the gradients of the hidden states and the head; either side, or both."""
    batch = batch_of(pair, method)
    sides = batch.student, batch.teacher or batch.student
    student, teacher = (
        Headed(10 * i, len(side.labels), width, requires_grad=not i, cap=4.0)
        for i, (side, width) in enumerate(zip(sides, widths(pair, method)))
    )
    losses = METHODS[method].losses
    expected = losses(student.whole(), teacher.whole(), batch, pair.mappers)
    for s, t in (
        (student.chunked(), teacher.chunked()),
        (student.whole(), teacher.chunked()),
        (student.chunked(7), teacher.whole()),
    ):
        got = losses(s, t, batch, pair.mappers)
        assert as_numbers(got) == pytest.approx(as_numbers(expected), rel=1e-9)
        values, wanted = (
            torch.cat([losses.ce, losses.ce.sum()[None] if losses.kd is None else losses.kd])
            for losses in (got, expected)
        )
        assert_same(values, wanted, *student.leaves, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_padded_heads(pair, method, dtype):
    batch = batch_of(pair, method)
    leaf, student, teacher = logits_for(pair, method, batch, dtype)
    exact = leaf.detach().float().requires_grad_()
    got, expected = (
        METHODS[method].losses(s, t, batch, pair.mappers)
        for s, t in ((student, teacher), (exact[:, : student.shape[1]], teacher.float()))
    )
    assert got.ce.dtype == torch.float32 and (got.kd is None or got.kd.dtype == torch.float32)
    assert as_numbers(got) == pytest.approx(as_numbers(expected), rel=1e-5)
    got.mean(0.3).backward()
    expected.mean(0.3).backward()
    assert leaf.grad.dtype == dtype and not leaf.grad[:, student.shape[1] :].any()
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_the_sum_of_its_examples(pair, method):
    """Also where some have no response."""
    examples = pair.prepared(method, slice(4))
    mixed = [without_response(examples[2]), *examples, without_response(examples[0])]
    batch = pair.collator(method)(mixed)
    leaf, student, teacher = logits_for(pair, method, batch)
    together = METHODS[method].losses(student, teacher, batch, pair.mappers)
    (gradient,) = torch.autograd.grad(together.mean(0.3), leaf)
    sums, gradients, start = {}, [], 0
    teacher_lengths = (batch.teacher or batch.student).lengths
    for example, t in zip(examples, teacher.split(teacher_lengths)):
        alone = pair.collator(method)([example])
        rows = leaf.detach()[start : start + len(alone.student.labels)].requires_grad_()
        start += len(rows)
        losses = METHODS[method].losses(rows[:, : student.shape[1]], t, alone, pair.mappers)
        for name, value in as_numbers(losses).items():
            sums[name] = sums.get(name, 0) + value
        (part,) = torch.autograd.grad(losses.mean(0.3) * len(rows), rows)
        gradients.append(part)
    assert as_numbers(together) == pytest.approx(sums, rel=1e-5)
    torch.testing.assert_close(gradient * len(leaf), torch.cat(gradients), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_a_response_has_no_loss_and_a_gradient(pair, method):
    """DDP wants a gradient of every parameter in every step."""
    batch = pair.collator(method)([without_response(e) for e in pair.prepared(method, slice(2))])
    weight, (student, teacher) = torch.ones(1, requires_grad=True), widths(pair, method)
    losses = METHODS[method].losses(torch.zeros(0, student) * weight, torch.zeros(0, teacher), batch, pair.mappers)
    loss = losses.mean()
    loss.backward()
    assert loss.item() == 0 and weight.grad.item() == 0
    assert all(total == count == 0 for total, count in losses.means.values())


@pytest.mark.parametrize("method", METHODS)
def test_responses_of_one_token(pair, method):
    """The EOS alone, as where a text was cut: cross-entropy is that of the one row, and all is finite."""
    examples = pair.prepared(method, slice(2))
    for example in examples:
        for side in ("", "teacher_"):
            example[f"{side}response_start"] = len(example[f"{side}input_ids"]) - 1
            example[f"{side}byte_ends"], example[f"{side}byte_start"] = [1], 0
    batch = pair.collator(method)(examples)
    _, student, teacher = logits_for(pair, method, batch)
    losses = METHODS[method].losses(student, teacher, batch, pair.mappers)
    expected = [-student[i].double().log_softmax(-1)[pair.student.eos_id].item() for i in range(2)]
    assert losses.ce.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.kd is None or (losses.kd >= 0).all()
    assert losses.means.get("one_to_one", (2, 2)) == losses.means.get("aligned", (2, 2)) == (2, 2)
    assert losses.means.get("coverage", (0, 2)) == (0, 2)  # of text


@pytest.mark.parametrize("method", METHODS)
def test_sides_that_predict_nothing(pair, method):
    """All logits are equal."""
    batch = batch_of(pair, method)
    _, student, teacher = logits_for(pair, method, batch)
    losses = METHODS[method].losses(student * 0 + 2.5, teacher * 0 - 1.5, batch, pair.mappers)
    assert losses.ce.tolist() == pytest.approx([math.log(student.shape[1])] * len(student), rel=1e-5)
    if method not in ("SFT", "ULD", "MinED", "BPM", "GOLD", "ALM"):  # which see that the vocabularies differ in size
        torch.testing.assert_close(losses.kd, torch.zeros_like(losses.kd), rtol=0, atol=1e-6)


@pytest.mark.parametrize("losses", [fkd_losses, rkd_losses])
def test_one_tokenizer_must_split_a_response_alike(pair, losses):
    examples = pair.prepared("FKD", slice(2))
    examples[1]["teacher_byte_ends"] = examples[1]["teacher_byte_ends"] + np.eye(1, len(examples[1]["byte_ends"]))[0]
    batch = pair.collator("FKD")(examples)
    _, student, teacher = logits_for(pair, "FKD", batch)
    with pytest.raises(InputError, match=f"Row {pair.FIRST_ROW + 1} of the data"):
        losses(student, teacher, batch)


def test_losses_by_hand():
    losses = Losses(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 0.5]), torch.tensor([1, 2]))
    assert losses.kd_sum().item() == 5.0
    assert losses.mean().item() == pytest.approx((4.5 + 2.5) / 3)
    assert losses.mean(kd_alpha=0.1).item() == pytest.approx((0.9 + 0.9 * 5) / 3)
    assert replace(losses, covered=None).kd_sum().item() == 4.5
    assert Losses(losses.ce).mean(kd_alpha=0.1).item() == 3.0
    assert Losses(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).mean().item() == 0
