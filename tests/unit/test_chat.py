"""Chat rows, and what each side's template makes of them."""

import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modeling.errors import InputError
from modeling.text.chat import ChatTemplate
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.messages import ChatRows, read_messages
from modeling.text.rows import alpaca_prompt, are_chat_rows, question_of, read_rows
from modeling.text.sources import hub_name, read_source, require_source
from tests.unit import chat_templates as made
from tests.unit.tokenizer_zoo import load_real, unigram, wordpiece

USER = {"role": "user", "content": "What is blue?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": " The sky.\n"}
MORE = [{"role": "user", "content": "And red?"}, {"role": "assistant", "content": "Mars"}]


def examples(row, **options):
    """`(prompt, text, fault)` of one row's examples."""
    return [(json.loads(e["messages"] or "[]"), e["text"], e["fault"]) for e in read(row, **options)]


def read(*rows, **options):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text(json.dumps(rows))
        return list(read_rows(path, ChatRows(**options)))


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "What is blue?", "prompt_id": "7", "messages": [USER, ANSWER]},  # as UltraChat has it
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]},
        {
            "messages": [
                {**USER, "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "blue?"}]},
                ANSWER,
            ]
        },
        {"messages": [{**USER, "tool_calls": None, "name": None}, ANSWER], "tools": [], "images": None},
    ],
)
def test_every_form_of_a_chat_row(row):
    assert examples(row) == [([USER], "The sky.", "")]


def test_a_system_message_stands_in_the_row_its_column_or_the_flag():
    for row in ({"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER], "system": "Be brief."}):
        assert examples(row) == [([SYSTEM, USER], "The sky.", "")]
        assert examples(row, system="Be long.") == [([SYSTEM, USER], "The sky.", "")]
    assert examples({"messages": [USER, ANSWER]}, system="Be brief.") == [([SYSTEM, USER], "The sky.", "")]


def test_all_of_the_assistants_messages():
    row = {"messages": [SYSTEM, USER, ANSWER, *MORE]}
    assert examples(row) == [([SYSTEM, USER, ANSWER, MORE[0]], "Mars", "")]
    both = examples(row, train_on="all")
    assert both == [([SYSTEM, USER], "The sky.", ""), *examples(row)]
    assert [e["row"] for e in read(row, row, train_on="all")] == [1, 1, 2, 2]
    empty = {"messages": [USER, {**ANSWER, "content": " \n"}, *MORE]}
    assert [fault for *_, fault in examples(empty, train_on="all")] == [
        "the text to learn is empty, or white space alone",
        "",
    ]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": [USER]}, "its last message is not the assistant's"),
        ({"messages": [ANSWER]}, "no user's message stands in front"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "the text to learn is empty"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "column 'content of message 2' holds null"),
        ({"messages": [USER, {**ANSWER, "content": "half \ud83d"}]}, "half of a surrogate pair"),
        ({"messages": [USER, {**ANSWER, "role": "critic"}]}, "message 2 has the role 'critic', none of user, human"),
        ({"messages": ["a", ANSWER]}, "message 1 is no object"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}, "message 2 has its reasoning apart"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}]}, "message 2 calls a tool"),
        ({"messages": [USER, {"role": "tool", "content": "3"}, ANSWER]}, "message 2 calls a tool"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "column 'tools' is not empty, and is not read"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "column 'images' is not empty"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]}, "content of the type 'image'"),
        ({"messages": [USER, ANSWER], "rejected": "x"}, "column 'rejected' is not empty"),
        ({"prefix": "a", "text": "b"}, "it holds no messages, and the rows before it do"),
        ({"prefix": "a"}, "the columns 'prefix', and none of these pairs"),
        (None, "a JSON null"),
    ],
)
def test_a_chat_row_that_cannot_be_used(row, fault):
    ((prompt, _, got),) = examples(row)
    assert fault in got and (not prompt or "in front" in got or "empty" in got)


def test_plain_rows_read_as_chats():
    turns = [("1?", "a"), ("2?", "b")]
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": turns}
    history = [{"role": r, "content": c} for pair in turns for r, c in zip(("user", "assistant"), pair)]
    asked = {"role": "user", "content": "Add.\n\n1 2"}
    assert examples(alpaca, any_row=True) == [([SYSTEM, *history, asked], "3", "")]
    for columns in (("prefix", "text"), ("prompt", "completion"), ("prompt", "output")):
        assert examples(dict(zip(columns, ("What is blue?", "The sky."))), any_row=True) == [([USER], "The sky.", "")]
    # A prompt that is filled into the template says what its instruction and input say.
    assert examples({"prefix": alpaca_prompt("Add.", "1 2"), "text": "3"}, any_row=True) == [([asked], "3", "")]
    assert examples({"messages": [USER, ANSWER]}, any_row=True) == [([USER], "The sky.", "")]


@pytest.mark.parametrize(
    "parts", [("Add.",), ("Add.", "1 2"), ("a\n\n### Input:\nb", "c"), ("", "x"), ("a", "b\n\n### Response:\nc")]
)
def test_a_template_is_taken_apart_or_left_as_it_is(parts):
    assert question_of(alpaca_prompt(*parts)) in ("\n\n".join(parts), alpaca_prompt(*parts))
    assert question_of(alpaca_prompt("Add.", "1 2")) == "Add.\n\n1 2"
    for other in (
        "Add.",
        alpaca_prompt("a", system="s"),
        alpaca_prompt("a") + "b",
        alpaca_prompt("a", history=[("b", "c")]),
    ):
        assert question_of(other) == other


def test_which_files_hold_chats(tmp_path):
    chat, plain = {"messages": [USER, ANSWER]}, {"prefix": "a", "text": "b"}
    for rows, expected in (
        ([chat, plain], True),
        ([plain, chat], False),
        ([None, {"x": 1}, chat], True),
        ([None], False),
    ):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert are_chat_rows(tmp_path / "rows.jsonl") == expected
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [plain, chat])))
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert not first["fault"] and "--chat true" in second["fault"]
    assert [row["row"] for row in read_rows(tmp_path / "rows.jsonl", limit=1)] == [1]


def test_parquet_and_data_sets_by_name(tmp_path):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]}]
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/train-0.parquet")
    for source in (tmp_path / "data/train-0.parquet", f"{tmp_path}/data:train"):
        require_source(source)
        assert [number for number, _ in read_source(source)] == [1, 2]
        assert are_chat_rows(source)
        assert [json.loads(e["messages"]) for e in read_rows(source, ChatRows())] == [[USER], [SYSTEM, USER]]
    assert hub_name("user/name.x:train[:10%]") == ("user/name.x", "train[:10%]")
    assert hub_name("data/rows.json") is hub_name("user/name") is hub_name("a/b/c:train") is None
    with pytest.raises(InputError, match=r"data:test is no file, and no data set .*Check the name and the split"):
        list(read_source(f"{tmp_path}/data:test"))
    with pytest.raises(InputError, match="no such file"):
        require_source(tmp_path / "none.parquet")


# ----------------------------------------------------------------------------------------------------------- templates


def chat_of(tokenizer, side="student", **kwargs):
    return ChatTemplate(tokenizer, side, kwargs)


REAL_PROMPTS = {
    "phi-3": ("<s><|user|>\nWhat is blue?<|end|>\n<|assistant|>\n", "<|end|>", 32_007, False),
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n",
        *("<|im_end|>", 151_645, True),
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is blue?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        *("<|eot_id|>", 128_009, True),
    ),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n",
        *("<|im_end|>", 2, True),
    ),
}


@pytest.mark.parametrize("name", REAL_PROMPTS)
def test_real_templates(name):
    """Written down from the templates' own text; an independent reading of whole examples is in test_chat_losses.py."""
    prompt, written, end_id, has_system = REAL_PROMPTS[name]
    chat = chat_of(load_real(name))
    assert chat.prompt([USER]) == prompt
    assert (chat.written_end.split("\n")[0].startswith(written), chat.end_id) == (True, end_id)
    assert chat.has_system_role == has_system
    with_system = chat.prompt([SYSTEM, USER])
    assert with_system.count("Be brief.") == 1
    assert ("Be brief.\n\nWhat is blue?" in with_system) == (not has_system)
    assert chat.question([USER]) == prompt


MADE = {
    "chatml": (
        made.chatml_tokenizer,
        made.CHATML,
        "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "thinking": (
        made.chatml_tokenizer,
        made.THINKING,
        "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "turns": (
        made.turns_tokenizer,
        made.TURNS,
        "<s><start>user\nWhat is blue?<end_of_turn>\n<start>model\n",
        "<end_of_turn>",
    ),
    "inst": (made.turns_tokenizer, made.INST, "<s>[INST] What is blue? [/INST] ", "</s>"),
    "no header": (
        made.chatml_tokenizer,
        made.NO_HEADER,
        "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "plain": (made.chatml_tokenizer, made.PLAIN, "USER: What is blue?\nASSISTANT: ", None),
}


@pytest.mark.parametrize("name", MADE)
def test_made_templates(name):
    tokenizer, template, prompt, end = MADE[name]
    tokenizer = tokenizer(template)
    chat = chat_of(tokenizer)
    assert chat.prompt([USER]) == prompt
    assert chat.end_id == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    assert chat.question([USER]) == prompt.rstrip(" ")


def test_a_block_of_thoughts_belongs_to_the_prefix():
    tokenizer = made.chatml_tokenizer(made.THINKING)
    thoughtless = chat_of(tokenizer, enable_thinking=False)
    assert thoughtless.prompt([USER]) == chat_of(tokenizer).prompt([USER]) + "<think>\n\n</think>\n\n"
    side = Encoder(tokenizer, chat=thoughtless, stop_ids=[thoughtless.end_id])
    row = {"row": 1, "messages": json.dumps([USER]), "text": "The sky.", "fault": ""}
    example = prepare_example(row, [side], 512)
    response = example["input_ids"][example["response_start"] :]
    assert tokenizer.decode(response) == "The sky.<|im_end|>"
    assert thoughtless.fingerprint != chat_of(tokenizer).fingerprint


def test_a_system_message_without_a_role_joins_the_first_user_message():
    for template in (made.TURNS, made.INST):  # one refuses it, one drops it
        chat = chat_of(made.turns_tokenizer(template))
        assert not chat.has_system_role
        assert chat.prompt([SYSTEM, USER, ANSWER, MORE[0]]).count("Be brief.\n\nWhat is blue?") == 1
    assert chat_of(made.chatml_tokenizer()).prompt([SYSTEM, USER]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_that_refuses_leaves_the_row_out_in_its_own_words():
    sides = []
    for side, tokenizer in (("student", made.chatml_tokenizer()), ("teacher", made.turns_tokenizer())):
        chat = chat_of(tokenizer, side)
        sides.append(Encoder(tokenizer, chat=chat, stop_ids=[chat.end_id]))
    row = {"row": 3, "messages": json.dumps([USER, USER]), "text": "x", "fault": ""}
    fault = prepare_example(row, sides, 512)["fault"]
    assert fault == "the teacher's chat template refuses it (Roles must alternate user/assistant)"


def test_the_days_date_counts(monkeypatch):
    tokenizer = made.chatml_tokenizer(made.DATED)
    chat = chat_of(tokenizer)
    assert chat.writes_the_date and not chat_of(made.chatml_tokenizer()).writes_the_date
    pinned = chat_of(tokenizer, date_string="1 Jan 2026")
    assert pinned.prompt([SYSTEM, USER]).startswith("<|im_start|>system\nToday is 1 Jan 2026.\nBe brief.<|im_end|>")
    today = chat.fingerprint
    monkeypatch.setattr(tokenizer, "chat_template", made.DATED.replace("%d %b %Y", "%d %b 1999"))
    assert chat_of(tokenizer).fingerprint != today  # what another day's prompt would be


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", REAL_PROMPTS)
@pytest.mark.parametrize("text", ["The sky.", "東京 – “déjà vu” 🙂\n\n\tx = 1", "1234567"])
def test_an_examples_tokens_are_those_of_the_whole_chat(name, text):
    """The end right behind the response, one BOS at most, and byte ends that cut the response into its tokens."""
    tokenizer = load_real(name)
    chat = chat_of(tokenizer)
    side = Encoder(tokenizer, chat=chat, stop_ids=[chat.end_id, tokenizer.eos_token_id])
    row = {"row": 1, "messages": json.dumps([USER]), "text": text, "fault": ""}
    example = prepare_example(row, [side], 512)
    ids, start, ends = (example[n] for n in ("input_ids", "response_start", "byte_ends"))
    prompt = chat.prompt([USER])
    assert ids.tolist() == tokenizer(prompt + text, add_special_tokens=False)["input_ids"] + [chat.end_id]
    assert ids[0] != ids[1]
    assert len(ends) == len(ids) - start and (np.diff(ends) >= 0).all()
    assert ends[-1] == len(text.encode()) + 1 and ends[-2] == len(text.encode())
    assert not example["cut"]


@pytest.mark.parametrize("tokenizer", [made.chatml_tokenizer, made.turns_tokenizer, wordpiece, unigram])
def test_no_bos_is_doubled(tokenizer):
    tokenizer = tokenizer()
    side, bos = Encoder(tokenizer), tokenizer.bos_token or ""
    plain, written = (side.encode(front + "Say: ", "The dog").input_ids.tolist() for front in ("", bos))
    adds = bool(bos)
    assert plain.count(tokenizer.bos_token_id) == written.count(tokenizer.bos_token_id) == adds
    assert side.encode(f"{bos}{bos}Say: ", "The dog").input_ids.tolist().count(tokenizer.bos_token_id) == 2 * adds


def test_one_cut_for_two_prefixes():
    """The sides' prompts have other lengths; the text is cut at one character for both, as late as both allow."""
    sides = []
    for tokenizer in (made.chatml_tokenizer(made.DATED), made.turns_tokenizer()):
        chat = chat_of(tokenizer)
        sides.append(Encoder(tokenizer, chat=chat, stop_ids=[chat.end_id]))
    text = "The quick brown fox jumps over the lazy dog. " * 9
    row = {"row": 1, "messages": json.dumps([USER]), "text": text, "fault": ""}
    whole = prepare_example(row, sides, 10_000)
    sizes = [len(whole[f"{s}input_ids"]) for s in ("", "teacher_")]
    starts = [whole[f"{s}response_start"] for s in ("", "teacher_")]
    assert starts[0] != starts[1]
    for block_size in (min(sizes) - 1, max(starts) + 5):
        cut = prepare_example(row, sides, block_size)
        assert cut["cut"] and not cut["fault"]
        lengths = [len(cut[f"{s}input_ids"]) for s in ("", "teacher_")]
        assert block_size - 3 <= max(lengths) <= block_size
        n_bytes = {int(cut[f"{s}byte_ends"][-1]) for s in ("", "teacher_")}
        assert len(n_bytes) == 1


def test_messages_need_not_be_dictionaries_of_strings_alone():
    parts = [{"type": "text", "text": "a"}, "b"]
    assert read_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


def test_logging_is_quiet_without_a_reason(caplog):
    with caplog.at_level(logging.WARNING):
        chat_of(made.chatml_tokenizer()).prompt([USER])
    assert not caplog.records
