"""A NaN or an infinity stops the run, names the row of the data file, and is never saved."""

import math

import pytest
import torch

from modeling.losses.logits import ChunkedLogits
from modeling.models.output_head import OutputHead
from modeling.models.teacher_cache import TopKHead
from modeling.training import finite_check
from modeling.training.finite_check import FiniteCheck, NotFiniteError, largest
from tests.methods import METHODS
from tests.unit.helpers import DTYPES, loss_of, make_trainer

INF, NAN = math.inf, math.nan
DISTILLATION = [method for method in METHODS if method != "SFT"]


def poison(trainer, row, column, value):
    """Puts a value into a row of the teacher's logits."""
    logits = trainer.teacher.logits

    def poisoned(side):
        z = logits(side).clone()
        z[row, column] = value
        return z

    object.__setattr__(trainer.teacher, "logits", poisoned)


def spoil_the_student(trainer, examples, i):
    """The embedding of a token that example i alone holds."""
    others = [set(example["input_ids"]) for j, example in enumerate(examples) if j != i]
    alone = set(examples[i]["input_ids"]).difference(*others)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[min(alone)] = NAN


# ------------------------------------------------------------------------------------------------------ which row it is


@pytest.mark.parametrize("method", DISTILLATION)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("training", [True, False])
def test_a_bad_teacher_logit_stops_with_the_row(pair, tmp_path, method, value, training):
    """In the last logit row of the second example; at a token that maps to nothing, so that no loss may read it."""
    trainer = make_trainer(method, pair, tmp_path)
    static = pair.mappers.em.to_student.static
    column = 5 if METHODS[method].same_tokenizer else (static < 0).nonzero()[0][0]
    poison(trainer, -1, column, value)
    trainer.state.global_step = 6
    with pytest.raises(NotFiniteError) as error:
        loss_of(trainer, pair.prepared(method, slice(2)), training)
    place = "In step 7, rank 0" if training else "In evaluation after step 6, rank 0"
    file = "train_file" if training else "validation_file"
    assert str(error.value).startswith(f"{place}, row {pair.FIRST_ROW + 1} of --{file}: the teacher's logits hold a")
    assert "--teacher_dtype float32 or bfloat16" in str(error.value)


@pytest.mark.parametrize("method", DISTILLATION)
def test_a_teacher_that_rules_every_token_out(pair, tmp_path, method):
    trainer = make_trainer(method, pair, tmp_path)
    poison(trainer, 0, slice(None), -INF)
    with pytest.raises(NotFiniteError, match=f"row {pair.FIRST_ROW} of --train_file: the teacher's logits"):
        loss_of(trainer, pair.prepared(method, slice(2)))


@pytest.mark.parametrize("method", [method for method in DISTILLATION if method not in ("RKD", "Strict", "SimCT")])
def test_a_teacher_that_rules_a_token_out_is_no_fault(pair, tmp_path, method):
    """(Reverse KL is infinite there: the student gives the token some probability, and the teacher none.)"""
    trainer = make_trainer(method, pair, tmp_path)
    poison(trainer, 0, slice(20, 40), -INF)
    loss = loss_of(trainer, pair.prepared(method, slice(2)))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())


def test_a_loss_that_is_infinite_by_right_stops_too(pair, tmp_path):
    trainer = make_trainer("RKD", pair, tmp_path)
    poison(trainer, 0, slice(20, 40), -INF)
    first = pair.FIRST_ROW
    with pytest.raises(NotFiniteError, match=f"one of the rows {first}, {first + 1} of --train_file: the loss, or"):
        loss_of(trainer, pair.prepared("RKD", slice(2)))
    with pytest.raises(NotFiniteError, match=f", row {first} of --train_file: the loss"):
        loss_of(trainer, pair.prepared("RKD", slice(1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_student_stops_with_the_row(pair, tmp_path, method):
    trainer, examples = make_trainer(method, pair, tmp_path), pair.prepared(method, slice(3))
    spoil_the_student(trainer, examples, 2)
    assert torch.isfinite(loss_of(trainer, examples[:2]))
    message = f"In step 1, rank 0, row {pair.FIRST_ROW + 2} of --train_file: the student's cross-entropy is NaN"
    with pytest.raises(NotFiniteError, match=message):
        loss_of(trainer, examples)


@pytest.mark.parametrize("name", ["parts", "means"])
def test_what_is_logged_is_looked_at_too(pair, tmp_path, name):
    trainer = make_trainer("SFT", pair, tmp_path)
    batch = trainer.data_collator(pair.prepared("SFT", slice(1)))
    losses = METHODS["SFT"].losses(trainer.student_logits(trainer.model, batch), None, batch, None)
    getattr(losses, name)["something"] = torch.tensor(NAN) if name == "parts" else (torch.tensor(NAN), 1)
    with pytest.raises(NotFiniteError, match="the loss, or what is logged with it, is NaN"):
        trainer.weigh(losses, batch, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_shows_every_fault(dtype):
    z = torch.zeros(5, 130, dtype=dtype)
    z[0, 128], z[1, 3], z[2, 7], z[4] = NAN, INF, -INF, -INF
    z[0, 3] = INF
    assert torch.isfinite(largest(z[:, :129])).tolist() == [False, False, True, True, False]


def test_of_logits_that_never_exist_as_a_whole_what_they_are_made_of_is_looked_at():
    hidden = torch.zeros(4, 6)
    hidden[1, 2], hidden[2, 3], hidden[3, 4] = NAN, -INF, INF
    chunked = ChunkedLogits(hidden, OutputHead(torch.ones(9, 6)), 9, 2)
    assert torch.isfinite(largest(chunked)).tolist() == [True, False, False, False]
    assert torch.isfinite(chunked[0:4]).all(-1).tolist() == [True, False, False, False]
    # Stored log-probabilities, their ids, and what is left for each other token, which may be nothing.
    stored = torch.tensor([[-0.7, -0.7, 4, 5, -INF], [NAN, -0.7, 4, 5, -9.0]])
    assert torch.isfinite(largest(ChunkedLogits(stored, TopKHead(9), 9, 2))).tolist() == [True, False]


# ------------------------------------------------------------------------------------------------ when it is looked at


class TestDeferred:
    """As on an accelerator, where looking would make every step wait: findings are looked at when it waits anyway."""

    @pytest.fixture
    def trainer(self, pair, tmp_path):
        trainer = make_trainer(
            *("SFT", pair, tmp_path),
            logging_steps=4,
            save_steps=1,
            save_only_model=True,
            per_device_train_batch_size=1,
            max_steps=4,
            train_sampling_strategy="sequential",
        )
        trainer.train_dataset = pair.prepared("SFT", slice(4))
        trainer.finite.deferred = True
        return trainer

    def test_nothing_is_looked_at_within_a_step(self, trainer, monkeypatch):
        monkeypatch.setattr(FiniteCheck, "_first", lambda self: pytest.fail("looked"))
        spoil_the_student(trainer, trainer.train_dataset, 1)
        assert torch.isnan(loss_of(trainer, trainer.train_dataset[:2]))

    def test_a_fault_is_found_before_anything_is_saved(self, trainer, pair, tmp_path):
        spoil_the_student(trainer, trainer.train_dataset[:3], 2)
        with pytest.raises(NotFiniteError, match=rf"^In step 3, rank 0, row {pair.FIRST_ROW + 2} of --train_file: the"):
            trainer.train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    def test_and_at_the_end_of_training(self, trainer, pair, monkeypatch):
        trainer.args.logging_steps, trainer.args.save_strategy = 100, "no"
        compute_loss, steps = trainer.compute_loss, iter(range(10))

        def spoilt(model, batch, **options):
            loss = compute_loss(model, batch, **options)
            if next(steps) == 3:
                bad = torch.full(batch.student.labels.shape, NAN)
                trainer.require_finite(finite_check.STUDENT, batch.student, batch.rows, bad)
            return loss

        monkeypatch.setattr(trainer, "compute_loss", spoilt)
        with pytest.raises(NotFiniteError, match=rf"^In step 4, rank 0, row {pair.FIRST_ROW + 3} of --train_file"):
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
        cause, later = (finite_check.Cause(step, False, f"in another rank's step {step}") for step in (2, 3))
        monkeypatch.setattr(finite_check, "gather_object", lambda own: [*own, None, later, cause])
        with pytest.raises(NotFiniteError, match=r"^in another rank's step 2$"):
            trainer.finite.look_together()

    def test_what_waits_is_bounded(self, trainer, monkeypatch):
        monkeypatch.setattr(finite_check, "MOST_PENDING", 3)
        for step in range(1, 10):
            trainer.finite.add(finite_check.LOSS, step, True, [1], torch.tensor([False]))
            assert len(trainer.finite.pending) < 3


@pytest.mark.parametrize("skipped", [False, True])
def test_a_bad_gradient_stops_training_unless_the_step_was_skipped(pair, tmp_path, monkeypatch, skipped):
    trainer = make_trainer(
        "SFT", pair, tmp_path, save_steps=1, save_only_model=True, max_steps=3, per_device_train_batch_size=1
    )
    trainer.train_dataset = pair.prepared("SFT", slice(3))
    backwards = iter(range(10))
    trainer.model.lm_head.weight.register_hook(lambda g: g * NAN if next(backwards) == 1 else g)
    if skipped:
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
        trainer.train()
        assert trainer.state.global_step == 3
    else:
        with pytest.raises(NotFiniteError, match=r"^In step 2, rank 0: the gradient is NaN or infinite, though the"):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
