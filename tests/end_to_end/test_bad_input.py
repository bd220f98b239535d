"""Files and models as they come: what a training script says of bad ones, and that odd ones train exactly.

Every case goes through a script's own `main`, in this process where no launcher is needed.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import _http, httpx
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from get_vocab_mapper.builder_cli import _load_tokenizer
from get_vocab_mapper.builders import build_em
from get_vocab_mapper.mapper_file import save_mapper
from get_vocab_mapper.token_forms import token_forms
from modeling.errors import InputError
from modeling.text.encoder import Encoder, encode_pair
from modeling.training.datasets import list_faults
from tests.end_to_end.rig import flags, launcher, response_of, run_script, steps, tiny_llama
from tests.unit.tokenizer_zoo import byte_level_bpe, load_real, sentencepiece_bpe, wordpiece

ROWS = [
    {"prefix": "Say: ", "text": "The quick fox jumps."},
    {"prefix": "Q: dogs?\n", "text": "The dog sleeps, and the fox runs on.\n\nSo it is."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module keeps what its tests share."""
    return tmp_path_factory.mktemp("bad input")


@pytest.fixture(scope="module")
def model(folder):
    """A random model with a byte-level vocabulary of 400 tokens, no BOS, EOS pads."""
    return tiny_llama(folder / "model", byte_level_bpe(), 400, hidden=16, layers=1)


@pytest.fixture
def script(main, tmp_path):
    """Runs a script's main in this process and returns how it ended: `status`, `stderr` and `output`, its folder."""

    def run(name="sft", **arguments):
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        common = {"output_dir": output, "block_size": 64, "max_steps": 1, "per_device_train_batch_size": 32}
        return SimpleNamespace(**vars(main(name, **{**common, **arguments})), output=output)

    return run


def message_of(run) -> str:
    """The one message of a script that refused its input; nothing else may be left of the run."""
    assert run.status == 2, run.stderr
    _, mark, message = run.stderr.partition(f"run_clm_{run.method}.py: error: ")
    assert mark and "Traceback" not in run.stderr, run.stderr
    assert not run.output.exists()
    return message


def write(path: Path, content) -> Path:
    """Bytes or text as they are; anything else as JSON lines."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def train_file(folder):
    return write(folder / "train.jsonl", ROWS)


def expected_ce(folder: Path, rows: list[dict]) -> float:
    """The mean CE over the response tokens of all rows, each alone, EOS included: straight from the definition."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for row in rows:
        ids, logits = response_of(model, tokenizer, row)
        losses += (-logits.log_softmax(-1)[range(len(ids)), ids]).tolist()
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------- the files

LINE = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (" \r\n\n", "it has no rows. Was it written or copied to its end?"),
        (f'{LINE}\n{{"prefix": "a", "te\n{LINE}\n', "line 2: not valid JSON ("),
        (LINE.encode() + b'\n{"prefix": "caf\xe9"}', f"byte {len(LINE) + 16}: not UTF-8 (in line 2). Convert the"),
    ],
)
def test_a_file_that_cannot_be_read(script, model, tmp_path, content, message):
    """What `tests/unit/test_data_files.py` holds `read_rows` to, through a script."""
    path = write(tmp_path / "some rows.json", content)
    told = message_of(script(model_name_or_path=model, train_file=path))
    assert str(path) in told and message in told and told.count("\n") == 1


def test_a_file_that_is_not_there(script, model, tmp_path):
    told = message_of(script(model_name_or_path=model, train_file=tmp_path / "none.json"))
    assert told.startswith(f"--train_file: {tmp_path / 'none.json'}: no such file. Check the path; a relative one")
    told = message_of(script(model_name_or_path=model, train_file=tmp_path))
    assert told.startswith(f"--train_file: {tmp_path} is a folder. Give the file in it.")


UNUSABLE = {  # a row, and what is said of it
    "it has the columns 'prefix', 'txt', and none of these pairs: prefix + text; instruction + output; ": {
        "prefix": "p",
        "txt": "t",
    },
    "column 'prefix' holds null, not a string": {"prefix": None, "text": "t"},
    "column 'output' holds int, not a string": {"instruction": "i", "output": 3},
    "column 'text' holds float, not a string": {"prefix": "p", "text": float("nan")},
    "column 'completion' holds dict, not a string": {"prompt": "p", "completion": {"a": "b"}},
    "column 'text' holds half of a surrogate pair, which is no character": {"prefix": "p", "text": "\ud83d!"},
    "it is a JSON list, not an object with named columns": ["p", "t"],
    "the prefix fills --block_size 64: give more, or a shorter prefix": {"prefix": "word " * 100, "text": "t"},
}
USABLE = [
    *ROWS,
    {"prefix": "", "text": "The fox."},
    {"prompt": "p ", "completion": "The dog."},
    {"prefix": "p ", "text": "a\x00b\x01\x7f\x85\u2028\ufeff end"},
    ROWS[0],  # twice: a row counts as often as it stands there
    ROWS[0],
]


def test_rows_that_cannot_be_used_are_counted_and_listed_once(script, model, tmp_path):
    empty = [{"prefix": "p", "text": text} for text in ("", " ", "\n\t\u3000\xa0") * 5]
    rows = [*empty, USABLE[0], *UNUSABLE.values(), *USABLE[1:]]
    run = script(model_name_or_path=model, train_file=write(tmp_path / "mixed.jsonl", rows))
    assert run.status == 0
    assert f"{len(USABLE)} examples, 0 of them cut" in run.stderr
    assert run.stderr.count(f"{len(rows) - len(USABLE)} of its {len(rows)} rows cannot be used, and are left out.") == 1
    told = run.stderr.splitlines()
    first = told.index(next(line for line in told if "cannot be used" in line)) + 1
    numbers = ", ".join(map(str, range(1, 11)))
    assert told[first] == f"  15 rows: the text to learn is empty, or white space alone (rows {numbers}, …)"
    lines = told[first + 1 : first + 1 + len(UNUSABLE)]
    # As often as each other: in the order of the file.
    for number, fault, line in zip(range(17, 17 + len(UNUSABLE)), UNUSABLE, lines):
        assert line.startswith(f"  1 row: {fault}") and line.endswith(f" (row {number})")
    # The model was trained on the others, each as often as it stands there.
    rows = [{"prefix": r.get("prefix", r.get("prompt")), "text": r.get("text", r.get("completion"))} for r in USABLE]
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(model, rows), rel=1e-5)


def test_a_file_without_one_row_that_can_be_used(script, model, tmp_path):
    rows = [{"prefix": "p", "text": " "}, {"data": ROWS}, {"prefix": "q", "text": ""}]
    path = write(tmp_path / "none.json", json.dumps(rows))
    told = message_of(script(model_name_or_path=model, train_file=path))
    assert told.splitlines() == [
        f"{path}: none of its 3 rows can be used. Repair them, or give another file.",
        "  2 rows: the text to learn is empty, or white space alone (rows 1, 3)",
        "  1 row: it has the columns 'data', and none of these pairs: prefix + text; instruction + output; prompt + "
        "completion; prompt + output; nor messages or conversations (row 2)",
    ]


def test_a_held_out_file_is_checked_like_the_other(script, model, train_file, tmp_path):
    path = write(tmp_path / "dev.jsonl", [{"prefix": "p", "text": ""}])
    run = script(model_name_or_path=model, train_file=train_file, do_eval=True, validation_file=path)
    assert f"{path}: none of its 1 rows can be used." in message_of(run)
    run = script(model_name_or_path=model, train_file=train_file, do_eval=True, validation_file=tmp_path)
    assert message_of(run).startswith(f"--validation_file: {tmp_path} is a folder.")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(script, model, tmp_path):
    text = "\ufeff" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n"
    run = script(model_name_or_path=model, train_file=write(tmp_path / "windows.jsonl", text))
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(model, ROWS), rel=1e-5)


LONG = {
    "words": "The dog sleeps. " * 6250,
    "a word across the end of the block": "fox " * 62 + "a" * 100_000 + " dog" * 9,
    "spaces": " " * 99_999 + "x",
    "emoji": "😀" * 100_000,
}


def test_rows_of_100_000_characters_are_cut_at_once(script, model, tmp_path, monkeypatch):
    """Counted, not timed: a few dozen calls of the tokenizer a row, and one where the prefix leaves no room."""
    calls = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given, **options: calls.append(1) or encode(*given, **options))
    for encoder in [Encoder(train()) for train in (byte_level_bpe, sentencepiece_bpe, wordpiece)]:
        for text in LONG.values():
            calls.clear()
            (encoded,) = encode_pair([encoder], "Say:\n", text, 64)
            assert 1 < len(encoded.input_ids) <= 64 and len(calls) <= 40
            calls.clear()
            assert encode_pair([encoder], text + " fox" * 100, "yes", 64) is None and len(calls) == 1
    rows = [{"prefix": "Say:\n", "text": text} for text in LONG.values()]
    rows += [{"prefix": text + " fox" * 100, "text": "yes"} for text in LONG.values()]
    run = script(model_name_or_path=model, train_file=write(tmp_path / "long.jsonl", rows))
    assert run.status == 0 and "4 examples, 4 of them cut to 64 tokens" in run.stderr
    assert "  4 rows: the prefix fills --block_size 64: give more, or a shorter prefix (rows 5, 6, 7, 8)" in run.stderr


# --------------------------------------------------------------------------------------------- models that are refused


def copy_of(model: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(model, folder)
    for name in without:
        (folder / name).unlink()
    return folder


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_roles(tokenizer, **roles):
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    return tokenizer


def of_class(kind: type, config: transformers.PreTrainedConfig):
    """Saves a random model of this kind."""
    return lambda model, folder: kind(config).save_pretrained(folder)


def cut_weights(model, folder):
    os.truncate(folder / "model.safetensors", 5000)


def without_eos(model, folder):
    with_roles(byte_level_bpe(), eos_token=None).save_pretrained(folder)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ALL = (WEIGHTS, CONFIG, "generation_config.json", *TOKENIZER)
GGUF = {"model-q4_k_m.gguf": ""}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
T5 = T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
BERT = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BAD_MODELS = [  # what is missing in a copy of a model; what is written to it; what is said
    (ALL, {}, ": the folder has no config.json, so it is no model's: it holds nothing. Give the folder"),
    ([WEIGHTS], {}, ": the folder has no weights (no .safetensors file). Was it copied whole?"),
    ([WEIGHTS], GGUF, ": its weights are in GGUF (model-q4_k_m.gguf)"),
    (ALL, GGUF, ": its weights are in GGUF (model-q4_k_m.gguf)"),
    ([CONFIG], {}, ": the folder has no config.json, so it is no model's: it holds generation_config.json, mod"),
    (TOKENIZER, {}, ": its tokenizer cannot be loaded: Couldn't instantiate the backend tokenizer"),
    (ALL, {"checkpoint-20/config.json": "{}"}, "There is a model in its folder checkpoint-20."),
    ([], cut_weights, ": its weights cannot be loaded: a file is damaged, or no more than a pointer of Git LFS"),
    ([], {WEIGHTS: POINTER}, ": its weights cannot be loaded: a file is damaged, or no more than a pointer of Git LFS"),
    ([], {CONFIG: '{"model_type": "llama",'}, ": its configuration cannot be loaded: It looks like the config file at"),
    ([], {"tokenizer.json": '{"version": "1.0", "model": {'}, ": its tokenizer cannot be loaded: a file is damaged"),
    ([], {CONFIG: '{"model_type": "llama9"}'}, ": its configuration cannot be loaded: The checkpoint you are trying"),
    ([], of_class(T5ForConditionalGeneration, T5), " is an encoder-decoder (t5). Give a causal language model"),
    ([], of_class(BertLMHeadModel, BERT), " is an encoder, which sees the token that it is to predict (bert)."),
    (
        *([], lambda model, folder: LlamaModel.from_pretrained(model).save_pretrained(folder)),
        ": 1 of the model's weights are not in its files, and would be random numbers: lm_head.weight",
    ),
    (
        *([], lambda model, folder: change_json(folder / CONFIG, vocab_size=420)),
        ": its weights cannot be loaded: they do not have the shapes that config.json says",
    ),
    (
        *(TOKENIZER, lambda model, folder: ByT5Tokenizer().save_pretrained(folder)),
        "(ByT5Tokenizer) has no fast backend (no tokenizer.json), which says what its",
    ),
    ([], without_eos, "declares no EOS token, which every response ends with. Set eos_token in its tokenizer"),
]


@pytest.mark.parametrize(("without", "change", "message"), BAD_MODELS)
def test_a_model_that_cannot_be_used(script, model, train_file, tmp_path, without, change, message):
    path = copy_of(model, tmp_path / "a model", *without)
    if callable(change):
        change(model, path)
    else:
        for name, content in change.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(content)
    told = message_of(script(model_name_or_path=path, train_file=train_file))
    assert told.startswith(f"--model_name_or_path {path}") and message in told and told.count("\n") == 1
    # The same of a teacher, named by its own flag.
    told = message_of(script("uld", model_name_or_path=model, teacher_path=path, train_file=train_file))
    assert told.startswith(f"--teacher_path {path}") and message in told


def test_a_folder_that_is_not_there(script, model, train_file, tmp_path):
    for path in (tmp_path / "none", "./none/at/all", "~/none", "a name/with spaces"):
        told = message_of(script(model_name_or_path=path, train_file=train_file))
        assert told.startswith(f"--model_name_or_path {path}: there is no such folder. Check the path; a relative one")
    told = message_of(script(model_name_or_path=train_file, train_file=train_file))
    assert told.startswith(f"--model_name_or_path {train_file} is a file. Give the folder that it is in.")


def test_gguf_is_told_how_to_convert(script, model, train_file, hub, tmp_path):
    copy_of(model, tmp_path / "gguf", *ALL)
    (tmp_path / "gguf/model-q4_k_m.gguf").touch()
    for path in (tmp_path / "gguf", tmp_path / "gguf/model-q4_k_m.gguf"):
        told = message_of(script("uld", model_name_or_path=model, teacher_path=path, train_file=train_file))
        call = f'AutoModelForCausalLM.from_pretrained("{tmp_path}/gguf", gguf_file="model-q4_k_m.gguf").save_pretrain'
        assert told.startswith(f"--teacher_path {path}: ") and call in told and "AutoTokenizer" in told
    hub(404, "EntryNotFound")  # there is no config.json
    told = message_of(script(model_name_or_path="some/model-GGUF", train_file=train_file))
    assert 'from_pretrained("some/model-GGUF", gguf_file="FILE.gguf")' in told


def test_code_that_needs_a_package_names_it(script, model, train_file, tmp_path):
    path = copy_of(model, tmp_path / "own code")
    (path / "own.py").write_text("import a_package_that_nobody_has\n")
    change_json(path / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    told = message_of(script(model_name_or_path=path, train_file=train_file, trust_remote_code=True))
    assert told.startswith(f"--model_name_or_path {path}: its configuration cannot be loaded: ")
    assert "a_package_that_nobody_has" in told


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

open({!r}, "w").close()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_model_runs_only_where_it_is_trusted(script, model, train_file, tmp_path, monkeypatch, part):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path, mark = copy_of(model, tmp_path / "own code"), tmp_path / "ran"
    (path / "own.py").write_text(OWN_CODE.format(str(mark)))
    if part == "model":
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        change_json(path / "config.json", model_type="own", auto_map=auto_map)
    else:
        tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        change_json(path / "tokenizer_config.json", **tokenizer)
    told = message_of(script(model_name_or_path=path, train_file=train_file))
    assert told.startswith(f"--model_name_or_path {path}: its {'configuration' if part == 'model' else part} cannot be")
    assert "which is not run unasked" in told and "give --trust_remote_code true." in told
    if part == "tokenizer":
        with pytest.raises(InputError, match=rf"--teacher {re.escape(str(path))}: .*--trust_remote_code true"):
            _load_tokenizer("teacher", str(path), False)
    assert not mark.exists()
    assert script(model_name_or_path=path, train_file=train_file, trust_remote_code=True).status == 0
    assert mark.exists()


# --------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets what the hub answers to every question: a status with an error code of the hub, or an exception."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def answers(status=None, code="", error=None):
        asked = []

        def answer(request):
            asked.extend([request] if "/resolve/" in request.url.path else [])  # the client asks for other things too
            if error:
                raise error
            return httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)

        monkeypatch.setattr(
            _http, "_GLOBAL_CLIENT_FACTORY", lambda: httpx.Client(transport=httpx.MockTransport(answer))
        )
        huggingface_hub.close_session()
        return asked

    yield answers
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 403, "code": "GatedRepo"}, ("is gated", "https://huggingface.co/some/model", "hf auth login")),
        ({"status": 401, "code": "RepoNotFound"}, ("no such folder", "check the spelling", "hf auth login")),
        (
            {"error": httpx.ConnectError("Name or service not known")},
            ("no such folder", "Name or service not known", "cache", "hf download some/model --local-dir"),
        ),
    ],
)
def test_what_the_hub_does_not_give(script, model, hub, train_file, answer, words):
    """It is asked once: transformers alone would ask for a minute and a half."""
    asked = hub(**answer)
    told = message_of(script(model_name_or_path="some/model", train_file=train_file))
    assert told.startswith("--model_name_or_path some/model: ") and all(word in told for word in words)
    assert len(asked) == 1 and told.count("\n") == 1
    told = message_of(script("uld", model_name_or_path=model, teacher_path="some/model", train_file=train_file))
    assert told.startswith("--teacher_path some/model: ")


def test_offline(script, model, train_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    told = message_of(script(model_name_or_path="some/model", train_file=train_file))
    assert "there is no such folder, HF_HUB_OFFLINE is set, and the hub's cache has no copy." in told
    # With a copy in the cache, laid out as the hub's client does, it trains.
    repository, commit = cache / "models--some--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    copy_of(model, repository / "snapshots" / commit)
    run = script(model_name_or_path="some/model", train_file=train_file)
    assert run.status == 0, run.stderr
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(model, ROWS), rel=1e-5)


# ------------------------------------------------------------------------------------------------- models that are odd


TOKENIZERS = {
    "no pad token": lambda: with_roles(byte_level_bpe(), pad_token=None),
    "pad is EOS, no BOS": byte_level_bpe,
    "pad is a token of its own": lambda: with_roles(byte_level_bpe(), pad_token="!"),
    "BOS in front, pad is UNK": sentencepiece_bpe,
    "BOS in front, pad is EOS": lambda: with_roles(sentencepiece_bpe(), pad_token="</s>"),
    "BOS in front, pad is BOS": lambda: with_roles(sentencepiece_bpe(), pad_token="<s>"),
    "gpt2": lambda: load_real("gpt2"),  # no pad token, BOS is EOS and not put in front
    "opt": lambda: load_real("opt"),  # EOS is BOS, and put in front
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_and_bos_change_no_loss(script, tmp_path, name):
    """EOS is learnt, whatever pads; of an example without prefix, all but a first token that nothing predicts."""
    tokenizer = TOKENIZERS[name]()
    path = tiny_llama(tmp_path / "model", tokenizer, len(tokenizer), hidden=8, layers=1)
    rows = [*ROWS, {"prefix": "", "text": "The fox."}, {"prefix": "p ", "text": "a"}]
    run = script(model_name_or_path=path, train_file=write(tmp_path / "train.jsonl", rows))
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(path, rows), rel=1e-5)


def test_a_tokenizer_longer_than_its_model(script, tmp_path):
    tokenizer = byte_level_bpe()
    path = tiny_llama(tmp_path / "model", tokenizer, 400, hidden=16, layers=1)
    tokenizer.add_tokens(["<tool>", "<result>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(path)
    rows = [{"prefix": "p ", "text": "<tool> The dog <|call|>sleeps"}]
    run = script(model_name_or_path=path, train_file=write(tmp_path / "train.jsonl", rows), learning_rate=1e-9)
    assert run.status == 0
    assert (
        f"--model_name_or_path {path}: the tokenizer has 403 tokens and the model 400 embeddings; the model is resized "
        "to the tokenizer. The new embeddings are untrained."
    ) in run.stderr
    # The saved folder is whole, and is the model that was trained.
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(run.output), AutoTokenizer.from_pretrained(run.output)
    assert saved.config.vocab_size == len(tokenizer) == 403
    assert saved.get_input_embeddings().num_embeddings == saved.get_output_embeddings().out_features == 403
    assert tokenizer.tokenize("<tool>a") == ["<tool>", "a"]
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(run.output, rows), rel=1e-5)


def test_a_tokenizer_shorter_than_its_model(script, train_file, tmp_path):
    """The columns beyond the tokenizer take no part, however large they are."""
    path = tiny_llama(tmp_path / "model", byte_level_bpe(), 464, hidden=16, layers=1)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][400:] *= 1000
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    run = script("llms_fkd", model_name_or_path=path, teacher_path=path, train_file=train_file)
    (step,) = steps(run.output)
    assert step["ce_loss"] == pytest.approx(expected_ce(path, ROWS), rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(run.output).config.vocab_size == 464


@pytest.mark.parametrize("method", ["llms_fkd", "llms_rkd", "uld"])
def test_teacher_and_student_of_one_folder(script, model, train_file, method):
    run = script(method, model_name_or_path=model, teacher_path=model, train_file=train_file)
    (step,) = steps(run.output)
    assert step["kd_loss"] == pytest.approx(0, abs=1e-6)
    assert step["loss"] == pytest.approx(expected_ce(model, ROWS) / 2, rel=1e-5)


def test_an_adapter_teaches(script, model, train_file, tmp_path):
    """The folder of a LoRA run is a teacher: the model below it, as the adapter changes it."""
    adapter, base = tmp_path / "adapter", copy_of(model, tmp_path / "base")
    run = script(model_name_or_path=base, train_file=train_file, use_lora=True, learning_rate=0.1)
    shutil.copytree(run.output, adapter)
    arguments = {"model_name_or_path": model, "teacher_path": adapter, "train_file": train_file}
    (step,) = steps(script("llms_fkd", **arguments).output)
    assert step["kd_loss"] > 1e-3
    base.rename(tmp_path / "moved")
    assert f"--teacher_path {base}: there is no such folder." in message_of(script("llms_fkd", **arguments))


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_chat_model_teaches_a_base_model(script, model, tmp_path):
    """Its turns end with a token of their own, which takes the place of EOS; its template is not applied."""
    chat = byte_level_bpe()
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with_roles(chat, eos_token="<|im_end|>", chat_template=CHAT)
    teacher = tiny_llama(tmp_path / "chat", chat, 448, hidden=16, layers=1, seed=1)
    student = tiny_llama(tmp_path / "base", sentencepiece_bpe(), 640, hidden=16, layers=1)
    rows = [*ROWS, {"prefix": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "text": "The <|im_end|> dog."}]
    train_file = write(tmp_path / "train.jsonl", rows)
    forms = [token_forms(AutoTokenizer.from_pretrained(path)) for path in (teacher, student)]
    mapper = tmp_path / "em.safetensors"
    save_mapper(build_em(*forms, progress=False), mapper)
    pair = {"model_name_or_path": student, "teacher_path": teacher, "train_file": train_file}
    run = script("distill_CDM", **pair, teacher_to_student_id_mapping=mapper, alignment="byte", topk=20)
    (step,) = steps(run.output)
    # All but one of 35, the student's " The" behind "Say: ", which holds the prompt's last space.
    assert step["aligned"] == pytest.approx(34 / 35) and step["kd_loss"] > 0
    assert step["ce_loss"] == pytest.approx(expected_ce(student, rows), rel=1e-5)
    # With a student of the same vocabulary, token by token: which token is declared EOS may differ.
    chat.eos_token = "<|endoftext|>"
    student = tiny_llama(tmp_path / "base of the family", chat, 448, hidden=16, layers=1)
    run = script("llms_fkd", **{**pair, "model_name_or_path": student})
    assert steps(run.output)[0]["ce_loss"] == pytest.approx(expected_ce(student, rows), rel=1e-5)
    # Where the base model lacks the chat tokens, the vocabularies differ, and that is said.
    told = message_of(script("llms_fkd", **{**pair, "model_name_or_path": model}))
    assert "id 400 is no token in the student's and '<|im_start|>' in the teacher's" in told


def test_faults_are_listed_by_number_and_the_rare_ones_together():
    rows = [(row, f"fault {row % 3}") for row in range(1, 8)] + [(100 + n, f"rare {n}") for n in range(5)]
    assert list_faults(rows, kinds=4, numbers=2) == (
        "\n  3 rows: fault 1 (rows 1, 4, …)\n  2 rows: fault 2 (rows 2, 5)\n  2 rows: fault 0 (rows 3, 6)"
        "\n  1 row: rare 0 (row 100)\n  4 rows: other reasons"
    )
    assert list_faults([]) == ""


# ------------------------------------------------------------------------------------------------------ from the shell


def test_exit_status_and_one_message_of_several_processes(model, tmp_path):
    path = write(tmp_path / "rows.jsonl", f"{LINE}\n{{broken\n")
    arguments = {"model_name_or_path": model, "train_file": path, "do_train": True, "use_cpu": True}
    arguments |= {"output_dir": tmp_path / "out", "max_steps": 1, "report_to": "none"}
    script, message = "modeling/run_clm_sft.py", f"run_clm_sft.py: error: {path}, line 2: not valid JSON ("
    alone = run_script(script, *flags(**arguments), fails=True)
    assert alone.returncode == 2 and message in alone.stderr and "Traceback" not in alone.stderr
    several = run_script(script, *flags(**arguments), launch=launcher(2), fails=True)
    assert several.stderr.count("run_clm_sft.py: error:") == several.stderr.count(message) == 1
    assert 'run_clm_sft.py", line' not in several.stderr  # no traceback of a rank; torchrun prints one of its own
    assert not (tmp_path / "out").exists()
