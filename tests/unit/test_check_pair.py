"""check_pair.py: a pair that fits, and pairs that fail in each way, found before any training."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.chat_templates import CHATML
from tests.unit.helpers import small_model
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

SCRIPT = Path(__file__).parents[2] / "script_eval/check_pair.py"
ROWS = [{"prefix": f"Say {i}: ", "text": text} for i, text in enumerate(SAMPLE_TEXTS)]
CHATS = [
    {"messages": [{"role": "user", "content": row["prefix"]}, {"role": "assistant", "content": row["text"]}]}
    for row in ROWS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher with different tokenizers, and models whose contexts differ."""
    root = tmp_path_factory.mktemp("pair")
    for seed, (name, tokenizer) in enumerate((("student", byte_level_bpe()), ("teacher", sentencepiece_bpe())), 1):
        model = small_model(tokenizer, 8, seed=seed)
        model.config.max_position_embeddings = 1000 * seed
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def check(folders, tmp_path, monkeypatch, capsys):
    """Runs the script; returns its status, what it printed, and its findings by kind."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))

    def call(rows, **flags):
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        given = {"student": folders / "student", "teacher": folders / "teacher", "file": tmp_path / "rows.json"}
        given |= {"json": tmp_path / "pair.json", **flags}
        parts = [part for name, value in given.items() for part in (f"--{name}", value) if part is not True]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, parts)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        found: dict[str, list[str]] = {"ok": [], "note": [], "problem": []}
        if ended.value.code != 2:
            for finding in json.loads((tmp_path / "pair.json").read_text())["findings"]:
                found[finding["kind"]].append(finding["what"])
        return ended.value.code, out + err, found

    return call


def test_a_pair_that_fits(check, folders):
    status, out, found = check(ROWS)
    assert status == 0 and not found["problem"]
    tokenizer = byte_level_bpe()
    assert f"{len(tokenizer):,}" in out and "1,000" in out and "2,000" in out  # tokens, contexts
    parameters = AutoModelForCausalLM.from_pretrained(folders / "student").num_parameters()
    assert f"{parameters:,}" in out
    assert "The first prompt, as the teacher sees it:\nSay 0: \n" in out
    assert any("is one event" in what for what in found["ok"])
    assert "Methods that fit, the likeliest first: CDM, ALM, BPM" in out and "FKD" not in out


def test_one_tokenizer_on_both_sides(check, folders):
    _, out, _ = check(ROWS, teacher=folders / "student")
    assert "likeliest first: FKD, RKD" in out and "100.0% in groups of one token each" in out


def test_a_teacher_that_is_worse(check):
    status, out, found = check(ROWS, with_models=True, model_rows=3)
    bits = next(line for line in out.splitlines() if line.startswith("bits per byte")).split()[-2:]
    worse = float(bits[1]) >= float(bits[0])
    assert status == int(worse) and worse == any("cannot teach" in what for what in found["problem"])


def test_a_teacher_that_is_worse_than_one_that_says_what_stands_there(check, folders, tmp_path):
    """A student that knows the first bytes: half its bits at least."""
    model = AutoModelForCausalLM.from_pretrained(folders / "student")
    tokenizer = byte_level_bpe()
    ids = tokenizer(ROWS[0]["prefix"] + ROWS[0]["text"], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    status, _, found = check(ROWS[:1], with_models=True, student=tmp_path / "student")
    assert status == 1 and any("cannot teach" in what for what in found["problem"])
    status, _, found = check(ROWS[:1], with_models=True, teacher=tmp_path / "student")
    assert status == 0 and any("predicts the responses better" in what for what in found["ok"])


def test_a_block_that_a_side_cannot_read(check):
    status, _, found = check(ROWS, block_size=1500)
    assert status == 1 and "the student reads 1,000 tokens at most" in found["problem"][0]


def test_rows_that_cannot_be_used(check):
    status, _, found = check([{"prefix": "Say: ", "text": ""}] * 3)
    assert status == 1 and "none of 3 rows can be used" in found["problem"][0]
    status, _, found = check([*ROWS[:3], {"prefix": "Say: ", "text": ""}])
    assert status == 1 and "1 of 4 rows would be left out" in found["problem"][0]
    status, _, found = check([*ROWS, *ROWS, {"prefix": "Say: ", "text": ""}])
    assert status == 0 and any("1 of" in what and "left out" in what for what in found["note"])


def test_rows_that_are_cut(check):
    status, _, found = check([{"prefix": "Say: ", "text": "a long answer " * 40}], block_size=32)
    assert status == 1 and "1 of 1 rows are cut at --block_size 32" in found["problem"][0]


def test_chats(check, folders, tmp_path):
    status, out, _ = check(CHATS)
    assert status == 2 and "--student_chat_template FILE" in out
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    templates = {f"{side}_chat_template": tmp_path / "chatml.jinja" for side in ("student", "teacher")}
    status, out, _ = check(CHATS, **templates)
    assert status == 0 and out.count("<|im_start|>user\nSay 0:") == 2


def test_a_model_with_fewer_columns_than_tokens(check, folders, tmp_path):
    tokenizer = sentencepiece_bpe()
    tokenizer.add_tokens(["<more>"] * 1 + [f"<more{i}>" for i in range(20)])
    AutoModelForCausalLM.from_pretrained(folders / "teacher").save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    status, _, found = check(ROWS, teacher=tmp_path / "short")
    assert status == 1 and "The teacher's tokenizer has" in found["problem"][0]
    status, _, found = check(ROWS, student=tmp_path / "short")
    assert status == 0 and any("will be resized" in what for what in found["note"])


def test_tokenizers_alone(check, tmp_path):
    sentencepiece_bpe().save_pretrained(tmp_path / "tokenizer")
    status, out, found = check(ROWS, teacher=tmp_path / "tokenizer")
    assert status == 0 and "unknown" in out and any("Sizes and memory are left out" in what for what in found["note"])


def test_a_tokenizer_without_an_end(check, tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    status, out, _ = check(ROWS, teacher=tmp_path / "tokenizer")
    assert status == 2 and "declares no EOS token" in out
