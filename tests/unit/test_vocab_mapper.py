"""Vocabulary mappers against a full comparison, and their files."""

import functools
import itertools
import json
import os
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
from rapidfuzz.process import cdist

from get_vocab_mapper.builders import BUILDERS, exact_matches, report
from get_vocab_mapper.mapper import Direction, VocabMapper
from get_vocab_mapper.mapper_file import (
    FORMAT_VERSION,
    _digest,
    export_json,
    load_mapper,
    read_mapper,
    save_mapper,
)
from get_vocab_mapper.near_strings import nearest_strings, similar_strings
from get_vocab_mapper.token_forms import TokenForms, token_forms
from modeling.text.alignment import byte_groups, one_to_one_tokens
from modeling.text.encoder import Encoded, Encoder
from modeling.text.rows import alpaca_prompt
from tests.reference import vocab_mapper_oracle as oracle
from tests.unit.tokenizer_zoo import REAL_TOKENIZERS, byte_level_bpe, load_real, real_dir, sentencepiece_bpe

SCRIPTS = Path(__file__).parents[2] / "get_vocab_mapper"


def make(tokens, special=(), roles=None, name="made", byte_fallback=()) -> TokenForms:
    """TokenForms of strings or bytes; `special` and `byte_fallback` are ids."""
    forms = [token.encode() if isinstance(token, str) else token for token in tokens]
    is_special, is_byte_fallback = (np.isin(range(len(forms)), list(ids)) for ids in (special, byte_fallback))
    return TokenForms(name, forms, is_special, is_byte_fallback, roles or {})


def build(kind: str, teacher: TokenForms, student: TokenForms, threshold: float = 0.3) -> VocabMapper:
    return BUILDERS[kind](teacher, student, threshold=threshold, progress=False)


def static_maps(mapper: VocabMapper) -> tuple[list[int], list[int]]:
    return mapper.to_student.static.tolist(), mapper.to_teacher.static.tolist()


def rows(direction: Direction) -> list[list[tuple[int, float]]]:
    return [list(zip(*(part.tolist() for part in direction.row(v)))) for v in range(len(direction.indptr) - 1)]


def assert_similar(mapper: VocabMapper, pairs: dict[tuple[int, int], float]) -> None:
    """Both directions hold exactly these pairs, each row by (distance, id)."""
    by_teacher = [[] for _ in range(mapper.teacher.vocab_size)]
    by_student = [[] for _ in range(mapper.student.vocab_size)]
    for (v, u), d in pairs.items():
        by_teacher[v].append((d, u))
        by_student[u].append((d, v))
    for direction, expected in ((mapper.to_student, by_teacher), (mapper.to_teacher, by_student)):
        assert direction.static.dtype == direction.indptr.dtype == direction.indices.dtype == np.int32
        assert direction.distances.dtype == np.float32
        assert rows(direction) == [[(i, float(np.float32(d))) for d, i in sorted(row)] for row in expected]


# ---------------------------------------------------------------- against the full comparison


@st.composite
def vocabularies(draw) -> TokenForms:
    """Few letters, so that equal forms, ties and near misses are common; spaces and bare bytes too."""
    token = st.one_of(
        st.text(alphabet="abc é", min_size=1, max_size=6).map(str.encode),
        st.sampled_from([b"\xc3", b"\xc3\xc3", b" \xa9", b"\t", b"\n", b" ", b"  ", b"</s>", b"<s>", b"<eos>"]),
    )
    forms = draw(st.lists(token, min_size=1, max_size=14))
    ids = st.integers(0, len(forms) - 1)
    special = set(draw(st.lists(ids, max_size=4)))
    byte_fallback = draw(st.lists(ids, max_size=6))
    roles = {role: draw(ids) for role in ("eos", "bos", "pad", "unk") if draw(st.booleans())}
    return make(forms, special | set(roles.values()), roles, byte_fallback=byte_fallback)


@pytest.mark.parametrize("kind", BUILDERS)
@settings(max_examples=150, deadline=None)
@given(
    teacher=vocabularies(),
    student=vocabularies(),
    threshold=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.8, 1.0]),
)
def test_small_vocabularies_against_the_oracle(kind, teacher, student, threshold):
    mapper = build(kind, teacher, student, threshold)
    assert static_maps(mapper) == oracle.static_map(kind, teacher, student)
    assert_similar(mapper, oracle.similar(teacher, student, threshold))


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
    teacher, student = (token_forms(load_real(name)) for name in request.param)
    to_student, _ = exact_matches(teacher, student)
    rng = np.random.default_rng(0)
    unmatched = np.flatnonzero((to_student < 0) & ~teacher.is_special)
    matched = np.flatnonzero(to_student >= 0)
    longest = unmatched[np.argsort(teacher.lengths[unmatched])[-5:]]
    chosen = np.unique(np.concatenate([rng.choice(unmatched, 24, replace=False), longest, rng.choice(matched, 250)]))
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
    mapper, em = build("mined", teacher, student), build("em", teacher, student)
    texts = [u for u in range(len(student)) if not student.is_special[u]]
    unmatched = np.flatnonzero((em.to_student.static < 0) & ~teacher.is_special)
    assert len(unmatched) >= 24
    free = np.flatnonzero((em.to_teacher.static < 0) & ~student.is_special)
    to_texts = cdist(
        [teacher.texts[v] for v in unmatched], [student.texts[u] for u in texts], scorer=Levenshtein.distance
    )
    spaceless = [teacher.spaceless[v] for v in unmatched], [student.spaceless[u] for u in free]
    to_free = cdist(*spaceless, scorer=Levenshtein.distance)
    relative = to_free / np.maximum(np.add.outer(*(list(map(len, side)) for side in spaceless)), 1)
    pairs = {}
    for v, distances, of_free in zip(unmatched.tolist(), to_texts, relative):
        nearest = [texts[k] for k in np.flatnonzero(distances == distances.min())]
        candidates = [(oracle.preference(student, u), student.texts[u]) for u in nearest]
        (_, wanted), _ = oracle.mined_choice(teacher.texts[v], candidates, Levenshtein.distance)
        assert mapper.to_student.static[v] == wanted
        pairs |= {(v, int(free[k])): of_free[k] for k in np.flatnonzero(of_free < 0.3)}
    assert_similar(mapper, pairs)
    assert_similar(em, pairs)


def test_real_exact_matches_and_prefixes(real_pair):
    teacher, student = real_pair
    em, prefixem = build("em", teacher, student), build("prefixem", teacher, student)
    first = {}
    for u in sorted(range(len(student)), key=lambda u: oracle.preference(student, u)):
        if not student.is_special[u]:
            first.setdefault(student.forms[u], u)
    for v in np.flatnonzero(~teacher.is_special).tolist():
        form = teacher.forms[v]
        assert em.to_student.static[v] == first.get(form, -1)
        starts = [form[:length] for length in range(len(form), 0, -1) if form[:length] in first]
        assert prefixem.to_student.static[v] == (first[starts[0]] if starts else -1)


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
        teacher_group, student_group = byte_groups(t.byte_ends, s.byte_ends)
        vs = t.input_ids[t.response_start :][one_to_one_tokens(student_group, teacher_group)]
        us = s.input_ids[s.response_start :][one_to_one_tokens(teacher_group, student_group)]
        together += zip(vs.tolist(), us.tolist())
    together = [(v, u) for v, u in together if teacher.forms.forms[v] == student.forms.forms[u]]
    assert len(together) > 0.4 * sum(len(s.byte_ends) for s in student_rows)
    v, u = np.array(together).T
    assert np.array_equal(to_student[v], u) and np.array_equal(to_teacher[u], v)


# ---------------------------------------------------------------- the rules, by hand


@pytest.mark.parametrize(
    ("teacher", "student", "to_student", "to_teacher"),
    [
        pytest.param(make(["a", "b"]), make(["b", "a"]), [1, 0], [1, 0], id="token 0 like any other"),
        pytest.param(make(["a"]), make(["b"]), [-1], [-1], id="nothing"),
        pytest.param(
            make([" x", "_x", "\t", "\n"]),
            make(["\n", "_x", "x", "\t", " x"]),
            *([4, 1, 3, 0], [3, 1, -1, 2, 0]),
            id="white space differs",
        ),
        pytest.param(
            make(["x", "ab", "ab"]), make(["ab", "y", "ab"]), [-1, 0, 0], [1, -1, 1], id="of equal forms the lowest id"
        ),
        pytest.param(  # the student's own `</s>` loses to the role
            make(["</s>", "<s>", "a"], special=[0, 1], roles={"eos": 0, "bos": 1}),
            make(["a", "<s>", "</s>", "<end>"], special=[1, 2, 3], roles={"eos": 3, "bos": 1}),
            *([3, 1, 0], [2, 1, -1, 0]),
            id="roles whatever their text",
        ),
        pytest.param(
            make(["<end>", "<begin>"], special=[0, 1], roles={"eos": 0, "bos": 0, "pad": 0, "unk": 1}),
            make(["<s>", "</s>", "<pad>", "<unk>"], range(4), {"eos": 1, "bos": 0, "pad": 2, "unk": 3}),
            *([1, 3], [-1, 0, -1, 1]),
            id="an earlier role keeps its token",
        ),
    ],
)
def test_exact_matches(teacher, student, to_student, to_teacher):
    mapper = build("em", teacher, student)
    assert static_maps(mapper) == (to_student, to_teacher)
    assert not len(mapper.to_student.indices)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_byte_fallback_token_comes_behind_every_other_of_its_form(kind):
    teacher = make(["0", "\n", "0", "0x", " 0"], byte_fallback=[0, 1])
    student = make(["\n", "0", "0", "0"], byte_fallback=[0, 1])
    beginning, similar = {"em": (-1, -1), "mined": (2, 2), "prefixem": (2, -1)}[kind]
    expected = [2, 0, 2, beginning, similar], [1, 2, 2, 2]
    assert static_maps(build(kind, teacher, student)) == expected


def test_of_equally_near_tokens_the_byte_fallback_one_comes_last():
    teacher, student = make(["c"]), make(["a", "b"], byte_fallback=[0])
    assert build("mined", teacher, student).to_student.static.tolist() == [1]
    assert build("mined", student, teacher).to_teacher.static.tolist() == [1]
    # It comes behind all other ties: it wins by a longer common prefix.
    assert build("mined", make(["ab"]), student).to_student.static.tolist() == [0]


def test_special_tokens_match_only_special_tokens_and_are_never_near():
    teacher = make(["<sep>", "<pad>", "<mask>", "abc"], special=[0, 1, 2])
    student = make(["<sep>", "<pad>", "<masc>", "<", "abd"], special=[1, 2, 4])
    for kind, nearest in (("em", -1), ("mined", 3), ("prefixem", -1)):  # not the special `abd`
        mapper = build(kind, teacher, student)
        assert mapper.to_student.static.tolist() == [-1, 1, -1, nearest]
        assert len(mapper.to_student.indices) == 0


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
    assert build("mined", make([teacher_token]), make(student_tokens)).to_student.static.tolist() == [chosen]


def test_mined_inverse():
    mapper = build("mined", make(["abx", "ab", "xx", "abcq", "abcr", "abcd"]), make(["ab", "abcd", "abcz"]))
    # Exact matches beat nearer ids; `abcz` is nobody's.
    assert static_maps(mapper) == ([0, 0, 0, 1, 1, 1], [1, 5, -1])
    without_exact = build("mined", make(["abxy", "abx", "aby"]), make(["ab"]))
    assert without_exact.to_teacher.static.tolist() == [1]  # distance 1 beats 2, then the lower id


def test_prefixem_takes_the_longest_proper_prefix_in_bytes():
    mapper = build("prefixem", make(["abcd", "ab", "é", "zz", "ab!"]), make(["a", "abc", "abcde", b"\xc3", "ab", "ab"]))
    assert static_maps(mapper) == ([1, 4, 3, -1, 4], [-1, 0, -1, 2, 1, 1])


def test_similar_tokens_by_hand():
    teacher = make(["hello", " ", "same", "hallo!"])
    student = make(["same", "hallo", " hello ", "  ", "hullo"])
    mapper = build("em", teacher, student)
    tenth, eleventh = float(np.float32(1 / 10)), float(np.float32(1 / 11))
    assert rows(mapper.to_student) == [
        [(2, 0.0), (1, tenth), (4, tenth)],
        [(3, 0.0)],  # both empty without their spaces
        [],  # has an exact match
        [(1, eleventh), (2, float(np.float32(2 / 11))), (4, float(np.float32(2 / 11)))],
    ]
    assert rows(mapper.to_teacher)[1] == [(3, eleventh), (0, tenth)]


def test_the_threshold_is_exclusive():
    teacher, student = make(["abcde"]), make(["abxyz"])  # 3 / 10
    for threshold, found in ((0.3, 0), (0.3001, 1)):
        assert len(build("em", teacher, student, threshold).to_student.indices) == found


# ---------------------------------------------------------------- files

TEACHER = make(["a", " hello", "</s>", "world", "zzz"], special=[2], roles={"eos": 2}, name="the/teacher")
STUDENT = make(["a", "hello", "<end>", "worlds"], special=[2], roles={"eos": 2}, name="the/student")


def assert_equal(one: VocabMapper, other: VocabMapper) -> None:
    for name in ("kind", "threshold", "teacher", "student"):
        assert getattr(one, name) == getattr(other, name)
    for direction in ("to_student", "to_teacher"):
        for part, array in vars(getattr(one, direction)).items():
            loaded = getattr(getattr(other, direction), part)
            assert array.dtype == loaded.dtype and np.array_equal(array, loaded)


def command_for(output: Path, script: str = "get_em_mapper.py") -> str:
    sides = "--teacher the/teacher --student the/student"
    return f"python get_vocab_mapper/{script} {sides} --output {shlex.quote(str(output))}"


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "mapper.safetensors"
    save_mapper(build("mined", TEACHER, STUDENT, 0.35), path)
    return path


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_saved_mapper_is_loaded_unchanged(kind, tmp_path):
    mapper = build(kind, TEACHER, STUDENT, 0.35)
    path = tmp_path / "mapper.safetensors"
    save_mapper(mapper, path)
    save_mapper(mapper, path)  # over itself
    assert os.listdir(tmp_path) == ["mapper.safetensors"]
    assert_equal(mapper, read_mapper(path))
    assert_equal(mapper, load_mapper(path, TEACHER, STUDENT, 0.35))


def test_the_arrays_names_in_the_file(saved):
    """They are part of the format."""
    mapper, arrays = read_mapper(saved), safetensors.numpy.load_file(saved)
    for direction, static, table in (
        (mapper.to_student, "teacher_to_student", "similar_to_student"),
        (mapper.to_teacher, "student_to_teacher", "similar_to_teacher"),
    ):
        assert np.array_equal(arrays.pop(static), direction.static)
        for part in ("indptr", "indices", "distances"):
            assert np.array_equal(arrays.pop(f"{table}.{part}"), getattr(direction, part))
    assert not arrays


def test_other_tokenizers_are_refused(saved):
    other = make([*TEACHER.texts[:-1], "yyy"], special=[2], name="another/teacher")
    built_for = r"mapper\.safetensors was built for .*'the/teacher' \(5 tokens\).*'the/student' \(4 tokens\).*"
    anew = r"get_MinED_mapper\.py --teacher {} --student {} --output NEW\.safetensors --simi_threshold 0\.35$"
    for teacher, student, wrong in (
        (other, STUDENT, r"the teacher is 'another/teacher' \(5 tokens\), whose tokens differ\. "),
        (TEACHER, TEACHER, r"the student is 'the/teacher' \(5 tokens\), whose tokens differ\. "),
        (other, other, "the teacher is 'another/teacher'.* differ, the student is 'another/teacher'.* differ"),
        (STUDENT, TEACHER, "have changed places here. Exchange the two models"),
    ):
        message = f"{built_for}{wrong}.*{anew.format(teacher.name, student.name)}"
        with pytest.raises(ValueError, match=message):
            load_mapper(saved, teacher, student)
    renamed = TokenForms("elsewhere", TEACHER.forms, TEACHER.is_special, TEACHER.is_byte_fallback, {})
    load_mapper(saved, renamed, STUDENT)  # the same tokens under another name are the same tokenizer


def test_a_missing_file_is_named_with_the_command_that_builds_it(tmp_path):
    for name in ("no file.safetensors", "no file.json"):
        (tmp_path / f"folder of {name}").mkdir()
        with pytest.raises(ValueError, match=f"folder of {name} is a folder.*python"):
            load_mapper(tmp_path / f"folder of {name}", TEACHER, STUDENT)
        with pytest.raises(FileNotFoundError) as caught:
            load_mapper(tmp_path / name, TEACHER, STUDENT)
        assert str(tmp_path / name) in str(caught.value)
        assert str(caught.value).endswith(command_for(tmp_path / "no file.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"get_MinED_mapper\.py"):
        load_mapper(tmp_path / "none", TEACHER, STUDENT, kind="mined")


def weights(path: Path) -> None:
    """A model's weights in bfloat16, which numpy does not know."""
    header = json.dumps({"model.embed": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.safetensors", weights, "no vocabulary mapper (its first tensor is 'model.embed"),
        ("other.safetensors", lambda p: safetensors.numpy.save_file({}, p), "no vocabulary mapper (it holds nothing"),
        ("notes.txt", lambda p: p.write_text("How to build a mapper: …\n" * 9), "no vocabulary mapper"),
        ("empty.safetensors", lambda p: p.touch(), "is damaged"),
        ("published.txt", lambda p: p.write_text('{"0": 1}'), "must have a name that ends in .json"),
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


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"mapper\.safetensors is damaged.*Build it again"):
        read_mapper(saved)


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(saved):
    """In the header and in the data; the only bytes that may change unseen are those that mean nothing."""
    mapper, content = read_mapper(saved), saved.read_bytes()
    unseen = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= (0x01, 0x10, 0x80)[place % 3]
        saved.write_bytes(damaged)
        try:
            loaded = read_mapper(saved)
        except ValueError as error:
            assert str(error).startswith(f"{saved} ") and "python get_vocab_mapper/" in str(error)
        else:
            assert_equal(mapper, loaded)
            unseen.append(content[place : place + 1])
    assert set(unseen) <= {b" "}  # the header's padding


def test_a_changed_array_is_noticed_where_every_value_could_be(saved):
    """A mapping to another token that exists: nothing but the checksum can tell."""
    changed = read_mapper(saved).to_student.static.copy()
    changed[0] = 3
    rewrite(saved, {"teacher_to_student": changed})
    with pytest.raises(ValueError, match=r"is damaged.*checksum"):
        read_mapper(saved)


def rewrite(path: Path, arrays=None, **metadata: str) -> None:
    """The same file with other arrays, or with other metadata and the checksum of these."""
    with safetensors.safe_open(path, framework="numpy") as file:
        new_metadata = file.metadata() | metadata
    new_arrays = safetensors.numpy.load_file(path) | (arrays or {})
    if arrays is None:
        del new_metadata["sha256"]
        new_metadata["sha256"] = _digest(new_metadata, new_arrays)
    safetensors.numpy.save_file(new_arrays, path, new_metadata)


READS = f"and this code reads {FORMAT_VERSION}"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "weights"}, "no vocabulary mapper"),
        ({"format_version": "99"}, f"version '99', {READS}. Update the code, or build it again: python"),
        ({"format_version": "2"}, f"version '2', {READS}. Build it again: python .*_threshold 0.35$"),
        ({"format_version": "new"}, f"version 'new', {READS}. Build it again: python"),
        ({"kind": "magic"}, "unknown kind 'magic'"),
        ({"threshold": "high"}, "damaged"),
        ({"threshold": "7"}, "between 0 and 1"),
        ({"threshold": "nan"}, "between 0 and 1"),
        ({"teacher": "{}"}, "damaged"),
        ({"teacher": "[1]"}, "damaged"),
    ],
)
def test_wrong_metadata_are_refused(saved, metadata, message):
    rewrite(saved, **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        read_mapper(saved)
    assert str(saved) in str(caught.value)


def test_a_smaller_threshold_filters_and_a_larger_one_is_refused(saved):
    full = read_mapper(saved)
    for threshold in (0.0, 0.05, 1 / 11, 0.2, 0.35):
        expected = build("mined", TEACHER, STUDENT, threshold)
        assert_equal(full.with_threshold(threshold), expected)
        assert_equal(load_mapper(saved, TEACHER, STUDENT, threshold), expected)
    with pytest.raises(ValueError, match=r"below 0\.35 only.*--simi_threshold 0\.5.* Give 0\.35 or less") as caught:
        load_mapper(saved, TEACHER, STUDENT, 0.5)
    assert str(caught.value).startswith(f"{saved} ")
    assert str(caught.value).endswith(f"{command_for(saved, 'get_MinED_mapper.py')} --simi_threshold 0.5")
    with pytest.raises(ValueError, match=r"below 0\.35 only.*0\.5"):
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
    export_json(mapper, path)
    assert json.loads(path.read_text()) == {"0": 1, "1": 0, "2": 2, "3": 0, "4": 0}
    with pytest.warns(UserWarning, match=r"published\.json does not say"):
        loaded = load_mapper(path, teacher, student, progress=False)
    assert loaded.kind == "published"
    assert static_maps(loaded) == ([1, -1, 2, -1, -1], [-1, 0, 2, -1])  # student id 0 cannot be said
    assert rows(loaded.to_student) == rows(mapper.to_student)
    assert rows(loaded.to_teacher) == rows(mapper.to_teacher)


def test_a_published_file_may_leave_ids_out_and_map_many_to_one(tmp_path):
    path = tmp_path / "published.json"
    path.write_text('{"0": 1, "1": 1, "3": 3, "4": 3}')
    teacher = make(["bxx", "bx", "c", "worldly", "world"])
    with pytest.warns(UserWarning, match=r"leaves out 1 of the 5 teacher ids, the first of them 2;"):
        mapper = load_mapper(path, teacher, make(["a", "b", "c", "world"]), progress=False)
    assert static_maps(mapper) == ([1, 1, -1, 3, 3], [-1, 1, -1, 4])


NO_PAIR = ("[1]", '{"1": 2}', "true", "null", "NaN", "1.0", '"1"', "4", "-1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        (b"\xff\xfe\xfa", "no valid JSON"),
        (f'{{"0": {"9" * 5000}}}', "no valid JSON"),
        ('{"0": 1, "1": 2, "0": 3}', "no valid JSON .*the key '0' stands there 2 times"),
        ("[1, 2]", "holds a JSON list"),
        ("7", "holds a JSON int"),
        *((f'{{"{key}": 1}}', f"'{key}': 1 is no pair of ids") for key in ("a", "5", "-1", "1.0", "01", "٣", "")),
        (f'{{"{"9" * 5000}": 1}}', ": 1 is no pair of ids"),
        *((f'{{"0": {value}}}', "'0': .* is no pair of ids of 'the/teacher' .5 tokens.") for value in NO_PAIR),
        ("{}", "maps no token of 'the/teacher' .5 tokens. and 'the/student' .4 tokens.: all of its 0 entries are 0"),
        ('{"0": 0, "1": 0}', "all of its 2 entries are 0"),
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
    text = report(build("mined", TEACHER, STUDENT, 0.35), TEACHER, STUDENT)
    assert "teacher the/teacher: 5 tokens\n  exact match: 2\n  mapped: 5 (100.0 %)" in text
    assert "0 'a' -> 0 'a'" in text
    assert "1 ' hello' -> 1 'hello'  (edit distance 1)" in text
    assert "3 'world' -> 3 'worlds'  (distance 0.091, of 1)" in text


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    sentencepiece_bpe().save_pretrained(folder / "teacher")
    byte_level_bpe().save_pretrained(folder / "student")
    return folder / "teacher", folder / "student"


@pytest.fixture
def build_here(small_pair, monkeypatch, capsys):
    """Runs a builder script in this process; gives `(exit status, stdout, stderr)`."""

    def build_here(*arguments: str, script: str = "get_em_mapper.py"):
        sides = ("--teacher", str(small_pair[0]), "--student", str(small_pair[1]))
        monkeypatch.setattr(sys, "argv", [script, *sides, *arguments])
        status = 0
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return build_here


@pytest.mark.parametrize(
    ("script", "kind"),
    [("get_em_mapper.py", "em"), ("get_MinED_mapper.py", "mined"), ("get_prefixEM_mapper.py", "prefixem")],
)
def test_a_script_builds_its_mapper(script, kind, build_here, tmp_path):
    output, exported = tmp_path / "new folder" / "mapper.safetensors", tmp_path / "other" / "mapper.json"
    flags = ("--output", str(output), "--simi_threshold", "0.25", "--export_json", str(exported))
    status, said, message = build_here(*flags, script=script)
    assert status == 0, message
    assert "exact match: " in said
    forms = token_forms(sentencepiece_bpe()), token_forms(byte_level_bpe())
    loaded, expected = load_mapper(output, *forms, 0.25), build(kind, *forms, 0.25)
    assert (loaded.kind, loaded.threshold) == (kind, 0.25)
    assert static_maps(loaded) == static_maps(expected)
    assert rows(loaded.to_student) == rows(expected.to_student)
    assert len(json.loads(exported.read_text())) == len(forms[0])


def test_a_script_runs_by_its_path_in_any_folder(small_pair, tmp_path):
    sides = ("--teacher", str(small_pair[0]), "--student", str(small_pair[1]))
    command = [sys.executable, str(SCRIPTS / "get_em_mapper.py"), *sides, "--output", "mapper.safetensors"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_mapper(tmp_path / "mapper.safetensors").kind == "em"


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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--simi_threshold" in done.stdout


@pytest.mark.parametrize("folder", ["missing", "empty"])
@pytest.mark.parametrize("flag", ["--teacher", "--student"])
def test_a_bad_folder_is_named_with_its_flag(flag, folder, build_here, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, message = build_here(flag, str(tmp_path / folder), "--output", str(tmp_path / "m.safetensors"))
    assert status == 2
    assert f"{flag}: no tokenizer could be loaded from '{tmp_path / folder}'" in message
    assert not (tmp_path / "m.safetensors").exists()


def test_an_older_file_is_replaced_and_that_is_said(build_here, tmp_path):
    output, exported = tmp_path / "new" / "m.safetensors", tmp_path / "m.json"
    arguments = ("--output", str(output), "--export_json", str(exported))
    _, said, _ = build_here(*arguments)
    assert f"written: {output}\n" in said and f"written: {exported}\n" in said
    output.write_text("something else")
    status, said, _ = build_here(*arguments)
    assert status == 0 and f"written, in the place of an older file: {output}\n" in said
    assert read_mapper(output).kind == "em" and os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("flag", ["--output", "--export_json"])
def test_where_no_file_can_be_written_nothing_is_built(build_here, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("get_vocab_mapper.builders.BUILDERS", {})
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "file" / "m", "no file can be written there: "),
        (tmp_path / "file" / "deeper" / "m", "no file can be written there: Not a directory"),
        (tmp_path / "folder", "this is a folder"),
        (Path("/proc/m"), "no file can be written there: "),
    ):
        other = () if flag == "--output" else ("--output", str(tmp_path / "m"))
        status, said, message_given = build_here(flag, str(path), *other)
        assert (status, said) == (2, "")
        assert message_given.startswith(f"get_em_mapper.py: error: {flag} {path}: {message}")
        assert message_given.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--simi_threshold", "nan"), "--simi_threadshold: must be a number between 0 and 1, and is nan"),
        (("--simi_threshold", "high"), "must be a number between 0 and 1, and is high"),
        (("--simi_threshold", "-0.1"), "must be a number between 0 and 1, and is -0.1"),
        (("--simi_threshold", "1.5"), "must be a number between 0 and 1, and is 1.5"),
        (("--simi", "0.2"), "unrecognized arguments: --simi 0.2"),  # no abbreviations: a new flag could change theirs
        (("--trust_remote_code", "maybe"), "--trust_remote_code: must be true or false"),
        (("--output", "m.json"), "--export_json"),
    ],
)
def test_bad_flags_are_refused(build_here, tmp_path, arguments, message):
    status, _, said = build_here("--output", str(tmp_path / "m"), *arguments)
    assert status == 2 and message in said
    assert not os.listdir(tmp_path)
