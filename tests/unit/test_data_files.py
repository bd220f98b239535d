"""Rows of data files: their layouts, the template, and files that are damaged or something else."""

import gzip
import json

import pytest

from modeling.errors import InputError
from modeling.text.json_files import read_json
from modeling.text.rows import CHANGE_THE_MEANING, LAYOUTS, alpaca_prompt, prefix_and_text, read_rows


def test_alpaca_template_word_for_word():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prefix": "p", "text": "t", "category": 1}, ("p", "t")),
        ({"instruction": "i", "output": "o"}, (alpaca_prompt("i"), "o")),
        ({"instruction": "i", "input": None, "output": "o"}, (alpaca_prompt("i"), "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, (alpaca_prompt("i", "x"), "o")),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"prompt": "p", "output": "o"}, ("p", "o")),
        ({"prompt": "p", "output": ["first", "second"]}, ("p", "first")),
        # What is empty changes nothing, in every way that files have of saying so.
        ({"instruction": "i", "output": "o", "system": None, "history": [], "context": " "}, (alpaca_prompt("i"), "o")),
        ({"prefix": "p", "text": "t", "messages": [], "tools": "[]", "images": float("nan")}, ("p", "t")),
        ({"instruction": "i", "input": "[]", "output": "o"}, (alpaca_prompt("i", "[]"), "o")),
        ({"prompt": "p", "completion": "c", "label": True, "kto_tag": None}, ("p", "c")),
        ({"prefix": "p", "text": "t", "label": False, "context": "c"}, ("p", "t")),  # where it says nothing of a kind
    ],
)
def test_every_layout_of_a_row(row, expected):
    assert prefix_and_text(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prefix": "p"}, "prefix \\+ text"),
        ({"prefix": "p", "text": 3}, "column 'text' holds int, not a string"),
        ({"prefix": None, "text": "t"}, "column 'prefix' holds null"),
        ({"prompt": "p", "output": []}, "column 'output' holds list"),
        ({"instruction": "i", "input": 3, "output": "o"}, "column 'input' holds int"),
        ({"prefix": "p", "text": "half \ud83d"}, "column 'text' holds half of a surrogate pair"),
        ({}, "the columns \\(none\\)"),
        ({"instruction": "i", "output": "o", "history": ["a"]}, "'history' holds something else than pairs"),
        ({"instruction": "i", "output": "o", "history": [["a", None]]}, "column 'history' holds null"),
        ({"instruction": "i", "output": "o", "system": 3}, "column 'system' holds int"),
        ({"instruction": "i", "output": "o", "context": "c"}, "'context' is not empty, .* call it 'input'"),
        ({"prompt": "p", "completion": "c", "label": False}, "marked as one that is not wanted"),
        ({"instruction": "i", "output": "o", "kto_tag": False}, "marked as one that is not wanted"),
        ({"messages": [{"role": "user", "content": "c"}]}, "the columns 'messages', and none of these pairs"),
        ({"question": "q", "answer": "a"}, "python data/prepare_data.py gsm8k --source"),
        ({"instruction": "i", "context": "", "response": "r"}, "python data/prepare_data.py dolly --source"),
        ({"task_id": 1, "text": "t", "code": "c", "test_list": []}, "python data/prepare_data.py code --source"),
        (["p", "t"], "JSON list, not an object"),
    ],
)
def test_a_bad_row_is_told(row, message):
    with pytest.raises(ValueError, match=message):
        prefix_and_text(row)


def test_system_and_history_of_an_alpaca_row():
    row = {"instruction": "And 2?", "input": "n", "output": "o", "system": "Be brief."}
    row["history"] = [["1?", "a"], ["", "b"]]
    preamble, _, turn = alpaca_prompt("And 2?", "n").partition("### Instruction:")
    earlier = "### Instruction:\n1?\n\n### Response:\na\n\n### Instruction:\n\n\n### Response:\nb\n\n"
    assert prefix_and_text(row) == (f"Be brief.\n\n{preamble}{earlier}### Instruction:{turn}", "o")


@pytest.mark.parametrize("column", CHANGE_THE_MEANING)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "+".join(layout.columns))
def test_a_column_that_changes_a_row_is_read_or_the_row_is_left_out(layout, column):
    row = {**dict.fromkeys(layout.columns, "x"), column: [["a", "b"]] if column == "history" else "something"}
    if column in layout.optional:
        assert ("something" if column == "system" else "a") in prefix_and_text(row)[0]
    else:
        with pytest.raises(ValueError, match=f"column '{column}' is not empty, and is not read"):
            prefix_and_text(row)


def test_rows_of_an_array_and_of_lines(tmp_path):
    rows = [{"prefix": "a", "text": "é\n"}, {"prefix": "b", "text": "2"}]
    expected = [{"row": 1, **rows[0], "fault": ""}, {"row": 2, **rows[1], "fault": ""}]
    (tmp_path / "array.json").write_text(" \n" + json.dumps(rows, indent=1), encoding="utf-8")
    assert list(read_rows(tmp_path / "array.json")) == expected
    (tmp_path / "lines.jsonl").write_text("\ufeff\n" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [r["text"] for r in read_rows(tmp_path / "lines.jsonl")] == ["é\n", "2"]
    assert [r["row"] for r in read_rows(tmp_path / "lines.jsonl")] == [2, 3]


def test_lines_are_read_one_by_one(tmp_path):
    """What comes before a damaged line has been given by then."""
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n[2]\n{"a":\n')
    values = read_json(tmp_path / "lines.jsonl")
    assert [next(values), next(values)] == [(1, {"a": 1}), (2, [2])]
    with pytest.raises(InputError, match="line 3"):
        next(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prefix": "a", "text": "b"}\n{"prefix": "a"\n', "lines.jsonl, line 2: not valid JSON"),
        (b'{"prefix": "a", "text": "b"}\n{"prefix": "a"},\n', "lines.jsonl, line 2: .* Leave out the comma"),
        (b'{"prefix": "a", "text": 1' + b"0" * 5000 + b"}", "lines.jsonl, line 1: not valid JSON"),
        (b"[" * 100_000, "lines.jsonl: JSON that cannot be read"),
        (b'{"a": ' * 100_000, "lines.jsonl, line 1: not valid JSON"),
        (b'[{"prefix": "a", "text": "b"},\n]', "lines.jsonl, line [12]: not valid JSON .* Repair the array"),
        (b'[{"prefix": "a",\n "text": "b"}', "lines.jsonl, line 2: .* The file ends too early"),
        (b'[{"prefix": "a",\n "text": "b', "lines.jsonl, line 2: .* The file ends too early"),
        (b'[{"prefix": "a",\n "text": "b\\', "lines.jsonl, line 2: .* The file ends too early"),
        (b'[{"prefix": "a",\n "text" "b"}]', "lines.jsonl, line 2: not valid JSON .* Repair the array"),
        (b'[{"prefix": "a", "text": "b"}]\n[]', "lines.jsonl, line 2: not valid JSON .* Repair the array"),
        (b'{"prefix": "\xff", "text": "b"}', "lines.jsonl, byte 12: not UTF-8 \\(in line 1\\)"),
        (b"{}\n" * 9000 + b"\xe9", "lines.jsonl, byte 27000: not UTF-8 \\(in line 9001\\)"),
        (b"[" + b"{},\n" * 9000 + b'"\xe9"]', "lines.jsonl, byte 36002: not UTF-8 \\(in line 9001\\)"),
        ("[{}]".encode("utf-16"), "iconv -f UTF-16"),
        (b"", "the file is empty"),
        (b"PAR1\x15\x04", "not a complete Parquet file"),
        (gzip.compress(b'[{"prefix": "a", "text": "b"}]' * 99, mtime=0)[:-9], "not a complete gzip file"),
    ],
)
def test_a_bad_file_is_told_with_its_place(tmp_path, content, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_rows(path))


@pytest.mark.parametrize("cause", ["as another Python says it", ""])
def test_a_string_without_end_is_known_in_any_pythons_words(tmp_path, monkeypatch, cause):
    described = json.JSONDecodeError.__init__
    monkeypatch.setattr(json.JSONDecodeError, "__init__", lambda self, msg, *place: described(self, cause, *place))
    (tmp_path / "cut.json").write_text('[{"prefix": "a", "text": "long long long')
    with pytest.raises(InputError, match="The file ends too early"):
        list(read_rows(tmp_path / "cut.json"))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(tmp_path / "none.json"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_rows(tmp_path))


def test_a_row_that_cannot_be_used_says_why(tmp_path):
    rows = [{"prefix": "a", "text": "b"}, {"prefix": "a"}, {"prefix": "a", "text": " \n\u3000"}, None]
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "array.json.gz").write_bytes(gzip.compress((tmp_path / "array.json").read_bytes()))
    for path in (tmp_path / "array.json", tmp_path / "array.json.gz"):
        first, *others = read_rows(path)
        assert first == {"row": 1, "prefix": "a", "text": "b", "fault": ""}
        assert [(r["row"], r["prefix"], r["text"]) for r in others] == [(2, "", ""), (3, "", ""), (4, "", "")]
        faults = ("it has the columns 'prefix'", "the text to learn is empty", "it is a JSON null, not an object")
        assert all(row["fault"].startswith(fault) for row, fault in zip(others, faults))
