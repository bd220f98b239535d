"""Rows, templates, tokenisation, cutting and batches, on small trained tokenizers and on the real ones."""

import gzip
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from modeling.errors import InputError
from modeling.examples import (
    CHANGE_THE_MEANING,
    IGNORED,
    LAYOUTS,
    Encoder,
    ResponseCollator,
    alpaca_prompt,
    encode_pair,
    prefix_and_text,
    prepare_example,
    read_rows,
    token_distances,
)
from modeling.json_array import elements
from tests.reference.cdm_oracle import levenshtein
from tests.unit.tokenizer_zoo import (
    REAL_TOKENIZERS,
    byte_level_bpe,
    load_real,
    real_dir,
    sentencepiece_bpe,
    unigram,
    wordpiece,
)

ZOO = {"byte-level": byte_level_bpe, "sentencepiece": sentencepiece_bpe, "unigram": unigram, "wordpiece": wordpiece}


@pytest.fixture(scope="module")
def small():
    return {name: Encoder(train()) for name, train in ZOO.items()}


@pytest.fixture(scope="module")
def real():
    real_dir()
    return {name: Encoder(load_real(name)) for name in REAL_TOKENIZERS}


# ------------------------------------------------------------------------------------------------ rows of a file


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


def test_read_rows_of_an_array_and_of_lines(tmp_path):
    rows = [{"prefix": "a", "text": "é\n"}, {"prefix": "b", "text": "2"}]
    expected = [{"row": 1, **rows[0], "fault": ""}, {"row": 2, **rows[1], "fault": ""}]
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    assert list(read_rows(tmp_path / "array.json")) == expected
    (tmp_path / "lines.jsonl").write_text("\ufeff\n" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [r["text"] for r in read_rows(tmp_path / "lines.jsonl")] == ["é\n", "2"]
    assert [r["row"] for r in read_rows(tmp_path / "lines.jsonl")] == [2, 3]


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
        (b'{"prefix": "\xff", "text": "b"}', "lines.jsonl, byte 12: not UTF-8 \\(in line 1\\)"),
        (b"{}\n" * 9000 + b"\xe9", "lines.jsonl, byte 27000: not UTF-8 \\(in line 9001\\)"),
        (b"[" + b"{},\n" * 9000 + b'"\xe9"]', "lines.jsonl, byte 36002: not UTF-8 \\(in line 9001\\)"),
        ("[{}]".encode("utf-16"), "iconv -f UTF-16"),
        (b"", "the file is empty"),
        (b"PAR1\x15\x04", "is a Parquet file"),
        (gzip.compress(b'[{"prefix": "a", "text": "b"}]' * 99, mtime=0)[:-9], "not a complete gzip file"),
    ],
)
def test_a_bad_file_is_told_with_its_row(tmp_path, content, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


@pytest.mark.parametrize("cause", ["as another Python says it", ""])
def test_a_string_without_end_is_known_in_any_pythons_words(tmp_path, monkeypatch, cause):
    """Cut off by a block's end, it is read on; by the file's end, that is told."""
    described = json.JSONDecodeError.__init__
    monkeypatch.setattr(json.JSONDecodeError, "__init__", lambda self, msg, *place: described(self, cause, *place))
    text = '[{"prefix": "a", "text": "' + "long " * 20 + '"}]'
    for block in (1, 40, 1000):
        assert list(elements(io.StringIO(text), block)) == json.loads(text)
    (tmp_path / "cut.json").write_text(text[:-4])
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


# ----------------------------------------------------------------------------------------------------- tokenising


def pieces(encoder: Encoder, encoded) -> list[bytes]:
    return [encoder.forms.forms[i] for i in encoded.input_ids[encoded.response_start :]]


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_the_response_is_the_text_then_eos(real, name):
    encoder = real[name]
    encoded = encoder.encode("Q: say it\n", "I say “é😀”.\n\n  Then\ttab")
    assert encoded.input_ids[-1] == encoder.eos_id
    assert b"".join(pieces(encoder, encoded)[:-1]) == "I say “é😀”.\n\n  Then\ttab".encode()
    assert encoded.ends[-1] == len("I say “é😀”.\n\n  Then\ttab".encode()) + 1
    # Every token ends where its bytes say.
    lengths = [len(piece) for piece in pieces(encoder, encoded)[:-1]]
    assert encoded.ends[:-1].tolist() == np.cumsum(lengths).tolist()


def test_hand_computed_ends(real):
    # qwen2 reads "é" (2 bytes) as one token and the rare "𒀀" (4 bytes) as several; both sides meet after each.
    for name in ("qwen2", "phi-3"):
        ends = real[name].encode("x:\n", "é𒀀.").ends.tolist()
        assert ends[-1] == 8 and {2, 6, 7} <= set(ends), (name, ends)
        assert ends == sorted(ends)


def test_what_the_tokenizer_puts_in_front_is_kept_once(real):
    assert real["phi-3"].encode("a", "b").input_ids[0] == real["phi-3"].tokenizer.bos_token_id
    assert real["opt"].encode("a", "b").input_ids.tolist().count(2) == 2  # </s> in front, </s> as EOS behind
    assert real["qwen2"].encode("a", " b").input_ids.tolist() == [64, 293, real["qwen2"].eos_id]


def test_a_token_astride_the_border_belongs_to_the_response(real):
    # Qwen2 reads "hello" as one token, so with the prefix "hel" nothing of the prompt is left in front.
    encoded = real["qwen2"].encode("say hel", "lo you")
    tokens = real["qwen2"].tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.response_start :])
    assert tokens[0] == "Ġhello" and encoded.ends.tolist() == [2, 6, 7]


def test_the_first_token_of_all_cannot_be_predicted(real):
    encoded = real["qwen2"].encode("", "hello you")
    assert encoded.response_start == 1 and encoded.ends.tolist() == [9, 10]
    encoded = real["phi-3"].encode("", "hello you")  # BOS stands in front of it
    assert encoded.response_start == 1 and encoded.ends.tolist() == [5, 9, 10]


def test_trailing_whitespace_in_a_token_counts(real):
    # Llama-3 has the token ".\n\n", whose reported offsets leave the newlines out.
    encoded = real["llama-3"].encode("Say:\n", "One.\n\nTwo.")
    assert encoded.ends.tolist() == [3, 6, 9, 10, 11]


def test_a_normaliser_that_changes_the_text(small, real):
    # Qwen2 composes "e" + U+0301 (3 bytes) into "é" (2 bytes); ends count the bytes of the text that was given.
    encoded = real["qwen2"].encode("x:\n", "cafe\u0301 au lait")
    assert encoded.ends[-1] == len("cafe\u0301 au lait".encode()) + 1
    assert {6, 9, 14} <= set(encoded.ends.tolist())
    # The small WordPiece lower-cases and drops white space.
    encoded = small["wordpiece"].encode("Say:\n", "The  Cat")
    assert encoded.ends[-1] == 9 and 3 in encoded.ends and encoded.ends[-2] == 8


def test_what_is_merged_or_dropped_behind_white_space_goes_with_it(small):
    # As XLNet: two quotes become one, whose offsets are those of the second; white space is split off, and comes back.
    xlnet = unigram(['a "b" a'] * 9, 300)
    quotes = [normalizers.Replace(written, '"') for written in ("``", "''")]
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    xlnet.backend_tokenizer.normalizer = normalizers.Sequence(quotes)
    xlnet.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    encoded = Encoder(xlnet).encode("a", " ``b '' a")
    tokens = xlnet.convert_ids_to_tokens(encoded.input_ids[encoded.response_start :])
    assert tokens == ["▁", '"', "b", "▁", '"', "▁", "a", "</s>"]
    assert encoded.ends[[1, 2, 4, 6, 7]].tolist() == [3, 4, 7, 9, 10]
    assert 0 < encoded.ends[0] < 3 and 4 < encoded.ends[3] < 7 and 7 < encoded.ends[5] <= 9
    # WordPiece drops control characters and white space.
    encoded = small["wordpiece"].encode("a", " b\x00 \x00\xadc \x00")
    assert encoded.ends.tolist() == [3, 8, 11]


def test_a_byte_without_a_token_belongs_to_the_token_in_front(real):
    # This tokenizer knows the bytes of "ab" alone, drops others from a text, and counts its offsets without them.
    encoded = Encoder(byte_level_bpe(["ab"], 40, all_bytes=False)).encode("a", "éabxxab€")
    assert encoded.ends.tolist() == [6, 11, 12]
    # SmolLM2 has no token for the control character U+0014.
    encoded = real["smollm2"].encode("x:\n", "one\x14two\x14, three")
    assert encoded.ends.tolist() == [4, 8, 9, 15, 16]
    # A byte that a special token alone holds is part of it where it stands.
    tokenizer = wordpiece()
    tokenizer.add_tokens(["A", AddedToken("0\f", special=True, normalized=True)])
    assert Encoder(tokenizer).encode("", "A0\f").ends.tolist() == [1, 3, 4]


def test_part_of_a_character_behind_white_space_that_no_token_holds():
    # The added token takes the white space behind it, and trimmed offsets leave it out. "ж" is two byte tokens.
    tokenizer = sentencepiece_bpe(["ab"], 300)
    tokenizer.add_tokens([AddedToken("A", rstrip=True, normalized=False)])
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = Encoder(tokenizer).encode("", "bA  ж")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["b", "A", "<0xD0>", "<0xB6>", "</s>"]
    assert encoded.ends[0] == 2 and 4 <= encoded.ends[1] < 6 and encoded.ends[2:].tolist() == [6, 7]


def test_a_text_of_which_the_tokenizer_leaves_nothing(small):
    # WordPiece drops white space; what its template puts around nothing, [CLS] [SEP], is dropped as well.
    encoded = small["wordpiece"].encode("", " \n")
    assert encoded.input_ids.tolist() == [small["wordpiece"].eos_id] and not len(encoded.ends)
    assert encode_pair([small["wordpiece"]], "", " \n", 16) is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ends_are_in_order_and_complete_on_any_text(small, data):
    encoder = small[data.draw(st.sampled_from(sorted(small)))]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    prefix, response = data.draw(text), data.draw(text)
    encoded = encoder.encode(prefix, response)
    assert len(encoded.ends) == len(encoded.input_ids) - encoded.response_start
    assert (np.diff(encoded.ends) >= 0).all() and (encoded.ends > 0).all()
    assert encoded.input_ids[-1] == encoder.eos_id
    if len(encoded.input_ids) > 1:  # EOS alone has nothing in front that predicts it
        assert encoded.ends[-1] == len(response.encode()) + 1


def brute_force_cut(encoders, prefix, text, block_size):
    for cut in range(len(text), 0, -1):
        encoded = [e.encode(prefix, text[:cut], eos=False) for e in encoders]
        if all(len(e.input_ids) <= block_size for e in encoded):
            return text[:cut], encoded
    return None, None


@pytest.mark.parametrize("pair", [("qwen2", "phi-3"), ("opt", "llama-3"), ("gemma-2", "llama-2")])
def test_a_long_example_is_cut_to_the_longest_beginning_that_fits(real, pair):
    encoders = [real[name] for name in pair]
    rows = [json.loads(line) for line in (real_dir() / "data/dolly/databricks-dolly-15k.jsonl").open()][:400]
    checked = 0
    for row in rows:
        prefix, text = alpaca_prompt(row["instruction"]), row["response"] + " 日本語 😀 naïve"
        encoded = encode_pair(encoders, prefix, text, 64)
        whole = [e.encode(prefix, text) for e in encoders]
        if all(len(e.input_ids) <= 64 for e in whole):
            assert all((a.input_ids == b.input_ids).all() for a, b in zip(encoded, whole))
        elif len(text) < 400 and checked < 12:
            cut, expected = brute_force_cut(encoders, prefix, text, 64)
            if expected is None or any(len(e.input_ids) <= e.response_start for e in expected):
                assert encoded is None
                continue
            checked += 1
            for side, want, encoder in zip(encoded, expected, encoders):
                assert side.input_ids.tolist() == want.input_ids.tolist()
                assert side.input_ids[-1] != encoder.eos_id
                assert side.ends[-1] == len(cut.encode())
    assert checked >= 8


def test_a_prompt_that_fills_the_block_leaves_the_example_out(real):
    encoders = [real["qwen2"], real["phi-3"]]
    assert encode_pair(encoders, "word " * 40, "answer", 16) is None
    assert encode_pair(encoders, "word ", "", 16) is None
    row = prepare_example({"row": 7, "prefix": "word " * 40, "text": "answer"}, encoders, 16)
    assert row["row"] == 7 and len(row["ends"]) == 0 and len(row["teacher_ends"]) == 0


def test_only_the_eos_does_not_fit(real):
    encoders = [real["qwen2"]]
    n = len(encoders[0].encode("ab ", "cd ef").input_ids)
    (encoded,) = encode_pair(encoders, "ab ", "cd ef", n - 1)
    assert encoded.ends[-1] == 5 and encoded.input_ids[-1] != encoders[0].eos_id


# ------------------------------------------------------------------------------------------------------- batches


def collated(encoders, texts, **options):
    rows = [prepare_example({"row": i, "prefix": p, "text": t}, encoders, 64) for i, (p, t) in enumerate(texts, 1)]
    return rows, ResponseCollator(*encoders, **options)(rows)


def test_batch_contract(real):
    encoders = [real["qwen2"], real["phi-3"]]
    texts = [("Q: one\nA: ", "yes"), ("Q: another one\nA: ", "no, it is not 😀")]
    rows, batch = collated(encoders, texts, edit_distances=True)
    for side, encoder in zip(("", "teacher_"), encoders):
        ids, labels = batch[f"{side}input_ids"], batch[f"{side}labels"]
        lengths = batch[f"{side}attention_mask"].sum(1)
        for b, row in enumerate(rows):
            n, start = len(row[f"{side}input_ids"]), row[f"{side}response_start"]
            assert lengths[b] == n and ids[b, :n].tolist() == row[f"{side}input_ids"].tolist()
            assert (ids[b, n:] == encoder.pad_id).all()
            assert (labels[b, :start] == IGNORED).all() and (labels[b, n:] == IGNORED).all()
            assert labels[b, start:n].tolist() == ids[b, start:n].tolist()
        # The causal shift: the row of logits one place before each response token predicts it.
        predicted = labels.flatten()[batch[f"{side}positions"] + 1]
        assert predicted.tolist() == [i for r in rows for i in r[f"{side}input_ids"][r[f"{side}response_start"] :]]
        assert (batch[f"{side}positions"] // ids.shape[1]).tolist() == batch[f"{side}example"].tolist()
    assert [r.row for r in batch["responses"]] == [1, 2]
    assert [r.n_bytes for r in batch["responses"]] == [3, len("no, it is not 😀".encode())]


def test_padding_with_eos_is_masked_and_eos_itself_is_learnt(real):
    gpt2 = real["gpt2"]  # has no pad token
    assert gpt2.pad_id == gpt2.eos_id
    _, batch = collated([gpt2], [("a b c", " d"), ("a", " d")])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["input_ids"][1, 2:].tolist() == [gpt2.eos_id] * 3
    assert batch["labels"][1, 2:].tolist() == [gpt2.eos_id, IGNORED, IGNORED]


def test_an_example_without_response_adds_nothing(real):
    encoders = [real["qwen2"], real["phi-3"]]
    rows, _ = collated(encoders, [("p ", "t")])
    blank = {k: [] if k.endswith("ends") else v for k, v in rows[0].items()}
    batch = ResponseCollator(*encoders, edit_distances=True)([blank])
    assert (batch["labels"] == IGNORED).all() and batch["positions"].numel() == 0
    assert batch["responses"][0].n_bytes == 0 and batch["responses"][0].distance.shape == (0, 0)
    assert batch["positions"].dtype == torch.int64


def test_edit_distance_table_against_plain_python(real):
    encoders = [real["qwen2"], real["phi-3"]]
    rows, batch = collated(encoders, [("Q\n", "the naïve 😀 is  here, the end")], edit_distances=True)
    response, student, teacher = batch["responses"][0], *encoders
    student_ids = rows[0]["input_ids"][rows[0]["response_start"] :]
    teacher_ids = rows[0]["teacher_input_ids"][rows[0]["teacher_response_start"] :]
    table = response.distance[np.ix_(response.teacher_index, response.student_index)]
    for i, t in enumerate(teacher_ids):
        for j, s in enumerate(student_ids):
            both_eos = t == teacher.eos_id and s == student.eos_id
            expected = 0 if both_eos else levenshtein(teacher.forms.spaceless[t], student.forms.spaceless[s])
            assert table[i, j] == expected
    assert token_distances(teacher, teacher_ids[:0], student, student_ids).shape == (0, len(student_ids))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="declares no EOS token"):
        Encoder(tokenizer)
