"""Numbers at the edge: infinite logits in every dtype, NaN, nothing to compare, one token, loss scaling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from get_vocab_mapper.vocab_mapper import build_em, build_mined
from modeling import finite_check
from modeling.alignment import concatenate_groups, entropy, entropy_weights
from modeling.arguments import TrainingArguments
from modeling.chunked_logits import ChunkedLogits
from modeling.contextual_mapping import DirectionMap, contextual_kl
from modeling.divergences import (
    cross_entropy,
    cross_entropy_and_kl,
    in_row_chunks,
    kl_divergence,
    kl_to_target_rows,
    moved_distribution_rows,
    restricted_kl,
    sorted_distance_rows,
)
from modeling.examples import Encoder, ResponseCollator, prepare_example
from modeling.finite_check import FiniteCheck, NotFiniteError
from modeling.output_head import OutputHead
from modeling.run_clm_distill_CDM import CDMTrainer
from modeling.run_clm_llms_fkd import FKDTrainer
from modeling.run_clm_llms_rkd import RKDTrainer
from modeling.run_clm_MinED import MinEDTrainer
from modeling.run_clm_sft import SFTTrainer
from modeling.run_clm_uld import ULDTrainer
from modeling.teacher_cache import TopKHead
from tests.unit.test_baselines import small_model
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


# ------------------------------------------------------------------------------------- a token that a model rules out
# A logit of −inf is a probability of 0. Every value and gradient must be what is left when the column is taken out.

KEPT, RULED_OUT = [0, 1, 3, 4, 6, 7, 9], [2, 5, 8]


def logits_with_holes(dtype, seed):
    z = 3 * torch.randn(11, 10, generator=torch.Generator().manual_seed(seed))
    z = z.to(dtype)
    z[:, RULED_OUT] = -INF
    return z


def fkd(student, teacher, labels):
    return cross_entropy_and_kl(student, labels, teacher, 2.0)[1]


def rkd(student, teacher, labels):
    return cross_entropy_and_kl(student, labels, teacher, 2.0, reverse=True)[1]


LOSSES = {
    "cross entropy": lambda s, t, y: cross_entropy(s, y),
    "forward KL": lambda s, t, y: kl_divergence(t, s, 2.0),
    "reverse KL": lambda s, t, y: kl_divergence(s, t, 2.0),
    "FKD": fkd,
    "RKD": rkd,
    "cross entropy beside FKD": lambda s, t, y: cross_entropy_and_kl(s, y, t, 2.0)[0],
    "ULD": lambda s, t, y: in_row_chunks(lambda a, b: sorted_distance_rows(a, b, 2.0), s, t),
    "KL to a target": lambda s, t, y: in_row_chunks(
        lambda a, b: kl_to_target_rows(b.float().softmax(-1), a, 2.0), s, t
    ),
    "restricted KL": lambda s, t, y: restricted_kl(t, s, torch.ones(s.shape, dtype=torch.bool), 2.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_columns_that_both_sides_rule_out_are_as_if_not_there(loss, dtype):
    student, teacher = logits_with_holes(dtype, 1).requires_grad_(), logits_with_holes(dtype, 2)
    labels = torch.tensor(KEPT)[torch.arange(11) % len(KEPT)]
    small = student.detach()[:, KEPT].requires_grad_()
    small_labels = torch.arange(11) % len(KEPT)
    got, expected = LOSSES[loss](student, teacher, labels), LOSSES[loss](small, teacher[:, KEPT], small_labels)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weight = torch.linspace(0.5, 2, 11)
    (gradient,) = torch.autograd.grad((weight * got).sum(), student)
    (expected_gradient,) = torch.autograd.grad((weight * expected).sum(), small)
    assert (gradient[:, RULED_OUT] == 0).all()
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient[:, KEPT], expected_gradient, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_only_the_teacher_rules_out_costs_nothing_forwards(dtype):
    """Σ p (log p − log q) with p = 0 at the token, straight from the definition."""
    student = torch.randn(4, 10, generator=torch.Generator().manual_seed(3)).to(dtype)
    teacher = logits_with_holes(dtype, 4)[:4]
    p, log_q = (teacher.double() / 2).softmax(-1), (student.double() / 2).log_softmax(-1)
    expected = 4 * torch.stack([sum(x * (x.log() - y) for x, y in zip(*row) if x > 0) for row in zip(p, log_q)])
    expected_gradient = 2 * (log_q.exp() - p)  # τ² ∂KL/∂z = τ (q − p)
    for loss in ("forward KL", "FKD", "restricted KL"):
        z = student.clone().requires_grad_()
        got = LOSSES[loss](z, teacher, torch.zeros(4, dtype=torch.int64))
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(got.sum(), z)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", ["forward KL", "FKD", "restricted KL"])
def test_a_token_that_only_the_student_rules_out_costs_infinitely_much(loss):
    """Never a large number in its place."""
    student = torch.tensor([[0.0, -INF, 1.0], [0.0, 1.0, 2.0]])
    got = LOSSES[loss](student, torch.zeros(2, 3), torch.tensor([0, 0]))
    assert got[0] == INF and torch.isfinite(got[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_nan_or_an_infinity_is_never_turned_into_a_number(loss, bad):
    clean = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    spoilt = clean.clone()
    spoilt[1, 3] = bad
    got = LOSSES[loss](spoilt, clean, torch.tensor([0, 0]))
    assert torch.isfinite(got[0]) and not torch.isfinite(got[1])
    if "cross" not in loss:
        got = LOSSES[loss](clean, spoilt, torch.tensor([0, 0]))
        assert torch.isfinite(got[0]) and not torch.isfinite(got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_with_tokens_ruled_out(dtype):
    z = logits_with_holes(dtype, 6)
    p = z.double().softmax(-1)
    expected = torch.tensor([-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()])
    torch.testing.assert_close(entropy(z), expected, rtol=1e-5, atol=1e-6)
    certain = torch.full((2, 5), -INF, dtype=dtype)
    certain[:, 2] = 7.0
    assert entropy(certain).tolist() == [0.0, 0.0]
    assert set(entropy_weights(torch.cat([entropy(z), entropy(certain)]), [11, 2]).tolist()) <= {3, 4, 5}


def test_moved_distribution_with_tokens_ruled_out():
    teacher = torch.tensor([[0.0, -INF, math.log(3.0), NAN]])
    moved = moved_distribution_rows(teacher[:, :3], torch.tensor([1, 0, 1]), 3, 1.0)
    assert moved.tolist() == [[0.0, pytest.approx(1.0), 0.0]]
    assert torch.isnan(moved_distribution_rows(teacher, torch.tensor([1, 0, 1, 2]), 3, 1.0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_contextual_kl_with_tokens_ruled_out(dtype):
    """More candidates than tokens with any probability: the value is that of the vocabularies without the others."""

    def direction(static):
        static = np.array(static, dtype=np.int32)
        nothing = np.zeros(0, dtype=np.int32)
        return DirectionMap(static, np.zeros(len(static) + 1, dtype=np.int32), nothing, nothing.astype(np.float32))

    ones = np.arange(11)
    groups = concatenate_groups([(ones, ones)])
    student, teacher = logits_with_holes(dtype, 7).requires_grad_(), logits_with_holes(dtype, 8)
    same = direction(range(10))
    got = contextual_kl(student, teacher, groups, same, same, topk=10, temperature=2.0)
    small = student.detach()[:, KEPT].requires_grad_()
    same = direction(range(len(KEPT)))
    expected = contextual_kl(small, teacher[:, KEPT], groups, same, same, topk=7, temperature=2.0)
    torch.testing.assert_close(got.kd, expected.kd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.teacher_mass, torch.ones(11), rtol=1e-5, atol=1e-6)
    got.kd.sum().backward()
    expected.kd.sum().backward()
    assert (student.grad[:, RULED_OUT] == 0).all()
    torch.testing.assert_close(student.grad[:, KEPT], small.grad, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_all_equal(dtype):
    z = torch.full((3, 8), 2.5, dtype=dtype)
    labels = torch.arange(3)
    assert entropy(z).tolist() == pytest.approx([math.log(8)] * 3)
    assert entropy_weights(entropy(z), [3]).tolist() == [3, 3, 3]  # h = 0
    for loss in LOSSES:
        student = z.clone().requires_grad_()
        got = LOSSES[loss](student, z, labels)
        (gradient,) = torch.autograd.grad(got.sum(), student)
        if "cross" in loss:
            assert got.tolist() == pytest.approx([math.log(8)] * 3)
        else:
            assert got.tolist() == pytest.approx([0.0] * 3, abs=1e-6) and gradient.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------ the trainers

TRAINERS = [SFTTrainer, FKDTrainer, RKDTrainer, ULDTrainer, MinEDTrainer, CDMTrainer]
SAME_TOKENIZER = (FKDTrainer, RKDTrainer)
FIRST_ROW = 101  # of the data file


@pytest.fixture(scope="module")
def sides():
    student, teacher = Encoder(byte_level_bpe()), Encoder(sentencepiece_bpe())
    rows = [{"row": i, "prefix": f"Say {i}: ", "text": text} for i, text in enumerate(SAMPLE_TEXTS, FIRST_ROW)]
    mappers = SimpleNamespace(
        em=build_em(teacher.forms, student.forms, progress=False),
        mined=build_mined(teacher.forms, student.forms, progress=False),
    )
    return SimpleNamespace(student=student, teacher=teacher, rows=rows, mappers=mappers)


def make_trainer(trainer_class, sides, folder, **arguments):
    options = {}
    teacher = sides.student if trainer_class in SAME_TOKENIZER else sides.teacher
    if trainer_class is not SFTTrainer:
        options = {"teacher": small_model(teacher.tokenizer, 7, seed=2), "n_teacher_tokens": len(teacher.forms)}
        options |= {"kd_alpha": 0.5, "kd_temperature": 2.0}
    if trainer_class is MinEDTrainer:
        options["teacher_to_student"] = sides.mappers.mined.teacher_to_student
    if trainer_class is CDMTrainer:
        options |= {"mapper": sides.mappers.em, "topk": 20, "alignment": "dtw"}
    trainer = trainer_class(
        model=small_model(sides.student.tokenizer, 5, seed=1),
        n_student_tokens=len(sides.student.forms),
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **arguments),
        data_collator=ResponseCollator(
            sides.student,
            None if trainer_class is SFTTrainer else teacher,
            edit_distances=trainer_class in (MinEDTrainer, CDMTrainer),
        ),
        processing_class=sides.student.tokenizer,
        **options,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def prepared(trainer, rows):
    encoders = [e for e in (trainer.data_collator.student, trainer.data_collator.teacher) if e is not None]
    return [prepare_example(row, encoders, 512) for row in rows]


def without_response(example):
    return {name: [] if name.endswith("ends") else value for name, value in example.items()}


def loss_of(trainer, examples, training=True):
    """The loss of a step of these examples, summed over their response tokens; in evaluation, its mean."""
    trainer.model.train(training)
    inputs = trainer.data_collator(examples)
    return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1 if training else None)


@pytest.mark.parametrize("trainer_class", TRAINERS)
class TestNothingUsable:
    def test_a_batch_without_a_usable_position(self, sides, tmp_path, trainer_class):
        trainer = make_trainer(trainer_class, sides, tmp_path)
        loss = loss_of(trainer, [without_response(e) for e in prepared(trainer, sides.rows[:2])])
        assert loss.item() == 0
        loss.backward()
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None and (parameter.grad == 0).all(), name

    def test_examples_without_one_add_nothing(self, sides, tmp_path, trainer_class):
        trainer = make_trainer(trainer_class, sides, tmp_path)
        full = prepared(trainer, sides.rows[:3])
        loss_of(trainer, full[1:2]).backward()
        expected = [p.grad.clone() for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        loss_of(trainer, [without_response(full[0]), full[1], without_response(full[2])]).backward()
        for parameter, gradient in zip(trainer.model.parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)

    def test_under_ddp_every_parameter_has_its_backward(self, sides, tmp_path, trainer_class):
        """DDP raises in the next forward where a parameter had no part in the last backward."""
        trainer = make_trainer(trainer_class, sides, tmp_path)
        full = prepared(trainer, sides.rows[:2])
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = DistributedDataParallel(trainer.model)
            for examples in ([without_response(e) for e in full], full, [without_response(e) for e in full]):
                inputs = trainer.data_collator(examples)
                trainer.compute_loss(model, inputs, num_items_in_batch=1).backward()
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_responses_of_one_token(sides, tmp_path, trainer_class):
    """The EOS alone, as where a text was cut: cross-entropy is that of the one logit row, and all is finite."""
    trainer = make_trainer(trainer_class, sides, tmp_path, per_device_train_batch_size=2)
    examples = prepared(trainer, sides.rows[:2])
    for example in examples:
        for side in {"": 0, "teacher_": 0} if trainer_class is not SFTTrainer else {"": 0}:
            example[f"{side}response_start"] = len(example[f"{side}input_ids"]) - 1
            example[f"{side}ends"] = [1]
    loss = loss_of(trainer, examples, training=False)
    means = trainer.eval_means.reduce(trainer.accelerator)
    expected = []
    for example in examples:
        ids = torch.as_tensor(example["input_ids"])[None]
        z = trainer.model(input_ids=ids).logits.detach()[0, -2, : trainer.n_student_tokens].double()
        expected.append(-z.log_softmax(-1)[ids[0, -1]].item())
    assert means["ce_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert torch.isfinite(loss) and means.get("kd_loss", 0) >= 0


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_models_that_predict_nothing(sides, tmp_path, trainer_class):
    """A head of zeros: all logits are equal, on both sides."""
    trainer = make_trainer(trainer_class, sides, tmp_path)
    heads = [trainer.model.lm_head] + ([] if trainer_class is SFTTrainer else [trainer.teacher.model.lm_head])
    for head in heads:
        torch.nn.init.zeros_(head.weight)
    loss_of(trainer, prepared(trainer, sides.rows[:3]), training=False)
    means = trainer.eval_means.reduce(trainer.accelerator)
    assert means["ce_loss"] == pytest.approx(math.log(trainer.n_student_tokens), rel=1e-5)
    if trainer_class in (FKDTrainer, RKDTrainer, CDMTrainer):
        assert means["kd_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(sides, tmp_path, trainer_class, dtype):
    trainer = make_trainer(trainer_class, sides, tmp_path)
    expected = loss_of(trainer, prepared(trainer, sides.rows[:2]), training=False).item()
    trainer.model.to(dtype)
    if trainer_class is not SFTTrainer:
        trainer.teacher.model.to(dtype)
    loss = loss_of(trainer, prepared(trainer, sides.rows[:2]), training=False)
    assert loss.item() == pytest.approx(expected, rel=0.05)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())


# ---------------------------------------------------------------------------------------------- NaN and infinity, told


def poison(teacher, row, column, value):
    """Puts a value into the teacher's logits."""
    logits = teacher.logits

    def poisoned(inputs):
        z = logits(inputs).clone()
        z[row if row >= 0 else len(z) + row, column] = value
        return z

    object.__setattr__(teacher, "logits", poisoned)


@pytest.mark.parametrize("trainer_class", TRAINERS[1:])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("training", [True, False])
def test_a_bad_teacher_logit_stops_with_the_row(sides, tmp_path, trainer_class, value, training):
    """In the last logit row of the second example; at a token that maps to nothing, so that no loss may read it."""
    trainer = make_trainer(trainer_class, sides, tmp_path)
    unmapped = sides.mappers.em.teacher_to_student
    column = next(v for v in range(len(unmapped)) if unmapped[v] < 0) if trainer_class not in SAME_TOKENIZER else 5
    examples = prepared(trainer, sides.rows[:2])
    poison(trainer.teacher, -1, column, value)
    trainer.state.global_step = 6
    with pytest.raises(NotFiniteError) as error:
        loss_of(trainer, examples, training)
    place = "In step 7, rank 0" if training else "In evaluation after step 6, rank 0"
    file = "train_file" if training else "validation_file"
    assert str(error.value).startswith(
        f"{place}, row {FIRST_ROW + 1} of --{file}: the teacher's logits hold a NaN or +inf. Leave the row out if "
    )
    assert "--teacher_dtype float32 or bfloat16" in str(error.value)


@pytest.mark.parametrize("trainer_class", TRAINERS[1:])
def test_a_teacher_that_rules_every_token_out(sides, tmp_path, trainer_class):
    trainer = make_trainer(trainer_class, sides, tmp_path)
    examples = prepared(trainer, sides.rows[:2])
    poison(trainer.teacher, 0, slice(None), -INF)
    with pytest.raises(NotFiniteError, match=f"row {FIRST_ROW} of --train_file: the teacher's logits"):
        loss_of(trainer, examples)


@pytest.mark.parametrize("trainer_class", [t for t in TRAINERS[1:] if t is not RKDTrainer])
def test_a_teacher_that_rules_a_token_out_is_no_fault(sides, tmp_path, trainer_class):
    """(Reverse KL is infinite there: the student gives the token some probability, and the teacher none.)"""
    trainer = make_trainer(trainer_class, sides, tmp_path)
    poison(trainer.teacher, 0, slice(20, 40), -INF)
    loss = loss_of(trainer, prepared(trainer, sides.rows[:2]))
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())


def test_a_loss_that_is_infinite_by_right_stops_too(sides, tmp_path):
    trainer = make_trainer(RKDTrainer, sides, tmp_path)
    poison(trainer.teacher, 0, slice(20, 40), -INF)
    with pytest.raises(NotFiniteError) as error:
        loss_of(trainer, prepared(trainer, sides.rows[:2]))
    assert f"one of the rows {FIRST_ROW}, {FIRST_ROW + 1} of --train_file: the loss, or what is" in str(error.value)
    with pytest.raises(NotFiniteError, match=f", row {FIRST_ROW} of --train_file: the loss"):
        loss_of(trainer, prepared(trainer, sides.rows[:1]))


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_bad_student_stops_with_the_row(sides, tmp_path, trainer_class):
    trainer = make_trainer(trainer_class, sides, tmp_path)
    examples = prepared(trainer, sides.rows[:3])
    alone = set(examples[2]["input_ids"]) - set(examples[0]["input_ids"]) - set(examples[1]["input_ids"])
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[min(alone)] = NAN
    assert torch.isfinite(loss_of(trainer, examples[:2]))
    message = f"In step 1, rank 0, row {FIRST_ROW + 2} of --train_file: the student's cross-entropy is NaN or infinite"
    with pytest.raises(NotFiniteError, match=message):
        loss_of(trainer, examples)


def test_what_is_logged_is_looked_at_too(sides, tmp_path):
    trainer = make_trainer(SFTTrainer, sides, tmp_path)
    trainer.model.train()
    trainer.record("something", torch.tensor(NAN), 1)
    with pytest.raises(NotFiniteError, match="the loss, or what is logged with it, is NaN"):
        loss_of(trainer, prepared(trainer, sides.rows[:1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_shows_every_fault(dtype):
    z = torch.zeros(5, 130, dtype=dtype)
    z[0, 128], z[1, 3], z[2, 7], z[4] = NAN, INF, -INF, -INF
    z[0, 3] = INF
    assert torch.isfinite(finite_check.largest(z[:, :129])).tolist() == [False, False, True, True, False]


def test_of_logits_that_never_exist_as_a_whole_what_they_are_made_of_is_looked_at():
    hidden = torch.zeros(4, 6)
    hidden[1, 2], hidden[2, 3], hidden[3, 4] = NAN, -INF, INF
    chunked = ChunkedLogits(hidden, OutputHead(torch.ones(9, 6)), 9, 2)
    assert torch.isfinite(finite_check.largest(chunked)).tolist() == [True, False, False, False]
    assert torch.isfinite(chunked[0:4]).all(-1).tolist() == [True, False, False, False]
    # Stored log-probabilities, their ids, and what is left for each other token, which may be nothing.
    stored = torch.tensor([[-0.7, -0.7, 4, 5, -INF], [NAN, -0.7, 4, 5, -9.0]])
    largest = finite_check.largest(ChunkedLogits(stored, TopKHead(9), 9, 2))
    assert torch.isfinite(largest).tolist() == [True, False]


class TestDeferred:
    """As on an accelerator, where looking would make every step wait: findings are looked at when it waits anyway."""

    @pytest.fixture
    def trainer(self, sides, tmp_path, monkeypatch):
        trainer = make_trainer(
            SFTTrainer,
            sides,
            tmp_path,
            logging_steps=4,
            save_steps=1,
            save_only_model=True,
            per_device_train_batch_size=1,
            max_steps=4,
            train_sampling_strategy="sequential",
        )
        trainer.train_dataset = prepared(trainer, sides.rows[:4])
        trainer.finite.deferred = True
        return trainer

    def test_nothing_is_looked_at_within_a_step(self, trainer, sides, monkeypatch):
        monkeypatch.setattr(FiniteCheck, "_first", lambda self: pytest.fail("looked"))
        with torch.no_grad():
            trainer.model.lm_head.weight.fill_(NAN)
        assert torch.isnan(loss_of(trainer, trainer.train_dataset[:2]))

    def test_a_fault_is_found_before_anything_is_saved(self, trainer, tmp_path):
        first, second, third = (set(example["input_ids"]) for example in trainer.train_dataset[:3])
        alone = third - first - second
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight[min(alone)] = NAN
        with pytest.raises(NotFiniteError, match=rf"^In step 3, rank 0, row {FIRST_ROW + 2} of --train_file: the"):
            trainer.train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    def test_and_at_the_end_of_training(self, trainer, monkeypatch):
        trainer.args.logging_steps, trainer.args.save_strategy = 100, "no"
        monkeypatch.setattr(trainer.finite, "pending", [])
        compute_loss = trainer.compute_loss
        steps = iter(range(10))

        def spoilt(model, inputs, **options):
            loss = compute_loss(model, inputs, **options)
            if next(steps) == 3:
                bad = torch.full(inputs["positions"].shape, NAN)
                trainer.require_finite(finite_check.STUDENT, inputs, bad)
            return loss

        monkeypatch.setattr(trainer, "compute_loss", spoilt)
        with pytest.raises(NotFiniteError, match=rf"^In step 4, rank 0, row {FIRST_ROW + 3} of --train_file"):
            trainer.train()

    def test_the_first_of_several_is_told(self, trainer):
        for step, bad in ((1, [False, False]), (2, [False, True]), (3, [True, True])):
            trainer.finite.add(finite_check.TEACHER, step, True, [10 * step, 10 * step + 1], torch.tensor(bad))
        with pytest.raises(NotFiniteError, match=r"^In step 2, rank 0, row 21 of"):
            trainer.finite.look_together()
        trainer.finite.look_together()  # told once

    def test_of_several_ranks_the_cause_is_told(self, trainer, monkeypatch):
        """A spoilt gradient has reached this rank by way of all the ranks' mean."""
        trainer.finite.add(finite_check.GRADIENT, 2, True, [], torch.tensor([True]))
        others = [
            finite_check.Cause(3, False, "in step 3"),
            finite_check.Cause(2, False, "in step 2, another rank's row"),
        ]
        monkeypatch.setattr(finite_check, "gather_object", lambda own: [*own, None, *others])
        with pytest.raises(NotFiniteError, match=r"^in step 2, another rank's row$"):
            trainer.finite.look_together()

    def test_what_waits_is_bounded(self, trainer, monkeypatch):
        monkeypatch.setattr(finite_check, "MOST_PENDING", 3)
        for step in range(1, 10):
            trainer.finite.add(finite_check.LOSS, step, True, [1], torch.tensor([False]))
            assert len(trainer.finite.pending) < 3


# -------------------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("trainer_class", [SFTTrainer, FKDTrainer, CDMTrainer])
def test_an_overflow_of_scaled_gradients_is_the_scalers(sides, tmp_path, trainer_class):
    """The first scale is too large by far: steps are skipped until it fits, then training goes on."""
    trainer = make_trainer(trainer_class, sides, tmp_path)
    examples = prepared(trainer, sides.rows[:2])
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8)
    before, skipped, losses = [p.detach().clone() for p in trainer.model.parameters()], 0, []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(trainer, examples)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if scaler.get_scale() < scale:
            skipped += 1
            assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    assert 1 <= skipped <= 3
    assert losses[0] == losses[skipped] > losses[-1]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_bad_gradient_stops_training_unless_the_step_was_skipped(sides, tmp_path, monkeypatch, skipped):
    trainer = make_trainer(
        SFTTrainer, sides, tmp_path, save_steps=1, save_only_model=True, max_steps=3, per_device_train_batch_size=1
    )
    trainer.train_dataset = prepared(trainer, sides.rows[:3])
    backwards = iter(range(10))
    trainer.model.lm_head.weight.register_hook(lambda g: g * NAN if next(backwards) == 1 else g)
    if skipped:
        accelerated = type(trainer.accelerator)
        monkeypatch.setattr(accelerated, "optimizer_step_was_skipped", property(lambda self: True))
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
        trainer.train()
        assert trainer.state.global_step == 3
    else:
        with pytest.raises(NotFiniteError, match=r"^In step 2, rank 0: the gradient is NaN or infinite, though the"):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
