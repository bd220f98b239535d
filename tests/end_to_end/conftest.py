"""Models, mappers and data that the end-to-end tests share, made once a session."""

import importlib
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from transformers import AutoTokenizer

from get_vocab_mapper.builders import BUILDERS
from get_vocab_mapper.mapper_file import save_mapper
from get_vocab_mapper.token_forms import token_forms
from tests.end_to_end import rig
from tests.end_to_end.rig import dolly_file, remove_shared_memory, run_script, tiny_llama, training_flags
from tests.unit.tokenizer_zoo import byte_level_bpe, load_real, sentencepiece_bpe


def make_pair(folder: Path, teacher: tuple[str, int], student: tuple[str, int]) -> SimpleNamespace:
    """A random teacher and student with real tokenizers (name, columns of the head), and their EM mapper."""
    paths = {}
    for role, (name, columns), seed in (("teacher", teacher, 1), ("student", student, 2)):
        paths[role] = tiny_llama(folder / f"{role} {name}", load_real(name), columns, seed=seed)
    mapper = folder / "em.safetensors"
    run_script(
        "get_vocab_mapper/get_em_mapper.py",
        *("--teacher", str(paths["teacher"]), "--student", str(paths["student"]), "--output", str(mapper)),
    )
    return SimpleNamespace(**paths, mapper=mapper)


@pytest.fixture(scope="session", autouse=True)
def warm(pytestconfig):
    """The interpreter of `run_script` and `launcher`: it forks processes whose heavy imports are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig, "PYTHON", pytestconfig.warm_python)
        yield pytestconfig.warm_python


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory):
    """Small models of two small tokenizers: a teacher, a student, a teacher `same` with the student's, and mappers."""
    folder = tmp_path_factory.mktemp("a small pair")
    teacher, student = sentencepiece_bpe(), byte_level_bpe()
    paths = {
        name: tiny_llama(folder / name, tokenizer, len(tokenizer) + padding, layers=1, seed=seed)
        for seed, (name, tokenizer, padding) in enumerate(
            [("student", student, 5), ("teacher", teacher, 7), ("same", student, 9)], 1
        )
    }
    forms = [token_forms(AutoTokenizer.from_pretrained(paths[side])) for side in ("teacher", "student")]
    for kind in BUILDERS:
        paths[kind] = folder / f"{kind}.safetensors"
        save_mapper(BUILDERS[kind](*forms, progress=False), paths[kind])
    return SimpleNamespace(**paths)


@pytest.fixture
def main(monkeypatch, capsys, tmp_path_factory):
    """`main(method, flag=value, …)` runs the main of `run_clm_METHOD.py` in this process: `status` and `stderr`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    handlers, level = logging.root.handlers[:], logging.root.level

    def main(method, **arguments):
        script, status = importlib.import_module(f"modeling.run_clm_{method}"), 0
        words = training_flags(**{"save_strategy": "no", **arguments})
        monkeypatch.setattr(sys, "argv", [f"run_clm_{method}.py", *words])
        capsys.readouterr()
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        return SimpleNamespace(status=status, stderr=capsys.readouterr().err, method=method)

    yield main
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.fixture(autouse=True)
def no_shared_memory_left():
    yield
    remove_shared_memory()


@pytest.fixture(scope="session")
def phi_qwen(tmp_path_factory):
    """The widths of Phi-3 and Qwen2: 32,064 and 151,936 columns, padded heads included."""
    return make_pair(tmp_path_factory.mktemp("phi qwen"), ("phi-3", 32_064), ("qwen2", 151_936))


@pytest.fixture(scope="session")
def phi_smollm(tmp_path_factory):
    """A smaller pair, for what must run many times. The student's head is padded by 64 columns."""
    return make_pair(tmp_path_factory.mktemp("phi smollm"), ("phi-3", 32_064), ("smollm2", 49_216))


@pytest.fixture(scope="session")
def dolly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dolly")
    return SimpleNamespace(
        train=dolly_file(folder / "train.json", range(200)),
        validation=dolly_file(folder / "validation.json", range(200, 217), shorter_than=300),
    )
