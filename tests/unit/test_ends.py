"""The end of a response is one event: labels, mappers, logits and losses of two sides that end with other tokens."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken

from get_vocab_mapper.builders import build_em, build_mined, build_prefixem
from modeling.errors import InputError
from modeling.losses.logits import ChunkedLogits, folded, stop_logits
from modeling.models.language_model import LanguageModel
from modeling.models.output_head import logits_at
from modeling.text.batch import ResponseCollator
from modeling.text.chat import ChatTemplate
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.ends import end_choice, fold_ends, shared_ends, stop_tokens
from modeling.text.messages import ChatRows
from modeling.text.rows import read_rows
from modeling.training.run import Run
from tests.methods import METHODS
from tests.unit import chat_templates as made
from tests.unit.helpers import Headed, Pair, assert_same, make_trainer, random_logits
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

STOPS = (4, 0, 6)


# -------------------------------------------------------------------------------------------------------------- logits


def by_definition(logits, stops):
    """The folded distribution, column by column."""
    p = logits.double().softmax(-1)
    rest = [p[:, i] if i not in stops else torch.zeros_like(p[:, i]) for i in range(p.shape[1])]
    rest[stops[0]] = sum(p[:, i] for i in stops)
    return torch.stack(rest, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_logits_have_the_summed_probability(dtype):
    logits = random_logits(5, 9, dtype=dtype)
    expected = by_definition(logits, STOPS)
    kept = logits.clone()
    assert torch.equal(fold_ends(logits.requires_grad_(), STOPS).detach(), fold_ends(kept, STOPS))  # changed in place
    torch.testing.assert_close(
        kept.double().softmax(-1), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert (kept[:, [0, 6]] == -torch.inf).all() and kept.dtype == dtype
    for few in ((), (4,)):
        assert fold_ends(logits, few) is logits


def test_the_gradient_is_that_of_the_definition():
    leaf = random_logits(5, 9, dtype=torch.float64, requires_grad=True)
    chosen = [i for i in range(9) if i not in STOPS[1:]]
    assert_same(fold_ends(leaf, STOPS).softmax(-1)[:, chosen], by_definition(leaf, STOPS)[:, chosen], leaf)


def test_cross_entropy_is_that_of_the_models_own_logits():
    leaf = random_logits(7, 9, dtype=torch.float64, requires_grad=True)
    said = torch.tensor([4, 0, 6, 1, 8, 4, 3])
    labels = torch.where(torch.isin(said, torch.tensor(STOPS)), STOPS[0], said)
    choice = end_choice(leaf[:, list(STOPS)], STOPS, said)
    assert (choice[[0, 1, 2, 5]] > 0).all() and not choice[[3, 4, 6]].any()
    ce = F.cross_entropy(fold_ends(leaf, STOPS), labels, reduction="none") + choice
    assert_same(ce, F.cross_entropy(leaf, said, reduction="none"), leaf)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_chunked_logits_fold_as_whole_ones(cap):
    headed = Headed(3, 11, 9, cap=cap)
    expected = folded(headed.whole(), STOPS)
    chunked = folded(headed.chunked(), STOPS)
    torch.testing.assert_close(chunked[:], expected, rtol=1e-9, atol=1e-9)
    assert_same(stop_logits(headed.chunked(), STOPS), stop_logits(headed.whole(), STOPS), *headed.leaves)
    stored = ChunkedLogits(headed.whole().detach(), lambda rows: rows.clone(), 9, 4)  # a head without weights
    torch.testing.assert_close(folded(stored, STOPS)[2:7], expected[2:7], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- stop tokens


def test_where_stop_tokens_come_from():
    tokenizer = made.chatml_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(tokenizer, [], None) == {0: ["the tokenizer's EOS"]}
    assert stop_tokens(tokenizer, [end, 0, 7, 10**6], end) == {
        0: ["the tokenizer's EOS", "the generation configuration"],
        end: ["the generation configuration", "the chat template"],  # 7 is a piece of text, 10⁶ no token
    }


def test_one_vocabulary_has_one_set_of_stop_tokens():
    chatml, turns = made.chatml_tokenizer(), made.turns_tokenizer()
    student, same, other = (
        Encoder(chatml, stop_ids=[0]),
        Encoder(chatml, stop_ids=[401, 0]),
        Encoder(turns, stop_ids=[2, 601]),
    )
    ends = shared_ends(student, same, other)
    assert [side.stop_ids for side in ends] == [(0, 401), (0, 401), (2, 601)]
    assert same.stop_ids == (401, 0)
    assert [side.stop_ids for side in shared_ends(student, other)] == [(0,), (2, 601)]


# ------------------------------------------------------------------------------------------------------ a pair of sides


class ChatPair(Pair):
    """Two sides with chat templates, each of which ends with another token than its tokenizer's EOS."""

    def __init__(self):
        def side(tokenizer, name):
            chat = ChatTemplate(tokenizer, name)
            return Encoder(tokenizer, chat=chat, stop_ids=[chat.end_id, tokenizer.eos_token_id])

        self.student, self.teacher = side(made.chatml_tokenizer(), "student"), side(made.turns_tokenizer(), "teacher")
        user = [{"role": "user", "content": "Say it."}]
        self.rows = [{"row": i, "messages": json.dumps(user), "text": text} for i, text in enumerate(SAMPLE_TEXTS, 101)]


@pytest.fixture(scope="module")
def chats():
    return ChatPair()


@pytest.mark.parametrize("build", [build_em, build_mined, build_prefixem])
def test_in_every_mapper_stop_tokens_match_by_role(chats, build):
    teacher, student = chats.teacher, chats.student
    before = build(teacher.forms, student.forms, progress=False)
    after = before.with_ends(teacher.stop_ids, student.stop_ids)
    sides = (
        (before.to_student.static, after.to_student, teacher.stop_ids, student.stop_ids),
        (before.to_teacher.static, after.to_teacher, student.stop_ids, teacher.stop_ids),
    )
    for was, direction, own, other in sides:
        assert direction.static.dtype == np.int32
        assert (direction.static[list(own)] == other[0]).all()
        rest = np.setdiff1d(np.arange(len(was)), own)
        assert not np.isin(direction.static[rest], other).any()
        same = ~np.isin(was[rest], other)
        assert np.array_equal(direction.static[rest][same], was[rest][same])
        assert not np.isin(direction.indices, other).any()
        assert all(not len(direction.row(token)[0]) for token in own)


def test_labels_hold_one_end_and_ids_the_token(chats):
    text = "The <|endoftext|> dog"  # a stop token as text
    example = prepare_example({**chats.rows[0], "text": text}, [chats.student, chats.teacher], 512)
    batch = chats.collator("ULD")([example])
    end, eos = chats.student.stop_ids
    assert batch.student.labels.tolist().count(end) == 2 and eos not in batch.student.labels
    assert batch.student.input_ids.flatten().tolist().count(eos) == 1
    assert batch.teacher.labels[-1] == chats.teacher.eos_id != chats.teacher.tokenizer.eos_token_id
    assert batch.n_bytes == [len(text.encode())]
    alone = chats.collator("SFT")([example])  # nothing is compared, so every token counts for itself
    assert eos in alone.student.labels and not alone.student.stop_ids


def own_logits(trainer, teacher, batch):
    """Both sides' logits as the models give them, with the student's gradient."""
    sides = (
        (trainer.model, batch.student, trainer.student_vocab_size),
        (teacher, batch.teacher, trainer.teacher_vocab_size),
    )
    return [
        logits_at(model, side.predictor_rows, width, input_ids=side.input_ids, attention_mask=side.attention_mask)
        for model, side, width in sides
    ]


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "SFT"])
def test_every_method_compares_one_ending(chats, method, chunk, tmp_path):
    """The trainer's loss is the method's of folded logits, with the cross-entropy of the student's own."""
    trainer = make_trainer(method, chats, tmp_path, logits_chunk=chunk)
    examples = chats.prepared(method, slice(2), longest=30)
    batch = trainer.data_collator(examples)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=7)
    loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()

    student, teacher = own_logits(trainer, trainer.teacher.model, batch)
    folded_sides = (
        fold_ends(student, batch.student.stop_ids),
        fold_ends(teacher.detach().clone(), batch.teacher.stop_ids),
    )
    captured = {}
    plain = trainer.weigh
    trainer.student_logits, trainer.teacher_logits = (lambda *_: folded_sides[0]), (lambda *_: folded_sides[1])
    trainer.weigh = lambda losses, *rest: captured.update(losses=losses) or losses.ce.sum()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=7)
    trainer.weigh = plain
    said = batch.student.input_ids.flatten()[batch.student.predictor_rows + 1]
    expected = (0.3 * F.cross_entropy(student, said, reduction="sum") + 0.7 * captured["losses"].kd_sum()) / 7
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for gradient, parameter in zip(got, trainer.model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_whole_vocabulary_of_cdm(chats, tmp_path):
    """The columns of folded stop tokens are among all k candidates, and teach nothing."""
    trainer = make_trainer("CDM", chats, tmp_path)
    trainer.topk = 10**6
    batch = trainer.data_collator(chats.prepared("CDM", slice(2), longest=30))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=7)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)
    sides = own_logits(trainer, trainer.teacher.model, batch)
    stops = batch.student.stop_ids, batch.teacher.stop_ids
    folded_sides = [fold_ends(z.detach().clone(), stop_ids) for z, stop_ids in zip(sides, stops)]
    losses = METHODS["CDM"].losses(*folded_sides, batch, chats.mappers, topk=10**6)
    assert losses.kd.isfinite().all() and losses.kd_sum() > 0


def test_what_stops_a_second_teacher_stops_the_student_too(chats):
    """From the mapper on, which is made before the rows are read."""
    end, eos = chats.student.stop_ids
    run = object.__new__(Run)
    run.method = SimpleNamespace(same_tokenizer_teacher_path="second")
    run.student, run.teacher, second = (
        SimpleNamespace(encoder=encoder)
        for encoder in (chats.student.with_stop_ids([eos]), chats.teacher, chats.student)
    )
    run.model = lambda path, flag: second
    assert run.encoders[0].stop_ids == (eos,)
    assert run.second_teacher("same_tokenizer_teacher_path") is second
    assert run.encoders[0].stop_ids == (eos, end) and run.encoders[1].stop_ids == chats.teacher.stop_ids


def test_a_stop_token_that_is_not_flagged_special_is_no_text():
    tokenizers = [byte_level_bpe(), sentencepiece_bpe()]
    encoders = []
    for tokenizer in tokenizers:
        tokenizer.add_tokens([AddedToken("<|done|>", special=False)])
        end = tokenizer.convert_tokens_to_ids("<|done|>")
        encoders.append(Encoder(tokenizer, stop_ids=[end, tokenizer.eos_token_id]))
        assert not encoders[-1].forms.is_special[end]
    example = prepare_example({"row": 1, "prefix": "Say: ", "text": "The dog."}, encoders, 64)
    units = ResponseCollator(*encoders, "byte")([example]).groups.units
    assert units[:-1].any() and not units[-1]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "SFT"])
def test_which_stop_token_the_teacher_says_is_all_the_same(chats, method, tmp_path):
    """The columns of the teacher's two stop tokens change places, and nothing that is learned changes."""
    losses = []
    side = chats.teacher_of(method)
    for swap in (False, True):
        trainer = make_trainer(method, chats, tmp_path)
        if swap:
            weight = trainer.teacher.model.lm_head.weight.data
            weight[list(side.stop_ids)] = weight[list(side.stop_ids)[::-1]].clone()
        batch = trainer.data_collator(chats.prepared(method, slice(2), longest=30))
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=7).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------- forms times methods

USER, ANSWER = {"role": "user", "content": "Say it."}, {"role": "assistant", "content": "The quick dog, and the fox."}
FORMS = {
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]},
    "lists": {"prompt": [USER], "completion": [ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "The dog."}]},
    "Alpaca": {"instruction": "Say it.", "input": "the dog", "output": "The dog."},
    "prefix": {"prefix": "Say it.", "text": "The dog."},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_each_form_trains_with_every_method(chats, method, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(list(FORMS.values())))
    sides = [chats.student, chats.teacher_of(method)][: 1 if method == "SFT" else 2]
    rows = list(read_rows(tmp_path / "rows.json", ChatRows(any_row=True, train_on="all")))
    assert len(rows) == len(FORMS) + 1
    examples = [prepare_example(row, sides, 512) for row in rows]
    assert not any(example["fault"] for example in examples)
    trainer = make_trainer(
        method,
        chats,
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=6,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train_dataset = examples
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_a_student_with_one_stop_token_is_left_as_it_is(pair, tmp_path):
    """No copy, no second term."""
    trainer = make_trainer("ULD", pair, tmp_path)
    batch = trainer.data_collator(pair.prepared("ULD", slice(2), longest=20))
    trainer.student_logits(trainer.model, batch)
    assert trainer.end_choice is None and batch.student.stop_ids == (pair.student.eos_id,)


def test_a_sides_stop_tokens_from_its_files(tmp_path):
    """The generation configuration's, that of the model below an adapter, and the template's where rows are chats."""
    tokenizer, folder, adapter = made.chatml_tokenizer(), tmp_path / "model", tmp_path / "adapter"
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    for place in (folder, adapter):
        tokenizer.save_pretrained(place)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    about = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    (adapter / "adapter_model.safetensors").write_bytes(b"")

    def side(path, **options):
        return LanguageModel(str(path), "teacher_path", **options)

    named = {0: ["the tokenizer's EOS", "the generation configuration"], end: ["the chat template"]}
    assert side(folder).stop_tokens == named
    for eos, more in ((0, ()), ([0, start, 7], (start,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        for path in (folder, adapter):
            assert side(path).encoder.stop_ids == (0, *more)
            assert side(path, template_kwargs={}).encoder.stop_ids == (end, 0, *more)
    bare = side(folder, template_kwargs={}, chat_template=made.PLAIN)  # its end is no token
    assert bare.encoder.stop_ids == (0, start) and bare.tokenizer.chat_template == made.PLAIN
    with pytest.raises(InputError, match=r"teacher's tokenizer has no chat template.*--teacher_chat_template FILE"):
        _ = side(folder, template_kwargs={}, chat_template="").encoder
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json cannot be read"):
        _ = side(folder).encoder
