"""FKD, RKD, ULD and MinED: their divergences, their pairings, and their trainers on small models."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from get_vocab_mapper.vocab_mapper import build_em, build_mined
from modeling.alignment import alignment_counts, concatenate_groups, one_to_one_rows, same_index_rows
from modeling.arguments import TrainingArguments
from modeling.divergences import (
    cross_entropy,
    cross_entropy_and,
    cross_entropy_and_kl,
    in_row_chunks,
    kl_divergence,
    kl_to_target_rows,
    moved_distribution_rows,
    sorted_distance_rows,
)
from modeling.examples import (
    Encoder,
    Response,
    ResponseCollator,
    prepare_example,
    require_same_tokenizer,
    require_same_tokens,
)
from modeling.run_clm_llms_fkd import FKDTrainer
from modeling.run_clm_llms_rkd import RKDTrainer
from modeling.run_clm_MinED import MinEDTrainer, load_mined_mapper
from modeling.run_clm_uld import ULDTrainer
from tests.benchmarks.bench_memory import measure_in_new_process
from tests.reference import baseline_oracles, cdm_oracle
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, load_real, sentencepiece_bpe

LN2, LN3 = math.log(2), math.log(3)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0])


def random_logits(*shape, seed=0, dtype=torch.float32, requires_grad=False):
    values = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(requires_grad)


def assert_same(result, expected, logits):
    """Equal values, and equal gradients with respect to `logits` of a weighted sum of them."""
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.linspace(0.5, 2, len(result), dtype=torch.float64)
    gradient, expected_gradient = (
        torch.autograd.grad((values.double() * weight).sum(), logits, retain_graph=True)[0]
        for values in (result, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- divergences


class TestForwardAndReverseKl:
    """`cross_entropy_and_kl`, and `kl_divergence` where it says the same."""

    @given(st.integers(0, 10**6), TEMPERATURES)
    @settings(max_examples=15, deadline=None)
    def test_the_oracle(self, seed, temperature):
        teacher, student = random_logits(9, 13, seed=seed), random_logits(9, 13, seed=seed + 1, requires_grad=True)
        labels = torch.arange(9)
        _, forward = cross_entropy_and_kl(student, labels, teacher, temperature)
        _, reverse = cross_entropy_and_kl(student, labels, teacher, temperature, reverse=True)
        assert_same(forward, baseline_oracles.fkd(teacher, student, temperature), student)
        assert_same(reverse, baseline_oracles.rkd(teacher, student, temperature), student)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_torch_kl_div(self, temperature):
        teacher, student = random_logits(20, 300, seed=1), random_logits(20, 300, seed=2, requires_grad=True)
        log_t, log_s = (F.log_softmax(z.double() / temperature, -1) for z in (teacher, student))
        for reverse, p, q in ((False, log_t, log_s), (True, log_s, log_t)):
            expected = temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            _, kl = cross_entropy_and_kl(student, torch.arange(20), teacher, temperature, reverse)
            assert_same(kl, expected, student)
            sides = (student, teacher) if reverse else (teacher, student)
            assert_same(kl_divergence(*sides, temperature), expected, student)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_cross_entropy_and_the_sum_of_both_gradients(self, reverse):
        student, teacher = random_logits(20, 31, seed=1, requires_grad=True), random_logits(20, 31, seed=2)
        labels = torch.arange(20)
        ce, kl = cross_entropy_and_kl(student, labels, teacher, 2.0, reverse)
        expected_ce = cross_entropy(student, labels)
        expected_kl = kl_divergence(*((student, teacher) if reverse else (teacher, student)), 2.0)
        torch.testing.assert_close((ce, kl), (expected_ce, expected_kl), rtol=1e-5, atol=1e-5)
        weight = torch.linspace(-1, 2, 20)
        gradients = [
            torch.autograd.grad((weight * a).sum() + (weight**2 * b).sum(), student)[0]
            for a, b in ((ce, kl), (expected_ce, expected_kl))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_gradcheck(self, reverse):
        teacher = random_logits(9, 5, seed=3, dtype=torch.float64)
        student = random_logits(9, 5, seed=4, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(9) % 5
        assert torch.autograd.gradcheck(lambda z: cross_entropy_and_kl(z, labels, teacher, 1.7, reverse), student)

    def test_a_token_that_one_side_all_but_excludes(self):
        teacher, student = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -300.0]], requires_grad=True)
        for reverse in (False, True):
            _, kl = cross_entropy_and_kl(student, torch.tensor([0]), teacher, 1.0, reverse)
            (gradient,) = torch.autograd.grad(kl.sum(), student)
            assert kl.item() == 0 and (gradient == 0).all()

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"cross_entropy_and_kl .* \(2, 3\) and \(2, 4\)"):
            cross_entropy_and_kl(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4))


class TestSortedDistance:
    def test_hand_computed(self):
        # (3/4, 1/4) against (1/2, 1/4, 1/4): 1/4 + 0 + 1/4; the order of the tokens does not matter
        student = torch.tensor([[0.0, LN3], [LN3, 0.0]])
        teacher = torch.tensor([[0.0, LN2, 0.0], [LN2, 0.0, 0.0]])
        assert sorted_distance_rows(student, teacher).tolist() == pytest.approx([0.5, 0.5])
        assert sorted_distance_rows(teacher, student).tolist() == pytest.approx([0.5, 0.5])
        assert sorted_distance_rows(2 * student, 2 * teacher, temperature=2.0).tolist() == pytest.approx([0.5, 0.5])

    @given(st.integers(0, 10**6), TEMPERATURES, st.integers(2, 20), st.integers(2, 20))
    @settings(max_examples=25, deadline=None)
    def test_the_oracle(self, seed, temperature, teacher_columns, student_columns):
        teacher = random_logits(9, teacher_columns, seed=seed)
        student = random_logits(9, student_columns, seed=seed + 1, requires_grad=True)
        result = in_row_chunks(lambda s, t: sorted_distance_rows(s, t, temperature), student, teacher)
        assert_same(result, baseline_oracles.uld(teacher, student, temperature), student)

    def test_equal_distributions_have_no_gradient(self):
        student = random_logits(3, 7, requires_grad=True)
        teacher = student.detach()[:, torch.randperm(7)]
        result = sorted_distance_rows(student, teacher)
        result.sum().backward()
        torch.testing.assert_close(result, torch.zeros(3), rtol=0, atol=1e-6)
        assert student.grad.abs().max() < 1  # of a subgradient at a kink, rounding decides the sign

    def test_gradcheck(self):
        teacher = random_logits(4, 6, seed=1, dtype=torch.float64)
        student = random_logits(4, 9, seed=2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: sorted_distance_rows(z, teacher, 1.3), student)


class TestMovedDistribution:
    def test_one_student_token_takes_the_mass_of_all_that_map_to_it(self):
        # teacher (1/8, 1/8, 2/8, 4/8); tokens 0 and 3 both map to 0, token 1 to 2, token 2 to nothing
        teacher = torch.tensor([[0.0, 0.0, LN2, 2 * LN2]])
        moved = moved_distribution_rows(teacher, torch.tensor([0, 2, -1, 0]), n_student=4, temperature=1.0)
        # what is mapped is 6/8
        assert moved.tolist() == [pytest.approx([5 / 6, 0, 1 / 6, 0])]

    @given(st.integers(0, 10**6), TEMPERATURES)
    @settings(max_examples=15, deadline=None)
    def test_kl_to_it_is_the_oracle(self, seed, temperature):
        random = np.random.default_rng(seed)
        static = random.integers(-1, 7, 12)
        static[0] = 0
        teacher, student = random_logits(6, 12, seed=seed), random_logits(6, 7, seed=seed + 1, requires_grad=True)
        mapping = {v: int(u) for v, u in enumerate(static) if u >= 0}
        groups = [([i], [i]) for i in range(6)]
        teacher_ids = random.choice(sorted(mapping), 6).tolist()
        student_ids = [mapping[v] for v in teacher_ids]
        targets, distilled = baseline_oracles.mined_targets(
            teacher, teacher_ids, student_ids, 7, groups, mapping, temperature
        )
        assert all(distilled)
        target = moved_distribution_rows(teacher, torch.from_numpy(static), 7, temperature)
        torch.testing.assert_close(target.double(), torch.tensor(targets, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        expected = baseline_oracles.mined(targets, student, temperature)
        assert_same(kl_to_target_rows(target, student, temperature), expected, student)

    def test_kl_to_a_one_hot_target_is_cross_entropy(self):
        student, labels = random_logits(6, 7, requires_grad=True), torch.arange(6)
        one_hot = F.one_hot(labels, 7).float()
        assert_same(
            kl_to_target_rows(one_hot, student), F.cross_entropy(student.double(), labels, reduction="none"), student
        )


def forward_kl(student, labels, teacher):
    return cross_entropy_and_kl(student, labels, teacher, 2.0)


def reverse_kl(student, labels, teacher):
    return cross_entropy_and_kl(student, labels, teacher, 2.0, reverse=True)


def sorted_distance(student, labels, teacher):
    return cross_entropy_and(sorted_distance_rows, student, labels, teacher)


def moved(student, labels, teacher):
    static = torch.arange(teacher.shape[1]) % 9

    def divergence(student, teacher):
        return kl_to_target_rows(moved_distribution_rows(teacher, static, student.shape[1], 2.0), student, 2.0)

    return cross_entropy_and(divergence, student, labels, teacher)


class TestLossesTogether:
    def test_values_and_the_sum_of_both_gradients(self):
        student, teacher = random_logits(20, 31, seed=1, requires_grad=True), random_logits(20, 17, seed=2)
        labels = torch.arange(20)
        ce, kd = sorted_distance(student, labels, teacher)
        expected_ce, expected_kd = cross_entropy(student, labels), sorted_distance_rows(student, teacher)
        torch.testing.assert_close((ce, kd), (expected_ce, expected_kd))
        (gradient,) = torch.autograd.grad(0.3 * ce.sum() + 0.7 * kd.sum(), student)
        (expected,) = torch.autograd.grad(0.3 * expected_ce.sum() + 0.7 * expected_kd.sum(), student)
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("losses", [forward_kl, reverse_kl, sorted_distance, moved])
    def test_no_rows(self, losses):
        student = torch.zeros(0, 12, requires_grad=True)
        ce, kd = losses(student, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 12))
        (ce.sum() + kd.sum()).backward()
        assert len(ce) == len(kd) == 0 and student.grad.shape == (0, 12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("losses", [forward_kl, reverse_kl, sorted_distance, moved])
    def test_half_precision_and_padded_heads(self, losses, dtype):
        labels = torch.arange(9)
        teacher = random_logits(9, 256, seed=1, dtype=dtype)[:, :250]
        student = random_logits(9, 272, seed=2, dtype=dtype, requires_grad=True)
        result = torch.stack(losses(student[:, :250], labels, teacher))
        full = student.detach().float().requires_grad_()
        expected = torch.stack(losses(full[:, :250], labels, teacher.float()))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert student.grad.dtype == dtype and (student.grad[:, 250:] == 0).all()
        torch.testing.assert_close(student.grad, full.grad.to(dtype), rtol=2e-2, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- pairings


def test_rows_of_the_same_index():
    assert same_index_rows([(2, 3), (0, 0), (4, 2), (1, 1)]).tolist() == [0, 1, -1, 2, 3, 6]
    assert same_index_rows([]).tolist() == []
    assert same_index_rows([(0, 0)]).dtype == np.int64


def test_rows_of_one_to_one_groups():
    examples = [
        (np.array([0, 1, 1, 2]), np.array([0, 1, 2])),  # two teacher tokens, one student token
        (np.array([0, 1]), np.array([0, 0, 1])),
    ]
    assert one_to_one_rows(concatenate_groups(examples)).tolist() == [0, -1, 3, -1, -1, 5]
    assert one_to_one_rows(concatenate_groups([])).tolist() == []


def test_alignment_counts():
    groups = [(np.array([0, 1, 1, 2]), np.array([0, 1, 2])), (np.array([0, 1]), np.array([0, 1]))]
    ends = [(np.array([1, 2, 4, 5]), np.array([1, 4, 5])), (np.array([2, 4]), np.array([1, 4]))]
    assert alignment_counts(ends, groups) == {"one_to_one": 4, "aligned": 3}
    assert alignment_counts([], []) == {"one_to_one": 0, "aligned": 0}


class TestSameTokenizer:
    def test_names_classes_special_flags_and_the_declared_eos_do_not_matter(self):
        student, teacher = Encoder(byte_level_bpe()), byte_level_bpe()
        teacher.name_or_path = "another/name"
        teacher.eos_token, teacher.pad_token = "!", None
        teacher = Encoder(teacher)
        assert teacher.eos_id != student.eos_id
        require_same_tokenizer(student, teacher)

    def test_the_first_id_that_differs_is_named(self):
        student, teacher = byte_level_bpe(), byte_level_bpe()
        teacher.name_or_path = "another/name"
        teacher.add_tokens(["<one more>"])
        n = len(student)
        with pytest.raises(ValueError, match=f"id {n} is no token in the student's and '<one more>' in the teacher's"):
            require_same_tokenizer(Encoder(student), Encoder(teacher))
        with pytest.raises(ValueError) as error:
            require_same_tokenizer(Encoder(student), Encoder(sentencepiece_bpe()))
        for part in (
            *("'zoo/byte-level-bpe'", "'zoo/sentencepiece-bpe'", "id 0 is '<|endoftext|>' in the student's"),
            *("'<unk>' in the teacher's", "run_clm_distill_CDM.py", "run_clm_MinED.py", "run_clm_uld.py"),
        ):
            assert part in str(error.value)

    def test_responses_of_other_tokens_name_their_row(self):
        ends = np.array([1, 3, 4])
        require_same_tokens([Response(1, 3, ends, teacher_ends=ends.copy()), Response(2, 0, ends[:0], ends[:0])])
        with pytest.raises(ValueError, match=r"Row 7 .* 3 response tokens and the teacher 2"):
            require_same_tokens([Response(1, 3, ends, ends), Response(7, 3, ends, teacher_ends=np.array([3, 4]))])
        with pytest.raises(ValueError, match="Row 7"):
            require_same_tokens([Response(7, 3, ends, teacher_ends=np.array([2, 3, 4]))])


# -------------------------------------------------------------------------------------------------------- trainers


def small_model(tokenizer, padding: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def sides():
    """A pair of different tokenizers: the teacher's and the student's; models with padded heads; rows of text."""
    student, teacher = Encoder(byte_level_bpe()), Encoder(sentencepiece_bpe())
    rows = [{"row": i, "prefix": f"Say {i}: ", "text": text} for i, text in enumerate(SAMPLE_TEXTS, 1)]
    return SimpleNamespace(student=student, teacher=teacher, rows=rows)


def make_trainer(trainer_class, student, teacher, folder, teacher_padding=7, **options):
    return trainer_class(
        model=small_model(student.tokenizer, 5, seed=1),
        teacher=small_model(teacher.tokenizer, teacher_padding, seed=2),
        n_student_tokens=len(student.forms),
        n_teacher_tokens=len(teacher.forms),
        kd_alpha=0.5,
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none"),
        data_collator=ResponseCollator(student, teacher, edit_distances=trainer_class is MinEDTrainer),
        processing_class=student.tokenizer,
        **options,
    )


def batch_of(trainer, rows):
    encoders = [trainer.data_collator.student, trainer.data_collator.teacher]
    return trainer.data_collator([prepare_example(row, encoders, 512) for row in rows])


def evaluate(trainer, inputs):
    """`(loss, {name: value logged})` of one batch, as in an evaluation."""
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, inputs)
    return loss, trainer.eval_means.reduce(trainer.accelerator)


def example_logits(trainer, inputs):
    """Per example: (student's, teacher's) predicting logits and response ids, read one example at a time."""
    for b in range(len(inputs["input_ids"])):
        parts = []
        for model, side, n in (
            (trainer.model, "", trainer.n_student_tokens),
            (trainer.teacher.model, "teacher_", trainer.n_teacher_tokens),
        ):
            ids = inputs[f"{side}input_ids"][b : b + 1, : int(inputs[f"{side}attention_mask"][b].sum())]
            n_response = int((inputs[f"{side}labels"][b] >= 0).sum())
            logits = model(input_ids=ids).logits.detach()[0, -n_response - 1 : -1, :n]
            parts += [logits, ids[0, -n_response:].tolist()]
        yield parts


@pytest.mark.parametrize(("trainer_class", "oracle"), [(FKDTrainer, "fkd"), (RKDTrainer, "rkd")])
def test_same_tokenizer_trainers(sides, tmp_path, trainer_class, oracle):
    trainer = make_trainer(trainer_class, sides.student, sides.student, tmp_path, kd_temperature=2.0)
    inputs = batch_of(trainer, sides.rows[:3])
    loss, logged = evaluate(trainer, inputs)
    kd = [
        getattr(baseline_oracles, oracle)(z_teacher, z_student, 2.0)
        for z_student, _, z_teacher, _ in example_logits(trainer, inputs)
    ]
    kd = torch.cat(kd).mean().item()
    assert logged["kd_loss"] == pytest.approx(kd, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * logged["ce_loss"] + 0.5 * kd, rel=1e-5)


def test_uld_trainer(sides, tmp_path):
    trainer = make_trainer(ULDTrainer, sides.student, sides.teacher, tmp_path, kd_temperature=1.0)
    inputs = batch_of(trainer, sides.rows[:3])
    _, logged = evaluate(trainer, inputs)
    kd, paired = [], []
    for z_student, student_ids, z_teacher, teacher_ids in example_logits(trainer, inputs):
        kd.append(baseline_oracles.uld(z_teacher, z_student, 1.0))
        paired += [j < len(teacher_ids) for j in range(len(student_ids))]
    assert 0 < sum(paired) < len(paired)  # the rows must hold a student's token without a partner
    assert logged["kd_loss"] == pytest.approx(torch.cat(kd).mean().item(), rel=1e-5)
    assert logged["paired"] == pytest.approx(sum(paired) / len(paired))


def test_mined_trainer(sides, tmp_path):
    static = build_mined(sides.teacher.forms, sides.student.forms, progress=False).teacher_to_student.copy()
    mapping = {v: int(u) for v, u in enumerate(static) if u >= 0}
    assert (static < 0).any() and 0 in mapping.values() and len(set(mapping.values())) < len(mapping)
    trainer = make_trainer(
        *(MinEDTrainer, sides.student, sides.teacher, tmp_path), teacher_to_student=static, kd_temperature=2.0
    )
    inputs = batch_of(trainer, sides.rows[:3])
    _, logged = evaluate(trainer, inputs)
    kd, distilled, one_to_one = [], [], []
    for z_student, student_ids, z_teacher, teacher_ids in example_logits(trainer, inputs):
        groups = baseline_oracles.mined_groups(
            [sides.teacher.forms.texts[v] for v in teacher_ids], [sides.student.forms.texts[u] for u in student_ids]
        )
        targets, from_teacher = baseline_oracles.mined_targets(
            z_teacher, teacher_ids, student_ids, trainer.n_student_tokens, groups, mapping, 2.0
        )
        kd.append(baseline_oracles.mined(targets, z_student, 2.0))
        distilled += from_teacher
        one_to_one += cdm_oracle.one_to_one(groups)
    assert 0 < sum(distilled) < sum(one_to_one) < len(one_to_one)
    assert logged["kd_loss"] == pytest.approx(torch.cat(kd).mean().item(), rel=1e-5)
    assert logged["distilled"] == pytest.approx(sum(distilled) / len(distilled))
    assert logged["one_to_one"] == pytest.approx(sum(one_to_one) / len(one_to_one))
    assert logged["one_to_one"] <= 1 and 0 < logged["aligned"] <= 1


def test_mined_targets_are_the_tokens_to_be_predicted(sides, tmp_path):
    """Where nothing maps, every target is one-hot, on the very token that cross-entropy asks for at the position."""
    nothing = np.full(len(sides.teacher.forms), -1, dtype=np.int32)
    nothing[0] = 1  # <unk>, which no text holds
    trainer = make_trainer(
        *(MinEDTrainer, sides.student, sides.teacher, tmp_path), teacher_to_student=nothing, kd_temperature=1.0
    )
    inputs = batch_of(trainer, sides.rows[:3])
    _, logged = evaluate(trainer, inputs)
    expected, next_token = [], []
    for z_student, student_ids, _, _ in example_logits(trainer, inputs):
        log_p = z_student.double().log_softmax(-1)
        expected += [-log_p[j, s].item() for j, s in enumerate(student_ids)]
        next_token += [-log_p[j, s].item() for j, s in enumerate(student_ids[1:])]
    assert logged["kd_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert logged["ce_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert np.mean(next_token) != pytest.approx(np.mean(expected), rel=1e-2)
    assert logged["distilled"] == 0


def test_a_token_that_maps_to_id_0_is_distilled(sides, tmp_path):
    """Every teacher token maps to student token 0: where that is the token in the text, the target is all on it."""
    zero = np.zeros(len(sides.teacher.forms), dtype=np.int32)
    trainer = make_trainer(
        *(MinEDTrainer, sides.student, sides.teacher, tmp_path), teacher_to_student=zero, kd_temperature=1.0
    )
    assert sides.student.eos_id == 0
    inputs = batch_of(trainer, sides.rows[:3])
    _, logged = evaluate(trainer, inputs)
    # The EOS of each of the three responses, where it is alone with the teacher's.
    assert 1 <= round(logged["distilled"] * len(inputs["positions"]), 3) <= 3
    assert logged["kd_loss"] == pytest.approx(logged["ce_loss"], rel=1e-5)


def make_trainer_of(trainer_class, sides, folder):
    """Any of the four, with what it needs beside the models."""
    if trainer_class in (FKDTrainer, RKDTrainer):
        return make_trainer(trainer_class, sides.student, sides.student, folder, kd_temperature=2.0)
    options = {}
    if trainer_class is MinEDTrainer:
        mapper = build_mined(sides.teacher.forms, sides.student.forms, progress=False)
        options["teacher_to_student"] = mapper.teacher_to_student
    return make_trainer(trainer_class, sides.student, sides.teacher, folder, kd_temperature=2.0, **options)


@pytest.mark.parametrize("trainer_class", [FKDTrainer, RKDTrainer, ULDTrainer, MinEDTrainer])
def test_a_batch_is_the_sum_of_its_examples(sides, tmp_path, trainer_class):
    trainer = make_trainer_of(trainer_class, sides, tmp_path)
    _, together = evaluate(trainer, batch_of(trainer, sides.rows[:4]))
    parts, n_tokens = [], []
    for row in sides.rows[:4]:
        inputs = batch_of(trainer, [row])
        parts.append(evaluate(trainer, inputs)[1])
        n_tokens.append(len(inputs["positions"]))
    for name in together.keys() - {"bits_per_byte"}:
        assert together[name] == pytest.approx(np.average([p[name] for p in parts], weights=n_tokens), rel=1e-5)


@pytest.mark.parametrize("trainer_class", [FKDTrainer, RKDTrainer, ULDTrainer, MinEDTrainer])
def test_a_batch_without_responses_adds_nothing(sides, tmp_path, trainer_class):
    trainer = make_trainer_of(trainer_class, sides, tmp_path)
    encoders = [trainer.data_collator.student, trainer.data_collator.teacher]
    full = [prepare_example(row, encoders, 512) for row in sides.rows[:2]]
    empty = [{k: [] if k.endswith("ends") else v for k, v in example.items()} for example in full]

    loss, logged = evaluate(trainer, trainer.data_collator(empty))
    assert loss.item() == 0 and logged == {}
    loss.backward()
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.grad is not None)

    _, expected = evaluate(trainer, trainer.data_collator(full[:1]))
    _, mixed = evaluate(trainer, trainer.data_collator([empty[1], full[0]]))
    assert mixed == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- mapper files


class TestMinEDMapper:
    def test_a_mined_file(self, sides, tmp_path):
        built = build_mined(sides.teacher.forms, sides.student.forms, progress=False)
        built.save(tmp_path / "mined.safetensors")
        loaded = load_mined_mapper(str(tmp_path / "mined.safetensors"), sides.teacher, sides.student)
        assert (loaded.teacher_to_student == built.teacher_to_student).all()

    def test_another_kind_is_refused(self, sides, tmp_path):
        path = tmp_path / "em.safetensors"
        build_em(sides.teacher.forms, sides.student.forms, progress=False).save(path)
        with pytest.raises(ValueError) as error:
            load_mined_mapper(str(path), sides.teacher, sides.student)
        assert f"{path} is a mapper of the kind 'em'" in str(error.value)
        assert "get_vocab_mapper/get_MinED_mapper.py" in str(error.value)

    def test_a_published_file_is_taken_with_a_warning(self, sides, tmp_path):
        built = build_mined(sides.teacher.forms, sides.student.forms, progress=False)
        built.export_json(tmp_path / "mined.json")
        with pytest.warns(UserWarning, match="does not say which tokenizers"):
            loaded = load_mined_mapper(str(tmp_path / "mined.json"), sides.teacher, sides.student)
        expected = np.where(built.teacher_to_student == 0, -1, built.teacher_to_student)
        assert (loaded.teacher_to_student == expected).all()


def test_real_tokenizers_with_the_same_tokens():
    require_same_tokenizer(Encoder(load_real("qwen2")), Encoder(load_real("qwen2")))
    with pytest.raises(ValueError, match="id 0 is "):
        require_same_tokenizer(Encoder(load_real("qwen2")), Encoder(load_real("phi-3")))


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("method", ["FKD", "RKD"])
def test_memory_beyond_the_logits_and_the_gradient(method):
    """Cross-entropy and divergence together, forward and backward: at most a quarter of one logit tensor more."""
    assert measure_in_new_process(method, n_rows=512, n_student=64_000, n_teacher=64_000)["beyond"] <= 0.25
