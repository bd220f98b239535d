"""data/prepare_data.py: from real and from small made-up sources to training files."""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling.text.messages import ChatRows
from modeling.text.rows import alpaca_prompt, read_rows
from tests.unit.tokenizer_zoo import real_dir

SCRIPT = Path(__file__).parents[2] / "data" / "prepare_data.py"
spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
prepare_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_data)


@pytest.fixture(scope="session")
def real():
    return real_dir() / "data"


def run_script(*arguments, **environment):
    """Run the script as a user does, from a folder that is not the project's."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd="/",
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def prepare(kind, source, output, *flags):
    """Runs the script's main, and gives the rows that it has written."""
    prepare_data.main([kind, *map(str, ("--source", source, "--output", output, *flags))])
    return load(output)


def error_of(*arguments):
    """The message with which the command line ends."""
    with pytest.raises(SystemExit) as exit_info, contextlib.redirect_stderr(io.StringIO()) as stderr:
        prepare_data.main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    assert "error: " in stderr.getvalue()
    return stderr.getvalue()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path):
    """The rows of an output. `splitlines` also ends lines at U+2028, which the script therefore has to escape."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def dolly_row(instruction, response, context=""):
    return {"instruction": instruction, "context": context, "response": response, "category": "open_qa"}


# ------------------------------------------------------------------------------------------------------ real sources


def test_dolly_leaves_out_the_evaluation_splits(real, tmp_path):
    """The counts were found by comparing the files outside this project.

    All 500 test rows and 999 of the 1,000 dev rows are in the source, some of them twice: 502 and 1,001 rows. Of the
    15 exact duplicates 12 are left after that.
    """
    output = tmp_path / "dolly.jsonl"
    source, test, dev = (real / "dolly" / f"{name}.jsonl" for name in ("databricks-dolly-15k", "valid", "dev"))
    result = run_script("dolly", "--source", source, "--output", output, "--exclude", test, dev)
    assert result.returncode == 0, result.stderr
    assert f"{source}: 15011 rows read" in result.stdout
    assert f"502 left out: also in {test}" in result.stdout
    assert f"1001 left out: also in {dev}" in result.stdout
    assert "12 left out: exact duplicate" in result.stdout
    assert "13496 kept" in result.stdout
    assert f"{test}: 500 of its 500 rows found" in result.stdout
    assert f"{dev}: 999 of its 1000 rows found" in result.stdout
    assert result.stderr.count("warning:") == 1
    assert f"{dev}, row 507 isn't in the source: 'Why Indians are so lazy'" in result.stderr

    rows = load(output)
    assert len(rows) == len({(row["prefix"], row["text"]) for row in rows}) == 13496 == 15011 - 502 - 1001 - 12
    evaluated = {(row["prefix"], row["text"]) for path in (test, dev) for row in read_rows(path)}
    assert not evaluated & {(row["prefix"], row["text"]) for row in rows}
    assert set(rows[0]) == {"prefix", "text"}


def test_dolly_prompts_are_those_of_the_evaluation_split(real, tmp_path):
    """A row that both files have unchanged gets, character for character, the prompt of the evaluation file."""
    rows = prepare("dolly", real / "dolly/databricks-dolly-15k.jsonl", tmp_path / "dolly.json")
    prepared = {(row["prefix"], row["text"]) for row in rows}
    assert len(prepared) == 15011 - 15
    evaluation = load(real / "dolly" / "valid.jsonl")
    assert sum((row["prompt"], row["output"]) in prepared for row in evaluation) == 446


def test_gsm8k(real, tmp_path, capsys):
    rows = prepare("gsm8k", real / "gsm8k/train.jsonl", tmp_path / "math.json")
    assert len(rows) == 7473
    assert sum("<<" in row["text"] for row in rows) == 7378
    assert all("\n#### " in row["text"] and row["prefix"].endswith("\n\n### Response:\n") for row in rows)
    assert "7473 kept" in capsys.readouterr().out


def test_gsm8k_without_annotations(real, tmp_path):
    rows = prepare("gsm8k", real / "gsm8k/train.jsonl", tmp_path / "math.jsonl", "--strip_annotations")
    assert len(rows) == 7473
    assert not any("<<" in row["text"] or ">>" in row["text"] for row in rows)
    assert "48/2 = 24 clips" in rows[0]["text"]


def test_mbpp_keeps_the_training_tasks(real, tmp_path, capsys):
    rows = prepare("code", real / "mbpp/mbpp.jsonl", tmp_path / "code.jsonl")
    assert "600 left out: task id outside 601-974" in capsys.readouterr().out
    assert len(rows) == 374
    assert all("\nassert " in row["prefix"] and "\r" not in row["prefix"] + row["text"] for row in rows)
    # Task 927 builds its trees before the asserts, which make no sense without them.
    setup = [row["prefix"] for row in rows if "root = Node(1)" in row["prefix"]]
    assert len(setup) == 1 and setup[0].index("root = Node(1)") < setup[0].index("\nassert ")


def test_mbpp_tests_pass_on_the_prepared_solution(real, tmp_path):
    for row in prepare("code", real / "mbpp/mbpp.jsonl", tmp_path / "code.jsonl", "--task_ids", "602-604"):
        asserts = [line for line in row["prefix"].splitlines() if line.startswith("assert ")]
        assert len(asserts) == 3
        exec("\n".join([row["text"], *asserts]), {})


# ------------------------------------------------------------------------------------------------- matching of rows


def test_exclusion_sees_through_white_space_reference_marks_and_a_lost_context(tmp_path, capsys):
    source = write_lines(
        tmp_path / "source.jsonl",
        [
            dolly_row("Who was she?", "A  pilot.\n", "She flew."),
            dolly_row("Name one.", "Oslo", "Towns."),
            dolly_row("Name one.", "Oslo!", "Towns."),
            dolly_row("Name two.", "Oslo"),
            dolly_row("Where?", "Second answer"),
        ],
    )
    evaluation = write_lines(
        tmp_path / "valid.jsonl",
        [
            {"prompt": alpaca_prompt("Who was she?", "She flew.[3]"), "output": "A pilot.[citation needed]"},
            {"prompt": alpaca_prompt("Name one.", "Towns and cities."), "output": "Oslo"},
            {"prompt": alpaca_prompt("Where?"), "output": ["First answer", "Second answer"]},
            {"prompt": alpaca_prompt("Never asked?"), "output": "So not found"},
        ],
    )
    rows = prepare("dolly", source, tmp_path / "out.jsonl", "--exclude", evaluation)
    assert [row["text"] for row in rows] == ["Oslo!", "Oslo"]
    printed = capsys.readouterr()
    assert f"3 left out: also in {evaluation} (rows 1, 2, 5)" in printed.out
    assert "3 of its 4 rows found" in printed.out
    assert f"{evaluation}, row 4 isn't in the source: 'Never asked?'" in printed.err


def test_an_output_of_this_script_can_be_excluded(tmp_path):
    source = write_lines(tmp_path / "source.jsonl", [dolly_row(f"q{n}", f"a{n}", "c") for n in range(6)])
    held_out = tmp_path / "held_out.json"
    split = ("--validation_output", held_out, "--validation_size", 2)
    first = prepare("dolly", source, tmp_path / "first.jsonl", *split)
    assert first == prepare("dolly", source, tmp_path / "second.jsonl", "--exclude", held_out)
    assert len(load(held_out)) == 2


# ------------------------------------------------------------------------------------------------ what is left out


def test_empty_and_repeated_rows_are_counted_and_named(tmp_path, capsys):
    rows = [
        dolly_row("a", "b"),
        dolly_row("c", "  \n"),
        dolly_row("a", "b"),
        dolly_row("d", None),
        dolly_row("  ", "e"),
        dolly_row("a", "b", "   "),
        dolly_row("a", "b", None),
        dolly_row("a", "b", "with input"),
    ]
    assert prepare("dolly", write_lines(tmp_path / "source.jsonl", rows), tmp_path / "out.jsonl") == [
        {"prefix": alpaca_prompt("a"), "text": "b"},
        {"prefix": alpaca_prompt("a", "with input"), "text": "b"},
    ]
    printed = capsys.readouterr().out
    assert "8 rows read" in printed
    assert "2 left out: empty response (rows 2, 4)" in printed
    assert "1 left out: empty instruction (row 5)" in printed
    assert "3 left out: exact duplicate of an earlier row (rows 3, 6, 7)" in printed
    assert "2 kept" in printed


# ------------------------------------------------------------------------------------------------ sources and outputs


def write_source(path, rows):
    """Write rows in the format that the name of the file asks for."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".jsonl" in path.suffixes:
        text = "\n\n".join(json.dumps(row) for row in rows)
        (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    else:
        text = json.dumps(rows, indent=1)
        (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8-sig").write(text)
    return path


def test_rows_as_chats(tmp_path):
    """Instruction and input are the user's, without the template, which reading them back as plain rows would give."""
    source, output = tmp_path / "source.jsonl", tmp_path / "chats.jsonl"
    cells = (("Add.", "1 2", "3"), ("Hi.", "", "Ho."))
    rows = [dict(zip(("instruction", "context", "response"), row)) for row in cells]
    source.write_text("\n".join(map(json.dumps, rows)))
    prepare_data.main(["dolly", "--source", str(source), "--output", str(output), "--format", "messages"])
    turns = [[m["content"] for m in json.loads(line)["messages"]] for line in output.read_text().splitlines()]
    assert turns == [["Add.\n\n1 2", "3"], ["Hi.", "Ho."]]
    assert [row["text"] for row in read_rows(output, ChatRows())] == ["3", "Ho."]


@pytest.mark.parametrize("name", ["s.json", "s.jsonl", "s.json.gz", "s.jsonl.gz", "s.parquet"])
@pytest.mark.parametrize("output_name", ["new/folder/out.json", "out.jsonl"])
def test_source_and_output_formats(tmp_path, name, output_name):
    rows = [{"question": f"How many is {n}?", "answer": f"“{n}” 日本\n#### {n}"} for n in range(3)]
    output = tmp_path / output_name
    expected = [{"prefix": alpaca_prompt(row["question"]), "text": row["answer"]} for row in rows]
    assert prepare("gsm8k", write_source(tmp_path / name, rows), output) == expected
    assert "日本" in output.read_text(encoding="utf-8")
    assert [row["text"] for row in read_rows(output)] == [row["answer"] for row in rows]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / name, output}


def test_a_folder_is_read_with_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    write_lines(folder / "test.jsonl", [{"question": "1+2?", "answer": "#### 3"}])
    for split, answer in (("train", "#### 2"), ("test", "#### 3")):
        rows = prepare("gsm8k", folder, tmp_path / f"{split}.json", "--config", "default", "--split", split)
        assert [row["text"] for row in rows] == [answer]


def test_validation_is_drawn_from_the_rest_and_repeatable(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(40)])
    drawn = []
    for seed in ("1", "1", "2"):
        held_out = tmp_path / "held_out.jsonl"
        split = ("--validation_output", held_out, "--validation_size", 10, "--seed", seed)
        rows = prepare("gsm8k", source, tmp_path / "train.json", *split)
        texts, held_out_texts = ([row["text"] for row in part] for part in (rows, load(held_out)))
        assert len(texts) == 30 and len(held_out_texts) == 10
        assert sorted(texts + held_out_texts) == sorted(f"a{n}" for n in range(40))
        drawn.append(held_out_texts)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "row, prefix",
    [
        ({"instruction": "i", "output": "r"}, alpaca_prompt("i")),
        ({"instruction": "i", "input": "x", "output": "r"}, alpaca_prompt("i", "x")),
        ({"instruction": "i", "input": None, "response": "r"}, alpaca_prompt("i")),
        ({"problem": "i", "solution": "r"}, alpaca_prompt("i")),
        ({"prompt": "i", "completion": "r"}, alpaca_prompt("i")),
        ({"prompt": "My own words.\n\n### Response:", "completion": "r"}, "My own words.\n\n### Response:\n"),
        ({"prompt": alpaca_prompt("i", "x"), "completion": "r"}, alpaca_prompt("i", "x")),
    ],
)
def test_code_columns(tmp_path, row, prefix):
    rows = prepare("code", write_lines(tmp_path / "s.jsonl", [row]), tmp_path / "out.json")
    assert rows == [{"prefix": prefix, "text": "r"}]


def test_code_columns_of_other_names(tmp_path):
    source = write_lines(
        tmp_path / "s.jsonl", [{"task": "i", "hint": "x", "python": "r"}, {"task": "j", "python": "s"}]
    )
    names = ["--instruction_column", "task", "--input_column", "hint", "--response_column", "python"]
    assert [row["prefix"] for row in prepare("code", source, tmp_path / "out.json", *names)] == [
        alpaca_prompt("i", "x"),
        alpaca_prompt("j"),
    ]


def test_rows_that_say_more_than_is_read_are_left_out(tmp_path, capsys):
    rows = [{"instruction": str(i), "output": "o"} for i in range(3)]
    rows[1]["history"], rows[2]["system"] = [["a", "b"]], ""
    made = prepare("code", write_lines(tmp_path / "s.jsonl", rows), tmp_path / "out.json")
    assert [row["prefix"] for row in made] == [alpaca_prompt("0"), alpaca_prompt("2")]
    assert "1 left out: column 'history' is not empty, and is not read" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"question": "q", "answer": "a"}\n{"question": "q", "ans', "line 2: not valid JSON"),
        ('{"question": "q", "answer": "a"}\n{"question": "q"}', "row 2: no column 'answer' among ['question']"),
        ('{"question": "q", "answer": 3}', "row 1: column 'answer' holds int, not a string"),
        ('["q", "a"]', "row 1: a JSON str, not an object"),
        ('[{"question": "q",', "line 1: not valid JSON"),
        ("\n\n", "none of its 0 rows is left"),
        ("[]", "none of its 0 rows is left"),
        ('{"question": "q", "answer": ""}', "none of its 1 rows is left"),
    ],
)
def test_errors_name_file_row_and_trouble(tmp_path, content, expected):
    source, output = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    source.write_text(content, encoding="utf-8")
    message = error_of("gsm8k", "--source", source, "--output", output)
    assert str(source) in message and expected in message
    assert not output.exists()


def test_errors_about_files(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"question": "q", "answer": "a"}])
    output = tmp_path / "out.json"
    for missing in (tmp_path / "nope.jsonl", "user/nope.jsonl"):
        message = error_of("gsm8k", "--source", missing, "--output", output)
        assert f"error: {missing}: it cannot be read" in message and "give a local file as --source" in message
    assert "line 1: not valid JSON" in error_of("gsm8k", "--source", SCRIPT, "--output", output)
    assert ".json or .jsonl" in error_of("gsm8k", "--source", source, "--output", tmp_path / "out.txt")
    assert "name of its own" in error_of("gsm8k", "--source", source, "--output", source)
    assert "needs --validation_output" in error_of(
        "gsm8k", "--source", source, "--output", output, "--validation_size", 1
    )
    split = ["--validation_output", tmp_path / "v.json", "--validation_size"]
    for size in (0, 1):
        assert f"--validation_size {size}: " in error_of("gsm8k", "--source", source, "--output", output, *split, size)
    bad = tmp_path / "bad.json.gz"
    bad.write_bytes(b"not gzip")
    assert "not a complete gzip file" in error_of("gsm8k", "--source", bad, "--output", output)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"question": "\xe9"}')
    assert "not UTF-8" in error_of("gsm8k", "--source", bad, "--output", output)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    assert f"{bad}: it cannot be read" in error_of("gsm8k", "--source", bad, "--output", output)


def test_errors_about_columns_and_excluded_files(tmp_path):
    output = tmp_path / "out.json"
    odd = write_lines(tmp_path / "odd.jsonl", [{"task": "i", "python": "r"}])
    message = error_of("code", "--source", odd, "--output", output)
    assert "row 1" in message and "['python', 'task']" in message and "--instruction_column" in message
    assert "go together" in error_of("code", "--source", odd, "--output", output, "--input_column", "task")
    mbpp = write_lines(tmp_path / "mbpp.jsonl", [{"text": "i", "code": "r", "test_list": "t"}])
    assert "task_id" in error_of("code", "--source", mbpp, "--output", output)
    dolly = write_lines(tmp_path / "dolly.jsonl", [dolly_row("a", "b")])
    message = error_of("dolly", "--source", dolly, "--output", output, "--exclude", odd)
    assert f"{odd}, row 1" in message
    missing = tmp_path / "valid.jsonl"
    assert f"{missing}: no such file" in error_of("dolly", "--source", dolly, "--output", output, "--exclude", missing)


def test_an_unreachable_hub_asks_for_a_local_file(tmp_path):
    result = run_script("gsm8k", "--output", tmp_path / "out.json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 2
    assert "error: openai/gsm8k: it cannot be read" in result.stderr
    assert "--split train and --config main" in result.stderr
    assert "give a local file as --source" in result.stderr
    assert "Traceback" not in result.stderr


def test_help(capsys):
    for arguments in (["--help"], ["dolly", "--help"], ["gsm8k", "--help"], ["code", "--help"]):
        with pytest.raises(SystemExit) as exit_info:
            prepare_data.main(arguments)
        assert exit_info.value.code == 0
        assert "None" not in capsys.readouterr().out


@pytest.mark.parametrize("ids", ["974-601", "601", "a-b"])
def test_a_bad_range_of_task_ids_is_refused(tmp_path, capsys, ids):
    with pytest.raises(SystemExit):
        prepare_data.main(["code", "--source", "s.jsonl", "--output", str(tmp_path / "o.json"), "--task_ids", ids])
    assert "as in 601-974" in capsys.readouterr().err
