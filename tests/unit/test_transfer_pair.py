"""A student made of a pretrained model: the same network, another tokenizer, fewer layers."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from get_vocab_mapper.token_forms import token_forms
from script_train import make_transfer_pair
from script_train.make_transfer_pair import keep_layers, mean_rows, pieces_of
from tests.unit.helpers import small_model
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe


@pytest.fixture
def source(tmp_path):
    """A model of three layers with its tokenizer, as a folder."""
    tokenizer = byte_level_bpe()
    model = small_model(tokenizer, 3, seed=1)
    model.config.num_hidden_layers = 3
    model = type(model)(model.config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def made(monkeypatch, source, output, *flags):
    command = ["make_transfer_pair.py", "--model", source, "--output", output, *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    make_transfer_pair.main()
    return AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)


def test_its_own_tokenizer_gives_the_same_model(monkeypatch, source, tmp_path):
    student, tokenizer = made(monkeypatch, source, tmp_path / "student", "--tokenizer", source)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    ids = tokenizer(SAMPLE_TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits[..., : len(tokenizer)])


def test_a_new_token_is_the_mean_of_the_old_ones_of_its_text(monkeypatch, source, tmp_path):
    new = sentencepiece_bpe()
    new.save_pretrained(tmp_path / "tokenizer")
    flags = ("--tokenizer", tmp_path / "tokenizer", "--layers", 2)
    student, tokenizer = made(monkeypatch, source, tmp_path / "student", *flags)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    old_tokenizer = AutoTokenizer.from_pretrained(source)
    old, forms = token_forms(old_tokenizer), token_forms(tokenizer)
    rows, old_rows = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    several = 0
    for i, form in enumerate(forms.forms):
        if forms.is_special[i] or not form:
            continue
        text = form.decode("utf-8", "surrogateescape")
        if not text.isascii() or form in old.forms:
            continue
        ids = old_tokenizer(text, add_special_tokens=False)["input_ids"]
        several += 1
        torch.testing.assert_close(rows[i], old_rows[ids].mean(0))
    assert several > 5
    torch.testing.assert_close(rows[tokenizer.eos_token_id], old_rows[old_tokenizer.eos_token_id])
    head, old_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    torch.testing.assert_close(head[tokenizer.eos_token_id], old_head[old_tokenizer.eos_token_id])
    # Layers 0 and 2 of 3.
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    for mine, theirs in zip(student.model.layers, (teacher.model.layers[0], teacher.model.layers[2])):
        torch.testing.assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
    report = json.loads((tmp_path / "student/transfer.json").read_text())
    assert report["tokens"] == len(tokenizer) and report["mean of several"] >= several


def test_bytes_that_are_no_text_are_made_of_the_longest_old_tokens():
    old, new = byte_level_bpe(), sentencepiece_bpe()
    old_forms, new_forms = token_forms(old), token_forms(new)
    for form, pieces in zip(new_forms.forms, pieces_of(old_forms, old, new_forms)):
        if form and pieces and len(pieces) > 1:
            assert b"".join(old_forms.forms[i] for i in pieces) == form


def test_mean_rows_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    expected = torch.tensor([[3.0, 6.0], [2.0, 4.0], [3.0, 3.0], [11 / 3, 4 / 3]])
    torch.testing.assert_close(mean_rows(weight, [[1], [0, 1], [], [2, 2, 0]]), expected)


def test_a_tokenizer_is_trained(monkeypatch, source, tmp_path):
    rows = [{"prefix": "Say: ", "text": text} for text in SAMPLE_TEXTS * 20]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ("--train_tokenizer", tmp_path / "rows.json", "--vocab_size", 300)
    student, tokenizer = made(monkeypatch, source, tmp_path / "student", *flags)
    assert len(tokenizer) == student.config.vocab_size <= 310
    assert tokenizer.decode(tokenizer(SAMPLE_TEXTS[0])["input_ids"]) == SAMPLE_TEXTS[0]


def test_a_file_without_text_trains_no_tokenizer(monkeypatch, source, tmp_path, capsys):
    (tmp_path / "rows.json").write_text('[{"messages": []}]', encoding="utf-8")
    with pytest.raises(SystemExit):
        made(monkeypatch, source, tmp_path / "student", "--train_tokenizer", tmp_path / "rows.json")
    assert "no column of its rows holds text" in capsys.readouterr().err and not (tmp_path / "student").exists()


@pytest.mark.parametrize("count", [0, 4])
def test_layers_that_are_not_there(monkeypatch, source, tmp_path, capsys, count):
    with pytest.raises(SystemExit) as ended:
        made(monkeypatch, source, tmp_path / "student", "--tokenizer", source, "--layers", count)
    assert ended.value.code == 2 and f"--layers {count}: give 1 to 3" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_a_student_that_is_there_is_replaced_only_where_that_is_wanted(monkeypatch, source, tmp_path, capsys):
    output = tmp_path / "student"
    made(monkeypatch, source, output, "--tokenizer", source)
    (output / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        made(monkeypatch, source, output, "--tokenizer", source)
    assert "Give --overwrite" in capsys.readouterr().err and (output / "mine").read_text() == "precious"
    made(monkeypatch, source, output, "--tokenizer", source, "--layers", "1", "--overwrite")
    assert not (output / "mine").exists() and not output.with_name("student.unfinished").exists()


def test_a_single_layer_is_the_first(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    assert keep_layers(model, 1) == [0]
