"""The three sample files under data/: well formed, in the template, and right."""

import ast
import json
import operator
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modeling.text.rows import alpaca_prompt, read_rows
from script_train import quickstart_models
from tests.unit.helpers import small_model
from tests.unit.tokenizer_zoo import byte_level_bpe

DATA = Path(__file__).parents[2] / "data"
SAMPLES = ("dolly_train", "code_tuning", "math_tuning")
# The template, written out here a second time on purpose: the evaluation sets use these very words.
WITHOUT_INPUT = re.compile(
    r"Below is an instruction that describes a task\. "
    r"Write a response that appropriately completes the request\.\n\n"
    r"### Instruction:\n(?P<instruction>\S.*?)\n\n### Response:\n",
    re.DOTALL,
)
WITH_INPUT = re.compile(
    r"Below is an instruction that describes a task, paired with an input that provides further context\. "
    r"Write a response that appropriately completes the request\.\n\n"
    r"### Instruction:\n(?P<instruction>\S.*?)\n\n### Input:\n(?P<input>\S.*?)\n\n### Response:\n",
    re.DOTALL,
)

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def sample_path(name):
    return DATA / f"{name}.sample.json"


def load(name):
    return json.loads(sample_path(name).read_text(encoding="utf-8"))


def evaluate(expression):
    """The value of an arithmetic expression that holds numbers, + - * / and brackets only."""

    def value(node):
        if isinstance(node, ast.BinOp):
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int | float), ast.dump(node)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def number(text):
    return float(text.replace(",", ""))


# ------------------------------------------------------------------------------------------------------- all three


@pytest.mark.parametrize("name", SAMPLES)
def test_fifty_examples_in_a_small_readable_file(name):
    raw = sample_path(name).read_text(encoding="utf-8")
    rows = json.loads(raw)
    assert len(rows) == 50
    assert raw == json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    assert sample_path(name).stat().st_size < 200_000


@pytest.mark.parametrize("name", SAMPLES)
def test_prompts_follow_the_template_word_for_word(name):
    for row in load(name):
        pattern = WITH_INPUT if "### Input:" in row["prefix"] else WITHOUT_INPUT
        match = pattern.fullmatch(row["prefix"])
        assert match, row["prefix"]
        for part in match.groupdict().values():
            assert part == part.strip()
            assert "###" not in part


@pytest.mark.parametrize("name", SAMPLES)
def test_examples_are_distinct_and_have_a_response(name):
    rows = load(name)
    assert len({row["prefix"] for row in rows}) == len({row["text"] for row in rows}) == 50
    for row in rows:
        assert row["text"] == row["text"].strip() != ""
        assert "\ufffd" not in row["prefix"] + row["text"]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_loader_takes_the_file(name):
    rows = load(name)
    assert [(row["prefix"], row["text"]) for row in read_rows(sample_path(name))] == [
        (row["prefix"], row["text"]) for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------- math


@pytest.mark.parametrize("place", range(50))
def test_math_is_right(place):
    text = load("math_tuning")[place]["text"]
    working, answer = re.fullmatch(r"(.*)\n#### (-?[\d,]+(?:\.\d+)?)", text, re.DOTALL).groups()
    steps = re.findall(r"<<([^<>=]+)=([^<>=]+)>>(-?[\d.]*\d)", working)
    assert steps and len(steps) == working.count("<<") == working.count(">>")
    for expression, value, written in steps:
        assert evaluate(expression) == pytest.approx(float(value), rel=1e-9)
        assert written == value
    assert number(answer) == float(steps[-1][1])


# ------------------------------------------------------------------------------------------------------------- code


def run_with_asserts(row):
    program = "\n".join([row["text"], *row["tests"], "print('passed')"])
    return subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, encoding="utf-8", timeout=20, check=False
    )


def test_code_passes_its_own_asserts():
    rows = load("code_tuning")
    with ThreadPoolExecutor(2) as pool:
        for row, result in zip(rows, pool.map(run_with_asserts, rows)):
            assert result.stdout == "passed\n", f"{row['text']}\n{result.stderr}"


def test_code_is_plain_and_tested():
    for row in load("code_tuning"):
        assert "```" not in row["text"]
        names = [n.name for n in ast.parse(row["text"]).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert len(names) == 1
        assert row["tests"] and all("assert " in test and names[0] in test for test in row["tests"])


@pytest.mark.parametrize("choice", [False, True])
def test_the_quickstarts_parts_share_no_row(monkeypatch, tmp_path, choice):
    files = [str(DATA / f"{name}.sample.json") for name in SAMPLES]
    command = ["quickstart_models.py", "split", "--data", *files, "--output", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", command + ["--choice"] * choice)
    quickstart_models.main()
    sizes = {"train": 120, "choice": 15, "held_out": 15} if choice else {"train": 135, "held_out": 15}
    assert {path.stem for path in (tmp_path / "data").iterdir()} == set(sizes)
    parts = {name: list(read_rows(tmp_path / f"data/{name}.json")) for name in sizes}
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert len({row["prefix"] for rows in parts.values() for row in rows}) == 150


def test_what_models_answer_to_three_prompts(tmp_path):
    tokenizer = byte_level_bpe()
    folders = [f"{name}={tmp_path / name}" for name in ("teacher", "SFT")]
    for seed, name in enumerate(("teacher", "SFT")):
        small_model(tokenizer, 0, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prefix": alpaca_prompt(f"Question {i}?", ""), "text": f"Answer {i}."} for i in range(7)]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    quickstart_models.answer(folders, tmp_path / "held_out.json", tmp_path / "answers")
    text = (tmp_path / "answers/answers.md").read_text()
    assert re.findall(r"### (.*)", text) == ["Question 0?", "Question 3?", "Question 6?"]
    assert re.findall(r"\*\*(.*?)\*\*", text) == ["as it was written", "teacher", "SFT"] * 3
    assert "- **as it was written**: Answer 3." in text
