"""Models, mappers and data that the end-to-end tests share, made once a session."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.end_to_end.rig import dolly_file, remove_shared_memory, run_script, tiny_llama
from tests.unit.tokenizer_zoo import load_real


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
