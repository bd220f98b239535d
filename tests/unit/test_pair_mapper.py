"""The mapper of a pair: built once, whoever asks and however many at a time, and read where it fits."""

import dataclasses
import multiprocessing
import os
import time

import pytest

from get_vocab_mapper import mapper_file
from get_vocab_mapper.builders import BUILDERS
from get_vocab_mapper.mapper_file import read_mapper
from get_vocab_mapper.pair_mapper import mapper_for_pair
from tests.unit.test_vocab_mapper import assert_equal, build, make

TEACHER = make(["a", "hello", "</s>", "<end>"], special=[2, 3], roles={"eos": 2}, name="some/folder/teacher")
STUDENT = make(["hallo", "a", "<eos>"], special=[2], roles={"eos": 2}, name="hub/student")
NAME = "teacher-to-student"


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Call it, and from then on a builder that is asked for is missing."""
    return lambda: monkeypatch.setattr("get_vocab_mapper.pair_mapper.BUILDERS", {})


def files(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("kind", BUILDERS)
def test_built_once_and_read_again(kind, tmp_path, capsys, nothing_is_built):
    directory = tmp_path / "new" / "mappers"
    assert_equal(mapper_for_pair(kind, TEACHER, STUDENT, directory), build(kind, TEACHER, STUDENT))
    assert files(directory) == [f"{NAME}.{kind}.safetensors"]
    said = capsys.readouterr().out
    assert f"{kind} mapper, similar tokens below 0.3" in said and f"written: {directory}/{NAME}.{kind}" in said
    nothing_is_built()
    renamed = dataclasses.replace(TEACHER, name="./elsewhere/teacher/")
    for threshold in (0.3, 0.05):
        assert_equal(
            mapper_for_pair(kind, renamed, STUDENT, str(directory), threshold), build(kind, TEACHER, STUDENT, threshold)
        )
    assert capsys.readouterr().out == ""


def test_a_larger_threshold_builds_it_again(tmp_path, nothing_is_built):
    for threshold in (0.05, 0.3):
        mapper = mapper_for_pair("em", TEACHER, STUDENT, tmp_path, threshold)
        assert_equal(mapper, build("em", TEACHER, STUDENT, threshold))
    assert files(tmp_path) == [f"{NAME}.em.safetensors"]
    nothing_is_built()
    assert mapper_for_pair("em", TEACHER, STUDENT, tmp_path, 0.05).threshold == 0.05


def test_another_pair_of_equal_names_has_another_file(tmp_path, nothing_is_built):
    """Also one with the same tokens and another EOS, which the fingerprints do not tell apart."""
    pairs = {
        f"{NAME}.em.safetensors": (TEACHER, STUDENT),
        f"{NAME}-2.em.safetensors": (TEACHER, make(["a", "hello"], name="another/student")),
        f"{NAME}-3.em.safetensors": (dataclasses.replace(TEACHER, roles={"eos": 3}), STUDENT),
        f"{NAME}-4.em.safetensors": (TEACHER, dataclasses.replace(STUDENT, roles={})),
    }
    for pair in pairs.values():
        assert_equal(mapper_for_pair("em", *pair, tmp_path), build("em", *pair))
    assert files(tmp_path) == sorted(pairs)
    nothing_is_built()
    for name, pair in pairs.items():
        assert_equal(mapper_for_pair("em", *pair, tmp_path), build("em", *pair))
        assert_equal(read_mapper(tmp_path / name), build("em", *pair))


@pytest.mark.parametrize("fault", ["older", "truncated", "no mapper"])
def test_a_file_that_cannot_be_read_is_replaced_with_a_warning(fault, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        if fault == "older":
            patch.setattr(mapper_file, "FORMAT_VERSION", mapper_file.FORMAT_VERSION - 1)
        mapper_for_pair("em", TEACHER, STUDENT, tmp_path)
    path = tmp_path / f"{NAME}.em.safetensors"
    if fault != "older":
        path.write_bytes(path.read_bytes()[:-1] if fault == "truncated" else b"{}")
    with pytest.warns(UserWarning, match=f"(?i)new mapper takes the place .*{path}"):
        mapper = mapper_for_pair("em", TEACHER, STUDENT, tmp_path)
    assert_equal(mapper, build("em", TEACHER, STUDENT))
    assert_equal(mapper, read_mapper(path))
    assert files(tmp_path) == [path.name]


def test_two_processes_at_the_same_time_build_it_once(tmp_path, monkeypatch, capfd):
    def slow(*arguments):
        with open(tmp_path / "builds", "a") as file:
            file.write("built\n")
        time.sleep(0.5)  # so that the other is there long before it is done
        return build("em", *arguments)

    def ask():
        start.wait()
        answers.put(mapper_for_pair("em", TEACHER, STUDENT, tmp_path / "mappers"))

    monkeypatch.setattr("get_vocab_mapper.pair_mapper.BUILDERS", {"em": slow})
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Barrier(2), fork.SimpleQueue()
    processes = [fork.Process(target=ask) for _ in range(2)]
    for process in processes:
        process.start()
    for answer in (answers.get(), answers.get()):
        assert_equal(answer, build("em", TEACHER, STUDENT))
    for process in processes:
        process.join()
    assert (tmp_path / "builds").read_text() == "built\n"
    assert capfd.readouterr().out.count("written: ") == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_that_is_killed_holds_nobody_up(step, tmp_path, monkeypatch):
    def ask():
        monkeypatch.setattr(os, step, lambda *_: os._exit(9))
        mapper_for_pair("em", TEACHER, STUDENT, tmp_path)

    process = multiprocessing.get_context("fork").Process(target=ask)
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / f"{NAME}.em.safetensors").exists()
    assert_equal(mapper_for_pair("em", TEACHER, STUDENT, tmp_path), build("em", TEACHER, STUDENT))
