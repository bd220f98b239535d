"""Nothing that is read can run code: no pickles, no text taken for Python or for a command.

What a model generates runs in EvalPlus alone, and a hub model's own Python with --trust_remote_code true alone.
"""

import ast
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from get_vocab_mapper.mapper_file import load_mapper
from get_vocab_mapper.token_forms import token_forms
from modeling.errors import InputError
from modeling.models.language_model import LanguageModel
from modeling.models.teacher_cache import Settings, SignalCache, checksum
from modeling.text.rows import read_rows
from tests.unit.tokenizer_zoo import byte_level_bpe, sentencepiece_bpe

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("data", "get_vocab_mapper", "modeling", "script_eval", "script_train")
    for path in (ROOT / folder).rglob("*.py")
)
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "runpy", "code"}
RUNNING = {"eval", "exec", "compile", "__import__"}
LOADING = {
    *("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen", "subprocess.getoutput", "os.execv"),
    *("importlib.import_module", "numpy.fromregex"),
}


def dangers(source: str) -> list[str]:
    """What in a Python source can run what it reads, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, ast.Import):
            what = next((a.name for a in node.names if a.name.split(".")[0] in PICKLING), None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            what = node.module
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADING:
            what = ast.unparse(node)
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if isinstance(node.func, ast.Name) and node.func.id in RUNNING:
                what = node.func.id
            elif (
                any(given.get(name, "False") != "False" for name in ("allow_pickle", "shell"))
                or any(given.get(name, "True") != "True" for name in ("weights_only", "use_safetensors"))
                or not given.get("trust_remote_code", "trust_remote_code").endswith("trust_remote_code")
            ):
                what = ast.unparse(node)
        if what:
            found.append(f"{node.lineno}: {what}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from dill import loads", "import torch\ntorch.load(f, weights_only=False)"),
        *("np.load(f, allow_pickle=True)", "eval(text)", "exec(text)", "yaml.load(f)", "os.system(text)"),
        *("subprocess.run(text, shell=True)", "f(path, use_safetensors=False)", "f(path, trust_remote_code=True)"),
    ],
)
def test_the_search_finds(line):
    assert len(dangers(line)) >= 1


def test_processes_are_started_with_a_list_of_words():
    """The two places are the quickstart's `pip download`, of a fixed name, and the steps of a plan."""
    callers = {path.name for path in SOURCES if "subprocess" in path.read_text(encoding="utf-8")}
    assert callers <= {"quickstart_models.py", "steps.py"}


# --------------------------------------------------------------------------------------------------- planted pickles


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def planted(tmp_path):
    """`(mark, contents)`: forms of a pickle that makes `mark` when it is read as one."""
    mark = tmp_path / "it was run"
    archive, array = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Planted(mark)}, archive)
    np.save(array, np.array([Planted(mark)], dtype=object), allow_pickle=True)
    plain = pickle.dumps(Planted(mark))
    pickle.loads(plain)
    assert mark.exists()  # it does work
    mark.rmdir()
    return mark, {"pickle": plain, "torch.save": archive.getvalue(), "numpy": array.getvalue()}


KINDS = ("pickle", "torch.save", "numpy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mapper.safetensors", "mapper.json"])
def test_a_pickle_in_the_place_of_a_mapper(planted, tmp_path, kind, name):
    mark, contents = planted
    (tmp_path / name).write_bytes(contents[kind])
    with pytest.raises(ValueError, match=name):
        load_mapper(tmp_path / name, token_forms(byte_level_bpe()), token_forms(sentencepiece_bpe()))
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.pkl"])
def test_a_pickle_in_the_place_of_a_data_file(planted, tmp_path, kind, name):
    mark, contents = planted
    (tmp_path / name).write_bytes(contents[kind])
    with pytest.raises(InputError, match=name):
        list(read_rows(tmp_path / name))
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["part", "head"])
def test_a_pickle_in_the_place_of_a_part_of_the_teachers_cache(planted, tmp_path, kind, part):
    """Even with the right checksum in its name."""
    mark, contents = planted
    settings = Settings(**dict.fromkeys(Settings.__dataclass_fields__))
    cache = SignalCache(tmp_path, "teacher", settings)
    cache.folder.mkdir(parents=True)
    unnamed = cache.folder / "unnamed"
    unnamed.write_bytes(contents[kind])
    unnamed.rename(cache.folder / f"{part}-{checksum(unnamed)}.safetensors")
    cache.verify()
    with pytest.raises(Exception, match=r"(?i)header|deserializ"):
        cache.open()
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_in_the_place_of_a_model(planted, tmp_path, kind, name):
    """To train, to teach from, to generate with and to evaluate: all load it so."""
    mark, contents = planted
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    if name.startswith("adapter"):
        described = {"peft_type": "LORA", "base_model_name_or_path": "a/model", "target_modules": ["q_proj"]}
    (tmp_path / f"{'adapter_' * name.startswith('adapter')}config.json").write_text(json.dumps(described))
    (tmp_path / name).write_bytes(contents[kind])
    byte_level_bpe().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        LanguageModel(str(tmp_path), "model_name_or_path").load("float32")
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------- generated code


def test_generated_code_is_run_by_evalplus_alone(tmp_path, monkeypatch):
    """`code_task.py` cuts the program out of a response, which parses it, and runs nothing."""
    pytest.importorskip("evalplus", reason="evalplus is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "script_eval"))
    import code_task

    mark = tmp_path / "it was run"
    program = f"import os\n\ndef f(x=os.mkdir({str(mark)!r})):\n    return 1\n"
    task = {"prompt": "def f():\n", "entry_point": "f"}
    assert "os.mkdir" in code_task.solution(task, program)
    assert not mark.exists()
    starts = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "script_eval").glob("*"))
        if path.is_file() and "-m evalplus" in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert starts == ["script_eval/eval_code_task.sh"]
