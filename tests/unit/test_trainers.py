"""Every method's trainer on small models: the right logits, the step's normaliser, what is logged, and DDP."""

import math

import pytest
import torch

from modeling.models.teachers import LiveTeacher
from tests.methods import METHODS
from tests.unit.helpers import inside_ddp, loss_of, make_trainer, small_model, without_response


def logits_one_by_one(model, examples, prefix, vocab_size):
    """[R, vocab_size] that predict the response tokens: each example on its own, without padding."""
    rows = []
    for example in examples:
        start, ids = example[f"{prefix}response_start"], torch.as_tensor(example[f"{prefix}input_ids"])[None]
        rows.append(model(input_ids=ids).logits[0, start - 1 : -1, :vocab_size])
    return torch.cat(rows)


@pytest.mark.parametrize("logits_chunk", [0, 7])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_what_is_logged(pair, tmp_path, method, logits_chunk):
    trainer = make_trainer(method, pair, tmp_path, temperature=1.7, logits_chunk=logits_chunk)
    examples, options = pair.prepared(method, slice(3)), {} if method == "SFT" else {"temperature": 1.7}
    batch = trainer.data_collator(examples)
    if method.startswith("CDM"):
        options["topk"] = 20
    student = logits_one_by_one(trainer.model.eval(), examples, "", trainer.student_vocab_size)
    teacher = None
    if method != "SFT":
        teacher = logits_one_by_one(trainer.teacher.model, examples, "teacher_", trainer.teacher_vocab_size).detach()
    losses = METHODS[method].losses(student, teacher, batch, pair.mappers, **options)
    expected = {"ce_loss": losses.ce.mean().item()}
    expected["bits_per_byte"] = losses.ce.sum().item() / math.log(2) / sum(batch.n_bytes)
    expected |= {name: float(total) / float(count) for name, (total, count) in losses.means.items()}
    expected |= {name: total.item() / len(losses.ce) for name, total in losses.parts.items()}
    if method != "SFT":
        expected["kd_loss"] = losses.kd_sum().item() / len(losses.ce)

    loss = loss_of(trainer, examples, training=False)
    assert loss.item() == pytest.approx(losses.mean(0.3).item(), rel=1e-5)
    evaluated = trainer.eval_means.reduce(trainer.accelerator)
    assert evaluated == pytest.approx({**expected, "loss": loss.item()}, rel=1e-5)

    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=50)
    assert loss.item() == pytest.approx(losses.mean(0.3).item() * len(losses.ce) / 50, rel=1e-5)
    logged = trainer.train_means.reduce(trainer.accelerator)
    del expected["bits_per_byte"]
    for name in ("ce_loss", "kd_loss", *losses.parts):
        if name in expected:
            expected[name] *= len(losses.ce) / 50
    assert logged == pytest.approx(expected, rel=1e-5)
    loss.backward()
    wanted = torch.autograd.grad(losses.mean(0.3) * len(losses.ce) / 50, list(trainer.model.parameters()))
    for parameter, gradient in zip(trainer.model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_second_teacher_is_fed_the_students_tokens(pair, tmp_path):
    trainer = make_trainer("CDM", pair, tmp_path)
    examples = pair.prepared("CDM", slice(3))
    model = small_model(pair.student.tokenizer, 3, seed=3)
    trainer.same_tokenizer_teacher, trainer.cross_weight = LiveTeacher(model, len(pair.student.forms)), 0.4
    loss_of(trainer, examples, training=False)
    logged = trainer.eval_means.reduce(trainer.accelerator)
    second = logits_one_by_one(model, examples, "", trainer.student_vocab_size).detach()
    student = logits_one_by_one(trainer.model, examples, "", trainer.student_vocab_size)
    fkd = METHODS["FKD"].losses(student, second, pair.collator("FKD")(pair.prepared("FKD", slice(3))), None)
    assert logged["kd_fkd_loss"] == pytest.approx(fkd.kd.mean().item(), rel=1e-5)
    assert logged["kd_loss"] == pytest.approx(0.4 * logged["kd_cdm_loss"] + 0.6 * logged["kd_fkd_loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_examples_without_a_response_add_nothing(pair, tmp_path, method):
    trainer = make_trainer(method, pair, tmp_path)
    full = pair.prepared(method, slice(3))
    loss_of(trainer, full[1:2]).backward()
    expected = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    loss_of(trainer, [without_response(full[0]), full[1], without_response(full[2])]).backward()
    for parameter, gradient in zip(trainer.model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    trainer.model.zero_grad()
    trainer.eval_means.reduce(trainer.accelerator)
    loss = loss_of(trainer, [without_response(example) for example in full], training=False)
    loss.backward()
    assert loss.item() == 0 and trainer.eval_means.reduce(trainer.accelerator) == {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("method", METHODS)
def test_under_ddp_every_parameter_has_its_backward(pair, tmp_path, method):
    """DDP raises in the next forward where a parameter had no part in the last backward."""
    trainer = make_trainer(method, pair, tmp_path)
    full = pair.prepared(method, slice(2))
    empty = [without_response(example) for example in full]

    def forwards_and_backwards(model):
        for examples in (empty, full, empty):
            trainer.compute_loss(model, trainer.data_collator(examples), num_items_in_batch=1).backward()

    inside_ddp(trainer.model, forwards_and_backwards, tmp_path)


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_the_trainers_own_counts(pair, tmp_path, counted):
    """Of input tokens (--include_num_input_tokens_seen) and floating-point operations."""
    options = {"include_num_input_tokens_seen": counted, "max_steps": 1, "save_strategy": "no"}
    trainer = make_trainer("SFT", pair, tmp_path, **options)
    trainer.train_dataset = pair.prepared("SFT", slice(2))
    trainer.train()
    side = trainer.data_collator(trainer.train_dataset).student
    n_tokens = side.input_ids.numel() if counted == "all" else int(side.attention_mask.sum())
    assert trainer.state.num_input_tokens_seen == n_tokens and trainer.state.total_flos > 0


@pytest.mark.parametrize("method", ["SFT", "FKD", "CDM"])
def test_an_overflow_of_scaled_gradients_is_the_scalers(pair, tmp_path, method):
    """The first scale is too large by far: steps are skipped until it fits, then training goes on."""
    trainer = make_trainer(method, pair, tmp_path)
    examples = pair.prepared(method, slice(2))
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
