"""Vocabulary mappers against a full comparison, and their files."""

import errno
import functools
import itertools
import json
import os
import pickle
import runpy
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from get_vocab_mapper.near_strings import nearest_strings, similar_strings
from get_vocab_mapper.token_forms import TokenForms, token_forms
from get_vocab_mapper.vocab_mapper import (
    SimilarTokens,
    VocabMapper,
    _digest,
    build_em,
    build_mined,
    build_prefixem,
    exact_matches,
    load_mapper,
)
from modeling.alignment import byte_groups, group_sizes
from modeling.examples import Encoded, Encoder, alpaca_prompt
from tests.reference import vocab_mapper_oracle as oracle
from tests.unit.tokenizer_zoo import REAL_TOKENIZERS, byte_level_bpe, load_real, real_dir, sentencepiece_bpe

BUILD = {"em": build_em, "mined": build_mined, "prefixem": build_prefixem}
SCRIPTS = Path(__file__).parents[2] / "get_vocab_mapper"


def make(tokens, special=(), roles=None, name="made", byte_fallback=()) -> TokenForms:
    """TokenForms of strings or bytes; `special` and `byte_fallback` are ids."""
    forms = [token.encode() if isinstance(token, str) else token for token in tokens]
    is_special, is_byte_fallback = (np.isin(range(len(forms)), list(ids)) for ids in (special, byte_fallback))
    return TokenForms(name, forms, is_special, is_byte_fallback, roles or {})


def build(kind: str, teacher: TokenForms, student: TokenForms, threshold: float = 0.3) -> VocabMapper:
    return BUILD[kind](teacher, student, threshold=threshold, progress=False)


def rows(table: SimilarTokens) -> list[list[tuple[int, float]]]:
    return [
        list(zip(*(part.tolist() for part in table.row(token_id))))
        for token_id in range(len(table.indptr) - 1)
    ]


def assert_same_tables(mapper: VocabMapper, pairs: dict[tuple[int, int], float]) -> None:
    """Both tables hold exactly these pairs, each row by (distance, id)."""
    by_teacher = [[] for _ in range(mapper.teacher.size)]
    by_student = [[] for _ in range(mapper.student.size)]
    for (v, u), d in pairs.items():
        by_teacher[v].append((d, u))
        by_student[u].append((d, v))
    for table, expected in ((mapper.similar_to_student, by_teacher), (mapper.similar_to_teacher, by_student)):
        assert table.indptr.dtype == table.indices.dtype == np.int32
        assert table.distances.dtype == np.float32
        assert rows(table) == [[(i, float(np.float32(d))) for d, i in sorted(row)] for row in expected]


# ---------------------------------------------------------------- against the full comparison


@st.composite
def vocabularies(draw) -> TokenForms:
    """Few letters, so that equal forms, ties and near misses are common; spaces and bare bytes too."""
    token = st.one_of(
        st.text(alphabet="abc é", min_size=1, max_size=6).map(str.encode),
        st.sampled_from(
            [b"\xc3", b"\xc3\xc3", b" \xa9", b"\t", b"\n", b" ", b"  ", b"</s>", b"<s>", b"<eos>"]
        ),
    )
    forms = draw(st.lists(token, min_size=1, max_size=14))
    ids = st.integers(0, len(forms) - 1)
    special = set(draw(st.lists(ids, max_size=4)))
    byte_fallback = draw(st.lists(ids, max_size=6))
    roles = {role: draw(ids) for role in ("eos", "bos", "pad", "unk") if draw(st.booleans())}
    return make(forms, special | set(roles.values()), roles, byte_fallback=byte_fallback)


@pytest.mark.parametrize("kind", BUILD)
@settings(max_examples=150, deadline=None)
@given(
    teacher=vocabularies(),
    student=vocabularies(),
    threshold=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.8, 1.0]),
)
def test_small_vocabularies_against_the_oracle(kind, teacher, student, threshold):
    mapper = build(kind, teacher, student, threshold)
    forward, backward = oracle.static_map(kind, teacher, student)
    assert mapper.teacher_to_student.tolist() == forward
    assert mapper.student_to_teacher.tolist() == backward
    assert mapper.teacher_to_student.dtype == mapper.student_to_teacher.dtype == np.int32
    assert_same_tables(mapper, oracle.similar(teacher, student, threshold))


@settings(max_examples=150, deadline=None)
@given(
    queries=st.lists(st.text(alphabet="ab", max_size=150), min_size=1, max_size=4),
    candidates=st.lists(st.text(alphabet="abé", max_size=150), min_size=1, max_size=6),
)
def test_long_strings_against_the_oracle(queries, candidates):
    found = nearest_strings(queries, candidates)
    for query, (index, lev) in zip(queries, found.tolist()):
        assert (index, lev) == oracle.mined_choice(query, list(enumerate(candidates)))
    left, right, lev, total = similar_strings(queries, candidates, 0.4)
    expected = {}
    for i, a in enumerate(queries):
        for j, b in enumerate(candidates):
            measured = oracle.levenshtein(a, b)
            if (measured / (len(a) + len(b)) if a or b else 0.0) < 0.4:
                expected[i, j] = (measured, len(a) + len(b))
    assert dict(zip(zip(left.tolist(), right.tolist()), zip(lev.tolist(), total.tolist()))) == expected


@pytest.fixture(scope="module", params=[("phi-3", "qwen2"), ("gemma-2", "opt"), ("smollm2", "gemma-2")])
def real_pair(request):
    """Some tokens of a real teacher vocabulary against the whole of a real student one."""
    teacher_name, student_name = request.param
    teacher, student = token_forms(load_real(teacher_name)), token_forms(load_real(student_name))
    to_student, _ = exact_matches(teacher, student)
    rng = np.random.default_rng(0)
    unmatched = np.flatnonzero((to_student < 0) & ~teacher.is_special)
    matched = np.flatnonzero(to_student >= 0)
    longest = unmatched[np.argsort(teacher.lengths[unmatched])[-5:]]
    chosen = np.unique(
        np.concatenate([rng.choice(unmatched, 24, replace=False), longest, rng.choice(matched, 250)])
    )
    sample = TokenForms(
        name=teacher.name,
        forms=[teacher.forms[v] for v in chosen],
        is_special=teacher.is_special[chosen],
        is_byte_fallback=teacher.is_byte_fallback[chosen],
        roles={role: int(np.flatnonzero(chosen == v)[0]) for role, v in teacher.roles.items() if v in chosen},
    )
    return sample, student


def test_real_vocabularies_against_full_comparison(real_pair):
    teacher, student = real_pair
    mapper = build_mined(teacher, student, progress=False)
    em = build_em(teacher, student, progress=False)
    candidates = [
        (oracle.preference(student, u), text) for u, text in enumerate(student.texts) if not student.is_special[u]
    ]
    unmatched = np.flatnonzero((em.teacher_to_student < 0) & ~teacher.is_special)
    assert len(unmatched) >= 24
    free = np.flatnonzero((em.student_to_teacher < 0) & ~student.is_special).tolist()
    pairs = {}
    for v in unmatched.tolist():
        text = teacher.texts[v]
        (_, nearest), _ = oracle.mined_choice(text, candidates, Levenshtein.distance)
        assert mapper.teacher_to_student[v] == nearest
        a = teacher.spaceless[v]
        for u in free:
            b = student.spaceless[u]
            d = Levenshtein.distance(a, b) / (len(a) + len(b)) if a or b else 0.0
            if d < 0.3:
                pairs[v, u] = d
    assert_same_tables(mapper, pairs)
    assert_same_tables(em, pairs)


def test_real_exact_matches_and_prefixes(real_pair):
    teacher, student = real_pair
    em, prefixem = (
        build_em(teacher, student, progress=False),
        build_prefixem(teacher, student, progress=False),
    )
    first = {}
    for u in sorted(range(len(student)), key=lambda u: oracle.preference(student, u)):
        if not student.is_special[u]:
            first.setdefault(student.forms[u], u)
    for v in np.flatnonzero(~teacher.is_special).tolist():
        form = teacher.forms[v]
        assert em.teacher_to_student[v] == first.get(form, -1)
        starts = [form[:length] for length in range(len(form), 0, -1) if form[:length] in first]
        assert prefixem.teacher_to_student[v] == (first[starts[0]] if starts else -1)


@functools.cache
def encoded_responses(name: str) -> tuple[Encoder, list[Encoded]]:
    """Some answers of each kind of data, as one real tokenizer writes them."""
    encoder, encoded = Encoder(load_real(name)), []
    for file, prompt, answer in (
        ("dolly/databricks-dolly-15k.jsonl", "instruction", "response"),
        ("gsm8k/train.jsonl", "question", "answer"),
        ("mbpp/mbpp.jsonl", "text", "code"),
    ):
        lines = (real_dir() / "data" / file).read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines[:: len(lines) // 100])
        encoded += [encoder.encode(alpaca_prompt(row[prompt]), row[answer]) for row in rows]
    return encoder, encoded


@pytest.mark.parametrize("pair", itertools.combinations(REAL_TOKENIZERS, 2), ids="-".join)
def test_on_real_text_tokens_of_equal_form_map_to_each_other(pair):
    """The tokens that both sides write for the same bytes, one each: what a mapped distribution must put mass on."""
    (teacher, teacher_rows), (student, student_rows) = map(encoded_responses, pair)
    to_student, to_teacher = exact_matches(teacher.forms, student.forms)
    together = []
    for t, s in zip(teacher_rows, student_rows):
        teacher_group, student_group = byte_groups(t.ends, s.ends)
        teacher_alone, student_alone = (group_sizes(group) == 1 for group in (teacher_group, student_group))
        alone = teacher_alone & student_alone
        vs, us = t.input_ids[t.response_start :], s.input_ids[s.response_start :]
        together += zip(vs[alone[teacher_group]].tolist(), us[alone[student_group]].tolist())
    together = [(v, u) for v, u in together if teacher.forms.forms[v] == student.forms.forms[u]]
    assert len(together) > 0.4 * sum(len(s.ends) for s in student_rows)
    v, u = np.array(together).T
    assert np.array_equal(to_student[v], u) and np.array_equal(to_teacher[u], v)


# ---------------------------------------------------------------- the rules, by hand


def test_token_zero_is_mapped_like_any_other():
    mapper = build_em(make(["a", "b"]), make(["b", "a"]), progress=False)
    assert mapper.teacher_to_student.tolist() == [1, 0]
    assert mapper.student_to_teacher.tolist() == [1, 0]
    assert build_em(make(["a"]), make(["b"]), progress=False).teacher_to_student.tolist() == [-1]


def test_of_equal_forms_the_lowest_id_wins_in_both_directions():
    mapper = build_em(make(["x", "ab", "ab"]), make(["ab", "y", "ab"]), progress=False)
    assert mapper.teacher_to_student.tolist() == [-1, 0, 0]
    assert mapper.student_to_teacher.tolist() == [1, -1, 1]
    assert [row for row in rows(mapper.similar_to_teacher) if row] == []  # student token 2 has an exact match


@pytest.mark.parametrize("kind", BUILD)
def test_a_byte_fallback_token_comes_behind_every_other_of_its_form(kind):
    teacher = make(["0", "\n", "0", "0x", " 0"], byte_fallback=[0, 1])
    student = make(["\n", "0", "0", "0"], byte_fallback=[0, 1])
    mapper = build(kind, teacher, student)
    beginning, similar = {"em": (-1, -1), "mined": (2, 2), "prefixem": (2, -1)}[kind]
    assert mapper.teacher_to_student.tolist() == [2, 0, 2, beginning, similar]
    assert mapper.student_to_teacher.tolist() == [1, 2, 2, 2]


def test_of_equally_near_tokens_the_byte_fallback_one_comes_last():
    teacher, student = make(["c"]), make(["a", "b"], byte_fallback=[0])
    assert build_mined(teacher, student, progress=False).teacher_to_student.tolist() == [1]
    assert build_mined(student, teacher, progress=False).student_to_teacher.tolist() == [1]
    # It comes behind all other ties: it wins by a longer common prefix.
    assert build_mined(make(["ab"]), make(["a", "b"], byte_fallback=[0]), progress=False).teacher_to_student[0] == 0


def test_space_underscore_tab_and_newline_differ():
    mapper = build_em(make([" x", "_x", "\t", "\n"]), make(["\n", "_x", "x", "\t", " x"]), progress=False)
    assert mapper.teacher_to_student.tolist() == [4, 1, 3, 0]


def test_roles_match_whatever_their_text_and_override_it():
    teacher = make(["</s>", "<s>", "a"], special=[0, 1], roles={"eos": 0, "bos": 1})
    student = make(["a", "<s>", "</s>", "<end>"], special=[1, 2, 3], roles={"eos": 3, "bos": 1})
    mapper = build_em(teacher, student, progress=False)
    assert mapper.teacher_to_student.tolist() == [3, 1, 0]
    assert mapper.student_to_teacher.tolist() == [
        2,
        1,
        -1,
        0,
    ]  # the student's own `</s>` has lost to the role


def test_an_id_taken_by_an_earlier_role_keeps_that_match():
    teacher = make(["<end>", "<begin>"], special=[0, 1], roles={"eos": 0, "bos": 0, "pad": 0, "unk": 1})
    student = make(
        ["<s>", "</s>", "<pad>", "<unk>"], special=range(4), roles={"eos": 1, "bos": 0, "pad": 2, "unk": 3}
    )
    mapper = build_em(teacher, student, progress=False)
    assert mapper.teacher_to_student.tolist() == [1, 3]
    assert mapper.student_to_teacher.tolist() == [-1, 0, -1, 1]


def test_special_tokens_match_only_special_tokens_and_are_never_near():
    teacher = make(["<sep>", "<pad>", "<mask>", "abc"], special=[0, 1, 2])
    student = make(["<sep>", "<pad>", "<masc>", "<", "abd"], special=[1, 2, 4])
    em = build_em(teacher, student, progress=False)
    assert em.teacher_to_student.tolist() == [-1, 1, -1, -1]
    mined = build_mined(teacher, student, progress=False)
    assert mined.teacher_to_student.tolist() == [-1, 1, -1, 3]  # not the special `abd`
    assert build_prefixem(teacher, student, progress=False).teacher_to_student.tolist() == [-1, 1, -1, -1]
    assert len(mined.similar_to_student.indices) == 0


@pytest.mark.parametrize(
    ("teacher_token", "student_tokens", "chosen"),
    [
        ("abcd", ["abxx", "abcx"], 1),  # the smaller distance
        ("abcd", ["abcde", "xbcd"], 1),  # distance 1 both: the smaller difference in length
        ("abcd", ["xbcd", "abxd", "axcd"], 1),  # the longer common prefix
        ("abcd", ["abc", "abcde"], 1),  # the same, with one shorter and one longer by one
        ("abcd", ["abcx", "abcy"], 0),  # the lower id
        (" the", ["the", "\tthe"], 1),  # spaces count; a substitution keeps the length
    ],
)
def test_mined_ties(teacher_token, student_tokens, chosen):
    mapper = build_mined(make([teacher_token]), make(student_tokens), progress=False)
    assert mapper.teacher_to_student.tolist() == [chosen]


def test_mined_inverse():
    teacher = make(["abx", "ab", "xx", "abcq", "abcr", "abcd"])
    student = make(["ab", "abcd", "abcz"])
    mapper = build_mined(teacher, student, progress=False)
    assert mapper.teacher_to_student.tolist() == [0, 0, 0, 1, 1, 1]
    assert mapper.student_to_teacher.tolist() == [
        1,
        5,
        -1,
    ]  # exact matches beat nearer ids; `abcz` is nobody's
    without_exact = build_mined(make(["abxy", "abx", "aby"]), make(["ab"]), progress=False)
    assert without_exact.student_to_teacher.tolist() == [1]  # distance 1 beats 2, then the lower id


def test_prefixem_takes_the_longest_proper_prefix_in_bytes():
    teacher = make(["abcd", "ab", "é", "zz", "ab!"])
    student = make(["a", "abc", "abcde", b"\xc3", "ab", "ab"])
    mapper = build_prefixem(teacher, student, progress=False)
    assert mapper.teacher_to_student.tolist() == [1, 4, 3, -1, 4]
    assert mapper.student_to_teacher.tolist() == [-1, 0, -1, 2, 1, 1]


def test_similar_tokens_by_hand():
    teacher = make(["hello", " ", "same", "hallo!"])
    student = make(["same", "hallo", " hello ", "  ", "hullo"])
    mapper = build_em(teacher, student, threshold=0.3, progress=False)
    tenth, eleventh = float(np.float32(1 / 10)), float(np.float32(1 / 11))
    assert rows(mapper.similar_to_student) == [
        [(2, 0.0), (1, tenth), (4, tenth)],
        [(3, 0.0)],  # both empty without their spaces
        [],  # has an exact match
        [(1, eleventh), (2, float(np.float32(2 / 11))), (4, float(np.float32(2 / 11)))],
    ]
    assert rows(mapper.similar_to_teacher)[1] == [(3, eleventh), (0, tenth)]


def test_the_threshold_is_exclusive():
    teacher, student = make(["abcde"]), make(["abxyz"])  # 3 / 10
    assert len(build_em(teacher, student, threshold=0.3, progress=False).similar_to_student.indices) == 0
    assert len(build_em(teacher, student, threshold=0.3001, progress=False).similar_to_student.indices) == 1


def test_the_paper_families_match_what_they_should():
    teacher, student = load_real("phi-3"), load_real("qwen2")
    mapper = build_em(token_forms(teacher), token_forms(student), progress=False)
    phi, qwen = teacher.get_vocab(), student.get_vocab()
    assert mapper.teacher_to_student[phi["▁the"]] == qwen["Ġthe"]
    assert mapper.teacher_to_student[phi["<0x0A>"]] == qwen["Ċ"]
    assert mapper.teacher_to_student[teacher.eos_token_id] == student.eos_token_id
    assert mapper.student_to_teacher[student.eos_token_id] == teacher.eos_token_id
    assert mapper.student_to_teacher[qwen["!"]] == phi["!"] > phi["<0x21>"]


# ---------------------------------------------------------------- files

TEACHER = make(["a", " hello", "</s>", "world", "zzz"], special=[2], roles={"eos": 2}, name="the/teacher")
STUDENT = make(["a", "hello", "<end>", "worlds"], special=[2], roles={"eos": 2}, name="the/student")


def assert_equal(one: VocabMapper, other: VocabMapper) -> None:
    assert (one.kind, one.threshold, one.teacher, one.student) == (
        other.kind,
        other.threshold,
        other.teacher,
        other.student,
    )
    assert np.array_equal(one.teacher_to_student, other.teacher_to_student)
    assert np.array_equal(one.student_to_teacher, other.student_to_teacher)
    for name in ("similar_to_student", "similar_to_teacher"):
        for part, array in vars(getattr(one, name)).items():
            loaded = getattr(getattr(other, name), part)
            assert array.dtype == loaded.dtype
            assert np.array_equal(array, loaded)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "mapper.safetensors"
    build("mined", TEACHER, STUDENT, 0.35).save(path)
    return path


@pytest.mark.parametrize("kind", BUILD)
def test_a_saved_mapper_is_loaded_unchanged(kind, tmp_path):
    mapper = build(kind, TEACHER, STUDENT, 0.35)
    path = tmp_path / "mapper.safetensors"
    mapper.save(path)
    mapper.save(path)  # over itself
    assert os.listdir(tmp_path) == ["mapper.safetensors"]
    assert_equal(mapper, VocabMapper.load(path))
    assert_equal(mapper, load_mapper(path, TEACHER, STUDENT, 0.35))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        build("em", TEACHER, STUDENT).save(saved)
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


def test_other_tokenizers_are_refused(saved):
    other = make([*TEACHER.texts[:-1], "yyy"], special=[2], name="another/teacher")
    with pytest.raises(
        ValueError, match=r"'the/teacher' \(5 tokens\).*'the/student' \(4 tokens\).*'another/teacher' \(5 tokens\)"
    ) as caught:
        VocabMapper.load(saved, other, STUDENT)
    assert str(caught.value).endswith(
        "Give the mapper of this pair, or build it: python get_vocab_mapper/get_MinED_mapper.py --teacher "
        "another/teacher --student the/student --output NEW.safetensors --simi_threshold 0.35"
    )
    with pytest.raises(ValueError, match=r"tokenizer 'the/student' \(4 tokens\).*the student is 'the/teacher'"):
        VocabMapper.load(saved, TEACHER, TEACHER)
    with pytest.raises(ValueError, match=r"the teacher is 'another/t.*, the student is 'another/t.* tokens differ"):
        VocabMapper.load(saved, other, other)
    renamed = TokenForms("elsewhere", TEACHER.forms, TEACHER.is_special, TEACHER.is_byte_fallback, {})
    VocabMapper.load(saved, renamed, STUDENT)  # the same tokens under another name are the same tokenizer


def test_exchanged_sides_are_named_so(saved):
    with pytest.raises(ValueError) as caught:
        load_mapper(saved, STUDENT, TEACHER)
    assert str(caught.value) == (
        f"{saved} was built for student→teacher: for the teacher tokenizer 'the/teacher' (5 tokens) and the student "
        "tokenizer 'the/student' (4 tokens), which have changed places here. Exchange the two models, or build a "
        "mapper for this direction: python get_vocab_mapper/get_MinED_mapper.py --teacher the/student --student "
        "the/teacher --output NEW.safetensors --simi_threshold 0.35"
    )


def command_for(output: Path, script: str = "get_em_mapper.py") -> str:
    sides = "--teacher the/teacher --student the/student"
    return f"python get_vocab_mapper/{script} {sides} --output {shlex.quote(str(output))}"


def test_a_missing_file_is_named_with_the_command_that_builds_it(tmp_path):
    for name in ("no file.safetensors", "no file.json"):
        with pytest.raises(FileNotFoundError) as caught:
            load_mapper(tmp_path / name, TEACHER, STUDENT)
        built = command_for(tmp_path / "no file.safetensors")
        assert str(caught.value) == f"There is no vocabulary mapper at {tmp_path / name}. Build it: {built}"
    with pytest.raises(FileNotFoundError, match=r"get_MinED_mapper\.py"):
        load_mapper(tmp_path / "none", TEACHER, STUDENT, kind="mined")


def test_a_folder_is_refused(tmp_path):
    for name in ("folder.safetensors", "folder.json"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is a folder. Give the mapper file itself, or build one: python"):
            load_mapper(tmp_path / name, TEACHER, STUDENT)


def weights(path: Path) -> None:
    """A model's weights in bfloat16, which numpy does not know."""
    header = json.dumps({"model.embed": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.safetensors", weights, "safetensors file, but no vocabulary mapper (its first tensor is 'model.embed"),
        ("other.safetensors", lambda p: safetensors.numpy.save_file({}, p), "no vocabulary mapper (it holds nothing"),
        ("notes.txt", lambda p: p.write_text("How to build a mapper: …\n" * 9), "is damaged or no vocabulary mapper ("),
        ("pickle.bin", lambda p: p.write_bytes(pickle.dumps(Sentinel())), "is damaged or no vocabulary mapper ("),
        ("empty.safetensors", lambda p: p.touch(), "is damaged or no vocabulary mapper ("),
        ("published.txt", lambda p: p.write_text('{"0": 1}'), "must have a name that ends in .json. Build it again: "),
    ],
)
def test_what_is_no_mapper_is_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError) as caught:
        load_mapper(path, TEACHER, STUDENT)
    assert str(caught.value).startswith(f"{path} is ") and message in str(caught.value)
    assert "python get_vocab_mapper/get_em_mapper.py --teacher the/teacher --student the/student" in str(caught.value)
    # Whoever follows the message must not write over a file of another sort.
    assert not str(caught.value).endswith((f"--output {tmp_path}/model.safetensors", ".txt", ".bin"))


class Sentinel:
    """Unpickling one would end the test run."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"mapper\.safetensors is damaged.*Build it again"):
        VocabMapper.load(saved)


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(saved):
    """In the header and in the data; the only bytes that may change unseen are those that mean nothing."""
    mapper, content = VocabMapper.load(saved), saved.read_bytes()
    unseen = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= (0x01, 0x10, 0x80)[place % 3]
        saved.write_bytes(damaged)
        try:
            loaded = VocabMapper.load(saved)
        except ValueError as error:
            assert str(error).startswith(f"{saved} ") and "python get_vocab_mapper/" in str(error)
        else:
            assert_equal(mapper, loaded)
            unseen.append(content[place : place + 1])
    assert set(unseen) <= {b" "}  # the header's padding


def test_a_changed_array_is_noticed_where_every_value_could_be(saved):
    """A mapping to another token that exists: nothing but the checksum can tell."""
    changed = VocabMapper.load(saved).teacher_to_student.copy()
    changed[0] = 3
    rewrite(saved, {"teacher_to_student": changed}, seal=False)
    with pytest.raises(ValueError, match=r"is damaged \(its content is not what its checksum was taken of\). Build it"):
        VocabMapper.load(saved)


def rewrite(path: Path, arrays=None, seal: bool = True, **metadata: str) -> None:
    """The same file with other arrays and metadata, and with the checksum of these, unless it is not to be sealed."""
    with safetensors.safe_open(path, framework="numpy") as file:
        new_metadata = file.metadata() | metadata
    new_arrays = safetensors.numpy.load_file(path) | (arrays or {})
    if seal:
        del new_metadata["sha256"]
        new_metadata["sha256"] = _digest(new_metadata, new_arrays)
    safetensors.numpy.save_file(new_arrays, path, new_metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "weights"}, "no vocabulary mapper"),
        ({"format_version": "4"}, "version '4', and this code reads 3. Update the code, or build it again: python"),
        ({"format_version": "2"}, "version '2', and this code reads 3. Build it again: python .*_threshold 0.35$"),
        ({"format_version": "new"}, "version 'new', and this code reads 3. Build it again: python"),
        ({"kind": "magic"}, "unknown kind 'magic'"),
        ({"threshold": "high"}, "damaged"),
        ({"threshold": "7"}, "between 0 and 1"),
        ({"threshold": "nan"}, "between 0 and 1"),
        ({"teacher": "{}"}, "damaged"),
        ({"teacher": '{"name": "t", "size": "5", "fingerprint": ""}'}, "damaged"),
        ({"teacher": '{"name": "t", "size": 6, "fingerprint": ""}'}, "damaged"),
    ],
)
def test_wrong_metadata_are_refused(saved, metadata, message):
    rewrite(saved, **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        VocabMapper.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"teacher_to_student": np.zeros(4, dtype=np.int32)},
        {"teacher_to_student": np.zeros(5, dtype=np.int64)},
        {"teacher_to_student": np.full(5, 4, dtype=np.int32)},
        {"student_to_teacher": np.full(4, -2, dtype=np.int32)},
        {"similar_to_student.indptr": np.array([0, 1, 0, 2, 2, 2], dtype=np.int32)},
        {"similar_to_student.indptr": np.zeros(6, dtype=np.int32)},
        {"similar_to_student.indptr": np.array([0, 2**30, 1, 2, 2, 2], dtype=np.int32)},
        {"similar_to_student.indptr": np.array([0, -1, 1, 2, 2, 2], dtype=np.int32)},
        {"similar_to_student.indptr": np.array([0, 1, 1, 2, 2], dtype=np.int32)},
        {"similar_to_student.indptr": np.array(0, dtype=np.int32)},
        {"similar_to_student.indices": np.full(2, -1, dtype=np.int32)},
        {"similar_to_student.indices": np.full((1, 2), 1, dtype=np.int32)},
        {"similar_to_student.indices": np.full(2, 4, dtype=np.int32)},
        {"similar_to_teacher.distances": np.zeros(1, dtype=np.float32)},
        {"similar_to_teacher.distances": np.zeros(2, dtype=np.float64)},
        {"similar_to_teacher.distances": np.array([np.nan, 0.1], dtype=np.float32)},
        {"similar_to_teacher.distances": np.array([0.1, np.inf], dtype=np.float32)},
        {"similar_to_teacher.distances": np.array([-0.1, 0.1], dtype=np.float32)},
        {"similar_to_teacher.distances": np.array([0.1, 0.4], dtype=np.float32)},
    ],
)
def test_arrays_that_cannot_be_are_refused(saved, arrays):
    assert len(VocabMapper.load(saved).similar_to_student.indices) == 2
    rewrite(saved, arrays)
    with pytest.raises(ValueError, match=r"mapper\.safetensors is damaged.*Build it again"):
        VocabMapper.load(saved)


def test_rows_out_of_order_are_refused(tmp_path):
    path = tmp_path / "mapper.safetensors"
    build("em", make(["abcde"]), make(["abcdx", "abcdy", "abcdef"])).save(path)
    table = VocabMapper.load(path).similar_to_student
    assert table.indices.tolist() == [2, 0, 1] and table.distances.tolist() == pytest.approx([1 / 11, 0.1, 0.1])
    for name, order in (("indices", [0, 2, 1]), ("distances", [1, 0, 2])):
        build("em", make(["abcde"]), make(["abcdx", "abcdy", "abcdef"])).save(path)
        rewrite(path, {f"similar_to_student.{name}": getattr(table, name)[order]})
        with pytest.raises(ValueError, match="a row of similar_to_student is not in order"):
            VocabMapper.load(path)


def test_a_smaller_threshold_filters_and_a_larger_one_is_refused(saved):
    full = VocabMapper.load(saved)
    for threshold in (0.0, 0.05, 1 / 11, 0.2, 0.35):
        assert_equal(full.with_threshold(threshold), build("mined", TEACHER, STUDENT, threshold))
        assert_equal(
            load_mapper(saved, TEACHER, STUDENT, threshold), build("mined", TEACHER, STUDENT, threshold)
        )
    with pytest.raises(ValueError) as caught:
        load_mapper(saved, TEACHER, STUDENT, 0.5)
    assert str(caught.value) == (
        f"{saved} holds similar tokens below 0.35 only, and --simi_threshold 0.5 is asked for. Give 0.35 or less, or "
        f"build it again: {command_for(saved, 'get_MinED_mapper.py')} --simi_threshold 0.5"
    )
    with pytest.raises(ValueError, match=r"below 0\.35 only.*--simi_threshold 0\.5"):
        full.with_threshold(0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        load_mapper(saved, TEACHER, STUDENT, float("nan"))
    with pytest.raises(ValueError, match="between 0 and 1"):
        build("em", TEACHER, STUDENT, 1.5)


def test_the_published_layout_round_trip(tmp_path):
    teacher = make(["b", "a", "</s>", "world", "q"], special=[2], roles={"eos": 2})
    student = make(["a", "b", "<end>", "worlds"], special=[2], roles={"eos": 2})
    mapper = build("em", teacher, student)
    path = tmp_path / "published.json"
    mapper.export_json(path)
    assert json.loads(path.read_text()) == {"0": 1, "1": 0, "2": 2, "3": 0, "4": 0}
    with pytest.warns(UserWarning, match=r"published\.json does not say"):
        loaded = load_mapper(path, teacher, student)
    assert loaded.kind == "published"
    assert loaded.teacher_to_student.tolist() == [1, -1, 2, -1, -1]  # student id 0 cannot be said
    assert loaded.student_to_teacher.tolist() == [-1, 0, 2, -1]
    assert rows(loaded.similar_to_student) == rows(mapper.similar_to_student)
    assert rows(loaded.similar_to_teacher) == rows(mapper.similar_to_teacher)


def test_a_published_file_may_leave_ids_out_and_map_many_to_one(tmp_path):
    path = tmp_path / "published.json"
    path.write_text('{"0": 1, "1": 1, "3": 3, "4": 3}')
    teacher = make(["bxx", "bx", "c", "worldly", "world"])
    with pytest.warns(UserWarning, match=r"It leaves out 1 of the 5 teacher ids, the first of them 2; they are"):
        mapper = load_mapper(path, teacher, make(["a", "b", "c", "world"]))
    assert mapper.teacher_to_student.tolist() == [1, 1, -1, 3, 3]
    assert mapper.student_to_teacher.tolist() == [-1, 1, -1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('{"a": 1}', "'a': 1 is no pair of ids"),
        ('{"0": "1"}', "'0': '1' is no pair of ids"),
        ('{"0": true}', "'0': True is no pair of ids"),
        ('{"5": 1}', "'5': 1 is outside"),
        ('{"0": 4}', "'0': 4 is outside"),
        ('{"0": -1}', "'0': -1 is outside"),
        ('{"-1": 1}', "'-1': 1 is no pair of ids"),
        ('{"1.0": 1}', "'1.0': 1 is no pair of ids"),
        ('{"01": 1}', "'01': 1 is no pair of ids"),
        ('{"٣": 1}', "'٣': 1 is no pair of ids"),
        ('{"": 1}', "'': 1 is no pair of ids"),
        ('{"0": 1.0}', "'0': 1.0 is no pair of ids"),
        ('{"0": NaN}', "'0': nan is no pair of ids"),
        ('{"0": null}', "'0': None is no pair of ids"),
        ('{"0": [1]}', r"'0': \[1\] is no pair of ids"),
        ('{"0": {"1": 2}}', "'0': {'1': 2} is no pair of ids"),
        (f'{{"{"9" * 5000}": 1}}', ": 1 is outside"),
        (f'{{"0": {"9" * 5000}}}', "no valid JSON"),
        ('{"0": 1, "1": 2, "0": 3}', "no valid JSON .the key '0' stands there 2 times"),
        ("[" * 100_000, "no valid JSON"),
        ("", "no valid JSON"),
        ("7", "holds a JSON int"),
        ("{}", "maps no token of 'the/teacher' .5 tokens. and 'the/student' .4 tokens.: all of its 0 entries are 0"),
        ('{"0": 0, "1": 0}', "all of its 2 entries are 0"),
        (b"\xff\xfe\xfa", "no valid JSON"),
    ],
)
def test_a_wrong_published_file_is_refused(tmp_path, content, message):
    path = tmp_path / "published.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_mapper(path, TEACHER, STUDENT)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(f"Build a mapper: {command_for(tmp_path / 'published.safetensors')}")


def test_the_report_shows_counts_and_examples():
    text = build("mined", TEACHER, STUDENT, 0.35).report(TEACHER, STUDENT)
    assert "teacher the/teacher: 5 tokens\n  exact match: 2\n  mapped: 5 (100.0 %)" in text
    assert "0 'a' -> 0 'a'" in text
    assert "1 ' hello' -> 1 'hello'  (edit distance 1)" in text
    assert "3 'world' -> 3 'worlds'  (distance 0.091, of 1)" in text


# ---------------------------------------------------------------- the scripts


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    sentencepiece_bpe().save_pretrained(folder / "teacher")
    byte_level_bpe().save_pretrained(folder / "student")
    return folder / "teacher", folder / "student"


@pytest.mark.parametrize(
    ("script", "kind"),
    [("get_em_mapper.py", "em"), ("get_MinED_mapper.py", "mined"), ("get_prefixEM_mapper.py", "prefixem")],
)
def test_a_script_builds_its_mapper(script, kind, small_pair, tmp_path):
    teacher, student = small_pair
    output, exported = tmp_path / "new folder" / "mapper.safetensors", tmp_path / "other" / "mapper.json"
    done = run(
        script,
        *("--teacher", str(teacher), "--student", str(student), "--output", str(output)),
        *("--simi_threshold", "0.25", "--export_json", str(exported)),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "exact match: " in done.stdout
    teacher_forms, student_forms = token_forms(sentencepiece_bpe()), token_forms(byte_level_bpe())
    loaded = VocabMapper.load(output, teacher_forms, student_forms)
    expected = build(kind, teacher_forms, student_forms, 0.25)
    assert (loaded.kind, loaded.threshold) == (kind, 0.25)
    assert np.array_equal(loaded.teacher_to_student, expected.teacher_to_student)
    assert np.array_equal(loaded.student_to_teacher, expected.student_to_teacher)
    assert rows(loaded.similar_to_student) == rows(expected.similar_to_student)
    assert len(json.loads(exported.read_text())) == len(teacher_forms)


def test_help_needs_no_heavy_import(tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['get_em_mapper.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPTS / 'get_em_mapper.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "    assert not {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "else:\n"
        "    raise AssertionError('no exit')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--simi_threshold" in done.stdout


@pytest.mark.parametrize(
    ("flag", "folder", "reason"),
    [
        ("--teacher", "missing", "there is no folder"),
        ("--student", "missing", "there is no folder"),
        ("--student", "empty", "no tokenizer could be loaded from"),
    ],
)
def test_a_bad_folder_is_named_with_its_flag(flag, folder, reason, small_pair, tmp_path):
    (tmp_path / "empty").mkdir()
    sides = dict(zip(("--teacher", "--student"), map(str, small_pair)))
    sides[flag] = str(tmp_path / folder)
    flat = [part for side in sides.items() for part in side]
    done = run("get_em_mapper.py", *flat, "--output", str(tmp_path / "m.safetensors"), folder=tmp_path)
    assert done.returncode != 0
    assert f"{flag}: {reason}" in done.stderr
    assert str(tmp_path / folder) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m.safetensors").exists()


@pytest.fixture
def build_here(small_pair, monkeypatch, capsys):
    """Runs get_em_mapper.py in this process; gives `(exit status, stdout, stderr)`."""

    def build_here(*arguments: str):
        sides = ("--teacher", str(small_pair[0]), "--student", str(small_pair[1]))
        monkeypatch.setattr(sys, "argv", ["get_em_mapper.py", *sides, *arguments])
        status = 0
        try:
            runpy.run_path(str(SCRIPTS / "get_em_mapper.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return build_here


def test_an_older_file_is_replaced_and_that_is_said(build_here, tmp_path):
    output, exported = tmp_path / "new" / "m.safetensors", tmp_path / "m.json"
    arguments = ("--output", str(output), "--export_json", str(exported))
    _, said, _ = build_here(*arguments)
    assert f"written: {output}\n" in said and f"written: {exported}\n" in said
    output.write_text("something else")
    status, said, _ = build_here(*arguments)
    assert status == 0 and f"written, in the place of an older file: {output}\n" in said
    assert VocabMapper.load(output).kind == "em" and os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("flag", ["--output", "--export_json"])
def test_where_no_file_can_be_written_nothing_is_built(build_here, tmp_path, monkeypatch, flag):
    def build(*_, **__):
        raise AssertionError("built")

    monkeypatch.setattr("get_vocab_mapper.vocab_mapper.build_em", build)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "file" / "m", "no file can be written there: "),
        (tmp_path / "file" / "deeper" / "m", "no file can be written there: Not a directory. Give another folder."),
        (tmp_path / "folder", "this is a folder. Give the name of a file."),
        (Path("/proc/m"), "no file can be written there: "),
    ):
        other = () if flag == "--output" else ("--output", str(tmp_path / "m"))
        status, said, message_given = build_here(flag, str(path), *other)
        assert (status, said) == (2, "")
        assert message_given.startswith(f"get_em_mapper.py: error: {flag} {path}: {message}")
        assert message_given.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_leaves_the_old_mapper_and_one_message(build_here, saved, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    status, _, message = build_here("--output", str(saved))
    assert status == 2
    assert message.endswith(
        f"get_em_mapper.py: error: --output {saved}: it cannot be written: No space left on device.\n"
    )
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--simi_threshold", "nan"), "must be a number between 0 and 1, and is nan"),
        (("--simi_threshold", "high"), "must be a number between 0 and 1, and is high"),
        (("--simi_threshold", "-0.1"), "must be a number between 0 and 1, and is -0.1"),
        (("--simi", "0.2"), "unrecognized arguments: --simi 0.2"),  # no abbreviations: a new flag could change theirs
    ],
)
def test_bad_numbers_and_abbreviations_are_refused(build_here, tmp_path, arguments, message):
    status, _, said = build_here("--output", str(tmp_path / "m"), *arguments)
    assert status == 2 and message in said
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--simi_threshold", "1.5"), "--simi_threshold"),
        (("--trust_remote_code", "maybe"), "--trust_remote_code"),
        (("--output", "m.json"), "--export_json"),
    ],
)
def test_bad_flags_are_refused(extra, message, tmp_path):
    done = run(
        "get_em_mapper.py", "--teacher", "t", "--student", "s", "--output", "m", *extra, folder=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
