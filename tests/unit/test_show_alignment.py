"""script_eval/show_alignment.py without a browser and without models: what the page holds, and what is refused."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.reference import cdm_oracle
from tests.unit.chat_templates import chatml_tokenizer, turns_tokenizer
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

# Its scripts import each other as scripts do: from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "script_eval"))
import show_alignment

SIDES = ("teacher", "student")
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror='alert(2)'> {{DATA}} {{TITLE}} & \u2028 \\u003c"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> SimpleNamespace:
    """Folders with nothing but a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for side, tokenizer in (("teacher", sentencepiece_bpe()), ("student", byte_level_bpe())):
        tokenizer.save_pretrained(folder / side)
    return SimpleNamespace(teacher=str(folder / "teacher"), student=str(folder / "student"))


@pytest.fixture
def show(names, tmp_path):
    """Calls the script on the two tokenizers and gives `(the page, the data in it)`."""

    def show(*arguments: object, output: Path = tmp_path / "page.html") -> tuple[str, dict]:
        flags = ["--teacher", names.teacher, "--student", names.student, "--output", str(output), *map(str, arguments)]
        show_alignment.run(show_alignment.parse(flags))
        page = output.read_text(encoding="utf-8")
        (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        return page, json.loads(embedded)

    return show


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        (b" the", [["␣", "20"], "the"]),
        (b"\n\t\r", [["⏎", "0a"], ["⇥", "09"], ["␍", "0d"]]),
        ("é🙂東".encode(), ["é🙂東"]),
        ("é".encode()[:1], [["C3", "c3"]]),
        (b" \xe6\x9d", [["␣", "20"], ["E6", "e6"], ["9D", "9d"]]),
        (b"\x9fa\x99", [["9F", "9f"], "a", ["99", "99"]]),
        ("\u00a0x\u202e".encode(), [["U+00A0", "c2a0"], "x", ["U+202E", "e280ae"]]),
        (b"\x00", [["U+0000", "00"]]),
        ("␣".encode(), ["␣"]),  # text that looks like a mark is none
        (b"<b>&amp;", ["<b>&amp;"]),
    ],
)
def test_what_cannot_be_seen_is_made_visible(form, parts):
    assert show_alignment.visible(form) == parts


def form_of(token: dict) -> bytes:
    return b"".join(part.encode() if isinstance(part, str) else bytes.fromhex(part[1]) for part in token["parts"])


@pytest.mark.parametrize("text", [*SAMPLE_TEXTS, "x"])
def test_the_page_holds_both_alignments_of_the_text(show, text):
    _, data = show("--text", text, "--prefix", "Once more:\n")
    forms = {side: [form_of(data["tokens"][side][str(token)]) for token in data[side]["ids"]] for side in SIDES}
    assert [forms[side].pop() for side in SIDES] == [b"</s>", b"<|endoftext|>"]
    for side in SIDES:
        assert b"".join(forms[side]).decode() == text
        ends = [sum(map(len, forms[side][: i + 1])) for i in range(len(forms[side]))]
        assert data[side]["ends"] == [*ends, len(text.encode()) + 1]
    assert data["n_bytes"] == len(text.encode()) and "mapper" not in data and "top" not in data["dtw"]

    def spaceless(form: bytes) -> str:
        try:
            return form.decode().replace(" ", "")
        except UnicodeDecodeError:
            return form.decode("latin-1").replace(" ", "")

    cost = [
        [cdm_oracle.levenshtein(spaceless(a), spaceless(b)) for b in (*forms["student"], b"<|endoftext|>")]
        for a in (*forms["teacher"], b"</s>")
    ]
    cost[-1][-1] = 0
    sets = [set(data[side]["ends"]) for side in SIDES]
    borders = sorted(sets[0] & sets[1])
    for name, expected in (
        ("dtw", cdm_oracle.cut_at_diagonals(cdm_oracle.dtw_path(cost))),
        ("byte", [[[e for e in data[s]["ends"] if a < e <= b] for s in SIDES] for a, b in zip([0, *borders], borders)]),
    ):
        shown = data[name]
        assert shown["teacher_size"] == [len(i) for i, _ in expected]
        assert shown["student_size"] == [len(j) for _, j in expected]
        last = {side: [sum(shown[f"{side}_size"][: g + 1]) - 1 for g in range(len(expected))] for side in SIDES}
        stops = list(zip(*([data[side]["ends"][i] for i in last[side]] for side in SIDES)))
        same = [all(a == b for a, b in pair) for pair in zip([(0, 0), *stops], stops)]
        assert shown["same_bytes"] == same
        sizes = shown["student_size"]
        share = sum(n for n, s in zip(sizes, same) if s) / sum(sizes)
        assert shown["aligned"] == pytest.approx(share, rel=1e-5)
        alone = sum(a == b == 1 for a, b in zip(shown["teacher_size"], sizes)) / sum(sizes)
        assert shown["one_to_one"] == pytest.approx(alone, rel=1e-5)


def test_no_text_ends_the_script_that_it_stands_in(show, names):
    page, data = show("--text", HOSTILE, "--prefix", HOSTILE)
    assert data["prompts"] == {"teacher": HOSTILE, "student": HOSTILE}
    forms = [form_of(data["tokens"]["student"][str(token)]) for token in data["student"]["ids"][:-1]]
    assert HOSTILE.encode().endswith(b"".join(forms[1:]))
    bare, _ = show("--text", "x")
    assert page.count("</script>") == bare.count("</script>") == 2 and "alert(1)</script" not in page
    assert f"<title>{names.teacher} → {names.student}</title>" in page
    assert not re.search(r"https?:|//[a-z]+\.|(src|href)=(?!\"data:,\")|@import|url\(", bare)  # nothing from elsewhere


def test_notes_say_what_is_left_out(show):
    text = SAMPLE_TEXTS[0]
    _, data = show("--text", text)
    # Nothing stands in front of the student's first token; the teacher has BOS there.
    assert [n for n in data["notes"] if "student's first token is left out" in n] and len(data["notes"]) == 2
    _, data = show("--text", text, "--prefix", "Go:\n")
    assert data["notes"] == [n for n in data["notes"] if n.startswith("Tokenizers only (no weights in ")]
    _, data = show("--text", text, "--prefix", "Go:\n", "--tokenizers_only", "--block_size", 12)
    assert [note.split(" (")[0].split(" cut")[0] for note in data["notes"]] == ["Tokenizers only", "The text is"]
    assert max(data[side]["ends"][-1] for side in SIDES) == data["n_bytes"] < len(text.encode())


def test_a_row_of_a_training_file(show, tmp_path):
    rows = [{"prompt": "P:\n", "completion": "first"}, {"instruction": "Name one.", "output": "dog"}]
    for name, content in (
        ("array.json", json.dumps(rows)),
        ("lines.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        _, data = show("--file", tmp_path / name, "--row", 2)
        assert data["source"] == f"{tmp_path / name}, row 2" and data["n_bytes"] == 3
        assert "### Instruction:\nName one.\n" in data["prompts"]["teacher"]


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--file F", "--file and --row"),
        ("--text a --row 1", "--file and --row"),
        ("--file F --row 1 --prefix p", "--prefix goes with --text"),
        ("--text a --file F", "not allowed with"),
        ("", "one of the arguments --text --file is required"),
        ("--text=", "--text is empty"),
        ("--text=\n", "--text is empty, or white space alone"),
        ("--text a --topk 0", "--topk must be 1 or more"),
        ("--text a --simi_threshold 0", "--simi_threshold must be above 0"),
        ("--text a --device nosuch", "--device nosuch: "),
        ("--text a --output .", "--output . is a folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    common = ["--teacher", "T", "--student", "S", "--output", "page.html"]
    with pytest.raises(SystemExit) as stopped:
        show_alignment.parse([*common, *arguments.split(" " if arguments else None)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "row", "message"),
    [
        (None, 1, r"rows\.jsonl: no such file"),
        ('{"prefix": "a", "text": "b"}\n' * 2, 3, r"rows\.jsonl: there is nothing in row 3\. Give --row"),
        ('{"prefix": "a", "text": "b"}\n', 0, r"rows\.jsonl: there is nothing in row 0\."),
        ('{"prefix": "a", "text": "b"}\n\n{"prefix": "a", "text": "b"}\n', 2, "there is nothing in row 2"),
        ('{"prefix": "a"}\n', 1, r"rows\.jsonl, row 1: .*prefix \+ text"),
        ('{"prefix": "a", "text": ""}\n', 1, r"rows\.jsonl, row 1: the text to learn is empty.*Training leaves"),
    ],
)
def test_a_row_that_cannot_be_shown(show, tmp_path, content, row, message):
    path, output = tmp_path / "rows.jsonl", tmp_path / "page.html"
    output.write_text("the page before")
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        show("--file", path, "--row", row, output=output)
    assert output.read_text() == "the page before"
    assert set(tmp_path.iterdir()) <= {path, output}  # no half page either


def test_a_prompt_that_fills_the_block(show):
    with pytest.raises(ValueError, match=r"--text: the prefix fills --block_size 8"):
        show("--text", "dog", "--prefix", SAMPLE_TEXTS[0], "--block_size", 8)
    with pytest.raises(ValueError, match=r"--text: the prefix fills --block_size 0"):
        show("--text", "dog", "--block_size", 0)


def test_a_mapper_needs_models(show, names):
    without = re.escape(f"(no weights in {names.teacher} and {names.student})")
    with pytest.raises(ValueError, match=f"--mapper em: .*both models' predictions {without}"):
        show("--text", "dog", "--mapper", "em")
    with pytest.raises(ValueError, match=r"--mapper em: .*\(--tokenizers_only\)"):
        show("--text", "dog", "--mapper", "em", "--tokenizers_only")


@pytest.mark.parametrize(
    ("file", "weights"),
    [("model.safetensors", True), ("model-00001-of-00002.safetensors", True), ("adapter_config.json", True),
     ("tokenizer.json", False), ("training_args.bin", False)],
)  # fmt: skip
def test_a_folder_with_weights_is_told_from_one_with_a_tokenizer(tmp_path, file, weights):
    (tmp_path / file).touch()
    assert show_alignment.has_weights(str(tmp_path)) == weights
    assert show_alignment.has_weights("owner/name")


def test_logits_that_are_not_finite_are_refused():
    class Broken(torch.nn.Module):
        device = torch.device("cpu")

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 8), torch.nan, dtype=torch.float16))

    side = SimpleNamespace(path="outputs/broken", vocab_size=8)
    tokens = {name: torch.ones(1, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    tokens = SimpleNamespace(**tokens, predictor_rows=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"outputs/broken gives logits that are not finite in torch\.float16\. Try"):
        show_alignment.predicting_logits(side, Broken(), tokens)


def test_a_user_sees_one_line(names, tmp_path, monkeypatch):
    arguments = f"--teacher {names.teacher} --student {names.student} --output {tmp_path}/page.html"
    monkeypatch.setattr(sys, "argv", f"show_alignment.py {arguments} --file {tmp_path}/no.json --row 1".split())
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(show_alignment.__file__, run_name="__main__")
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path))}/no\.json: no such file.*", stopped.value.code)


def test_a_chat_shows_both_prompts(tmp_path):
    """Each side's in its own template, and the alignment ends with the tokens that these write."""
    for side, tokenizer in (("teacher", turns_tokenizer()), ("student", chatml_tokenizer())):
        tokenizer.save_pretrained(tmp_path / side)
    rows = [{"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": " The dog.\n"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sides = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]
    of_file = ["--file", str(tmp_path / "rows.json"), "--row", "1"]
    for source in (of_file, ["--text", "The dog.", "--prefix", "Say it.", "--chat"]):
        output = tmp_path / "page.html"
        show_alignment.run(show_alignment.parse([*sides, "--output", str(output), *source]))
        (embedded,) = re.findall(r'id="data">(.*?)</script>', output.read_text(encoding="utf-8"), re.DOTALL)
        data = json.loads(embedded)
        assert data["prompts"] == {
            "teacher": "<s><start>user\nSay it.<end_of_turn>\n<start>model\n",
            "student": "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n",
        }
        last = [form_of(data["tokens"][side][str(data[side]["ids"][-1])]) for side in SIDES]
        assert last == [b"<end_of_turn>", b"<|im_end|>"]
        assert data["n_bytes"] == len("The dog.") and data["byte"]["aligned"] == 1
