"""Random tokenizers of all four styles and in mixed pairs, through everything from a text to the loss, against oracles.

The suite runs CASES cases, the same ones every time. Any other number, on new random cases:

    CDM_RIG_CASES=20000 python -m pytest tests/unit/test_rigs.py --timeout 0 --hypothesis-seed 1

A failing case is shrunk to a small one and printed, tokenizers and texts included.
"""

import os
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from get_vocab_mapper.builders import build_em, build_mined, build_prefixem
from get_vocab_mapper.mapper import Direction, VocabMapper
from get_vocab_mapper.mapper_file import read_mapper, save_mapper
from get_vocab_mapper.token_forms import token_forms
from modeling.losses.alignment import entropy_dtw, entropy_weights
from modeling.losses.logits import ChunkedLogits, entropy
from modeling.models.output_head import OutputHead
from modeling.run_clm_distill_CDM import cdm_losses
from modeling.text.alignment import aligned_tokens, byte_groups, dtw_groups, one_to_one_tokens
from modeling.text.batch import Batch, ResponseCollator
from modeling.text.encoder import Encoder, encode_pair, prepare_example
from tests.reference import cdm_oracle, vocab_mapper_oracle
from tests.unit.helpers import taken_of
from tests.unit.random_tokenizers import texts, tokenizers, words

CASES = int(os.environ.get("CDM_RIG_CASES", "600"))
BUILD = {"em": build_em, "mined": build_mined, "prefixem": build_prefixem}


def cases(share: float):
    """A hypothesis test of that share of CASES."""
    return settings(
        max_examples=round(share * CASES),
        derandomize="CDM_RIG_CASES" not in os.environ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


@st.composite
def pairs(draw):
    """`(student, teacher, words)`: two random tokenizers, seldom the same one twice, trained on the same words."""
    known = draw(words)
    student = draw(tokenizers(known))
    teacher = student if draw(st.integers(0, 9)) == 0 else draw(tokenizers(known))
    event(" and ".join(sorted((student.style, teacher.style))))
    return student, teacher, known


@st.composite
def batches(draw, n: int = 1, max_pieces: int = 8):
    """`(student, teacher, examples)` of a random pair: prepared rows, each with a response token on both sides."""
    student, teacher, known = draw(pairs())
    encoders = [Encoder(student.tokenizer), Encoder(teacher.tokenizer)]
    examples = []
    for number in range(1, n + 1):
        row = {"row": number, "prefix": draw(texts(known, 3)), "text": draw(texts(known, max_pieces, min_pieces=1))}
        prepared = prepare_example(row, encoders, draw(st.sampled_from([1000, 1000, 12])))
        if len(prepared["byte_ends"]):
            examples.append(prepared)
    assume(examples)
    return *encoders, examples


def n_bytes(text: str) -> int:
    return len(text.encode())


# ---------------------------------------------------------------------------------------------- forms and examples


@cases(0.1)
@given(data=st.data())
def test_forms_are_what_the_decoder_makes_of_tokens(data):
    """Of any ids in any order, so also of tokens that no text gives; WordPiece's decoder cleans up, and is left out."""
    known = data.draw(words)
    made = data.draw(tokenizers(known, ("byte-level-bpe", "sentencepiece-bpe", "unigram")))
    backend, forms = made.tokenizer.backend_tokenizer, token_forms(made.tokenizer)
    added = backend.get_added_tokens_decoder()
    for i, token in added.items():
        if token.special:
            assert forms.is_special[i] and forms.forms[i] == token.content.encode()
    own = [i for i in range(len(forms)) if i not in added and backend.id_to_token(i) is not None]
    ids = data.draw(st.lists(st.sampled_from(own), max_size=12))
    joined = b"".join(forms.forms[i] for i in ids)
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return  # what the decoder writes for bytes that are no text is its own affair
    if made.style != "byte-level-bpe":
        text = text.removeprefix(" ")
    assert backend.decoder.decode([backend.id_to_token(i) for i in ids]) == text


@cases(0.2)
@given(data=st.data())
def test_encoding_any_text(data):
    known = data.draw(words)
    made = data.draw(tokenizers(known))
    prefix, text = data.draw(texts(known, 4)), data.draw(texts(known))
    encoder = Encoder(made.tokenizer)
    encoded = encoder.encode(prefix, text)
    ids, start, ends = encoded.input_ids, encoded.response_start, encoded.byte_ends
    assert start >= 1 and len(ends) == len(ids) - start
    assert ids[-1] == encoder.eos_id
    assert (ends > 0).all() and (np.diff(ends) >= 0).all()
    if start < len(ids):
        assert ends[-1] == n_bytes(text) + 1

    plain = made.tokenizer(prefix + text, add_special_tokens=False)["input_ids"]
    # What the tokenizer's template puts in front of a text is kept, and EOS stands behind it: twice only where the
    # first is the prefix's.
    front = [made.tokenizer.bos_token_id] * (made.tokenizer.bos_token is not None) if plain else []
    front *= made.options["template"] != "none"
    behind = [encoder.eos_id] * (len(ids) - len(front + plain))
    assert ids.tolist() == front + plain + behind
    if behind and plain and plain[-1] == encoder.eos_id:
        assert len(behind) == len(ends) == 1

    # Where the tokens' forms are the text, behind a space at most, each token ends where its bytes do.
    joined, whole = b"".join(encoder.forms.forms[i] for i in plain), (prefix + text).encode()
    gives_back = joined in (whole, b" " + whole)
    assert gives_back or not made.keeps(prefix + text)
    if gives_back:
        event("gives the text back")
        until = np.cumsum([encoder.forms.lengths[i] for i in plain + behind]) - (len(joined) - len(whole))
        expected = [end - n_bytes(prefix) for end in until[:-1]] + [n_bytes(text) + 1]
        kept = [i for i, end in enumerate(expected) if end > 0 and i + len(front) > 0]
        assert ends.tolist() == [expected[i] for i in kept]
        assert not kept or encoded.byte_start == (expected[kept[0] - 1] if kept[0] else -n_bytes(prefix))
    # Elsewhere: after its first character begins, and before the next token's does or its own last one ends. What lies
    # between two tokens belongs to the second from the first white space on (of which there are tokens).
    if not gives_back and (made.style != "byte-level-bpe" or made.options["complete"]):
        offsets = made.tokenizer(prefix + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        following = [*(first for first, _ in offsets[1:]), len(prefix + text)]
        if not made.options["trim"]:  # whose offsets do not show the white space at a token's ends
            held = {character for form in encoder.forms.texts for character in form if character.isspace()}
            spaces = {i for i, character in enumerate(prefix + text) if character in held}
            lasts = (last for _, last in offsets)
            following = [min({after} | {i for i in spaces if i >= last}) for last, after in zip(lasts, following)]
        spans = [(first, max(last, after)) for (first, last), after in zip(offsets, following)]
        for span, end in zip(spans[len(plain + behind) - len(ends) :], ends):
            low, high = (n_bytes((prefix + text)[:border]) - n_bytes(prefix) for border in span)
            assert low <= end <= high or end == n_bytes(text) + 1


def longest_that_fits(encoders, prefix: str, text: str, block_size: int):
    """Every cut tried, the longest first: `(cut text, Encoded of each side)`."""
    for cut in range(len(text), 0, -1):
        encoded = [encoder.encode(prefix, text[:cut], eos=False) for encoder in encoders]
        if all(len(e.input_ids) <= block_size for e in encoded):
            return text[:cut], encoded
    return "", None


@cases(0.2)
@given(data=st.data())
def test_an_example_is_cut_to_the_longest_beginning_that_fits(data):
    student, teacher, known = data.draw(pairs())
    encoders = [Encoder(student.tokenizer), Encoder(teacher.tokenizer)]
    prefix, text = data.draw(texts(known, 2)), data.draw(texts(known, 20, min_pieces=2))
    whole = [encoder.encode(prefix, text) for encoder in encoders]
    lengths = [len(e.input_ids) for e in whole]
    block_size = data.draw(st.integers(min(max(e.response_start for e in whole), max(lengths)), max(lengths) + 1))
    encoded = encode_pair(encoders, prefix, text, block_size)

    expected, kept = whole, text
    if any(len(e.input_ids) > block_size for e in whole):
        kept, expected = longest_that_fits(encoders, prefix, text, block_size)
        event("cut")
    if not text or expected is None or any(len(e.input_ids) <= e.response_start for e in expected):
        event("left out")
        assert encoded is None
        return
    for side, want, made in zip(encoded, expected, (student, teacher)):
        assert side.input_ids.tolist() == want.input_ids.tolist() and len(side.input_ids) <= block_size
        assert side.response_start == want.response_start and side.byte_ends.tolist() == want.byte_ends.tolist()
        if expected is not whole and made.keeps(prefix + kept):
            assert side.byte_ends[-1] == n_bytes(kept)  # the same text on both sides


# ------------------------------------------------------------------------------------------------------- alignment


def group_numbers(groups) -> tuple[list[int], list[int]]:
    """The oracle's [(teacher positions, student positions)] as one number a token."""
    return tuple([g for g, group in enumerate(groups) for _ in group[side]] for side in (0, 1))


def distances(student: Encoder, teacher: Encoder, batch: Batch) -> list[list[list[int]]]:
    """Of each example: every teacher token's from every student token of the response, in plain Python."""

    def distance(t: int, s: int) -> int:
        if t == teacher.eos_id and s == student.eos_id:
            return 0
        return cdm_oracle.levenshtein(*map(cdm_oracle.without_spaces, (teacher.forms.texts[t], student.forms.texts[s])))

    sides = (side.labels.split(side.lengths) for side in (batch.teacher, batch.student))
    return [[[distance(t, s) for s in student] for t in teacher] for teacher, student in zip(*map(as_lists, sides))]


def as_lists(tensors):
    return [tensor.tolist() for tensor in tensors]


def bytes_of(ends: np.ndarray, group: np.ndarray, g: int) -> set[int]:
    """The bytes that group g covers on one side."""
    starts = [0, *ends[:-1].tolist()]
    return {b for start, end, h in zip(starts, ends.tolist(), group) if h == g for b in range(start, end)}


def check_statistics(teacher_ends, student_ends, teacher_group, student_group) -> None:
    """Groups cover both sides once and in order; what is counted about them, by sets of bytes."""
    for group, ends in ((teacher_group, teacher_ends), (student_group, student_ends)):
        assert group.dtype == np.int32 and len(group) == len(ends)
        assert [g for g, _ in groupby(group)] == list(range(max(student_group) + 1))
    flags = aligned_tokens(teacher_ends, student_ends, teacher_group, student_group)
    alone = one_to_one_tokens(teacher_group, student_group)
    for j, g in enumerate(student_group):
        teacher_bytes = bytes_of(teacher_ends, teacher_group, g)
        student_bytes = bytes_of(student_ends, student_group, g)
        if teacher_bytes or student_bytes:
            assert flags[j] == (teacher_bytes == student_bytes)
        assert alone[j] == ((teacher_group == g).sum() == (student_group == g).sum() == 1)


@cases(0.15)
@given(case=batches())
def test_byte_alignment(case):
    student, teacher, examples = case
    batch = ResponseCollator(student, teacher, "byte")(examples)
    ends = *batch.teacher.byte_ends, *batch.student.byte_ends
    borders = sorted(set(ends[0].tolist()) & set(ends[1].tolist()))
    expected = [
        [next((g for g, border in enumerate(borders) if end <= border), max(len(borders) - 1, 0)) for end in side]
        for side in ends
    ]
    groups = byte_groups(*ends)
    assert as_lists(groups) == as_lists((batch.groups.teacher.group, batch.groups.student.group)) == expected
    check_statistics(*ends, *groups)
    if ends[0][-1] == ends[1][-1]:
        assert aligned_tokens(*ends, *groups).all()


@cases(0.15)
@given(case=batches(), seed=st.integers(0, 10**6))
def test_dynamic_time_warping(case, seed):
    student, teacher, examples = case
    batch = ResponseCollator(student, teacher, "entropy_dtw")(examples)
    (table,), (d,) = distances(student, teacher, batch), batch.token_distances
    assert d.table[np.ix_(d.teacher_index, d.student_index)].tolist() == table
    random = np.random.default_rng(seed)
    teacher_weights, student_weights = random.integers(3, 6, len(table)), random.integers(3, 6, len(table[0]))
    path = cdm_oracle.dtw_path((np.array(table) * teacher_weights[:, None] * student_weights).tolist())
    groups = dtw_groups(d.table, d.teacher_index, d.student_index, teacher_weights, student_weights)
    assert tuple(as_lists(groups)) == group_numbers(cdm_oracle.cut_at_diagonals(path))
    check_statistics(*batch.teacher.byte_ends, *batch.student.byte_ends, *groups)


# -------------------------------------------------------------------------------------------------------- mappers


def assert_table(way: Direction, rows: list[list[tuple[float, int]]]) -> None:
    found = [list(zip(*(part.tolist() for part in way.row(i)[::-1]))) for i in range(len(way.static))]
    assert found == [[(float(np.float32(d)), i) for d, i in sorted(row)] for row in rows]


@cases(0.1)
@given(pair=pairs(), threshold=st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0]), lower=st.sampled_from([0.1, 0.25, 0.3]))
def test_mappers(pair, threshold, lower, tmp_path_factory):
    student, teacher = (token_forms(made.tokenizer) for made in pair[:2])
    similar = vocab_mapper_oracle.similar(teacher, student, threshold, Levenshtein.distance)
    file = tmp_path_factory.getbasetemp() / "mapper.safetensors"
    for kind, build in BUILD.items():
        mapper = build(teacher, student, threshold=threshold, progress=False)
        static = vocab_mapper_oracle.static_map(kind, teacher, student, Levenshtein.distance)
        check_mapper(mapper, static, similar)
        check_inverse(mapper, teacher, student)
        save_mapper(mapper, file)
        loaded = read_mapper(file, teacher, student)
        assert (loaded.kind, loaded.threshold) == (kind, threshold)
        if lower <= threshold:
            loaded, similar_now = loaded.with_threshold(lower), {pair: d for pair, d in similar.items() if d < lower}
        else:
            similar_now = similar
        check_mapper(loaded, static, similar_now)


def check_mapper(mapper: VocabMapper, static: tuple[list[int], list[int]], similar: dict) -> None:
    for place, (way, expected) in enumerate(zip((mapper.to_student, mapper.to_teacher), static)):
        assert way.static.tolist() == expected
        rows = [[] for _ in expected]
        for pair, d in similar.items():
            rows[pair[place]].append((d, pair[1 - place]))
        assert_table(way, rows)


def check_inverse(mapper: VocabMapper, teacher, student) -> None:
    """A student token's teacher token maps back to it, or to another of the same text."""
    for u, v in enumerate(mapper.to_teacher.static.tolist()):
        if v >= 0:
            back = mapper.to_student.static[v]
            assert back == u or student.forms[back] == student.forms[u]


# ------------------------------------------------------------------------------------------------------- the loss


def oracle_side(way: Direction, own: str, other: str, ids: list[int], logits: torch.Tensor):
    """One side for the oracle, which knows tokens by name: here their side and id, since forms may be equal."""
    names = [f"{own}{v}" for v in range(len(way.static))]
    return cdm_oracle.Side(
        vocabulary=names,
        tokens=ids,
        logits=logits.double(),
        match={name: f"{other}{u}" for name, u in zip(names, way.static.tolist()) if u >= 0},
        similar={
            name: {f"{other}{u}": d for u, d in zip(*(part.tolist() for part in way.row(v)))}
            for v, name in enumerate(names)
        },
    )


def slow_alignment(table: list[list[int]], teacher: torch.Tensor, student: torch.Tensor):
    entropies = cdm_oracle.entropies(teacher), cdm_oracle.entropies(student)
    weights = [cdm_oracle.weights(values) for values in entropies]
    for values, side_weights, logits in zip(entropies, weights, (teacher, student)):
        fast = entropy_weights(entropy(logits), torch.zeros(len(values), dtype=torch.int64), 1).tolist()
        for value, slow_weight, fast_weight in zip(values, side_weights, fast):
            if slow_weight != fast_weight:  # an entropy on the very border of two weights
                low, high = min(values), max(values)
                exact = 3 / (1 + np.exp(2 - 4 * (value - low) / (high - low))) + 3
                assert abs(exact - round(exact)) < 1e-4
                assume(False)
    cost = [[d * a * b for d, b in zip(row, weights[1])] for row, a in zip(table, weights[0])]
    return cdm_oracle.cut_at_diagonals(cdm_oracle.dtw_path(cost))


def slow_byte_alignment(*ends: np.ndarray):
    ends = as_lists(ends)
    borders = sorted(set(ends[0]) & set(ends[1]))
    borders[-1:] = [max(ends[0][-1], ends[1][-1])]  # the last group holds what follows the last common end
    return [
        tuple([i for i, end in enumerate(side) if low < end <= high] for side in ends)
        for low, high in zip([0, *borders], borders)
    ]


def rounded_logits(random, n_rows: int, width: int, padding: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/32 that bfloat16 holds exactly: float32 and float64 see the same ties between means."""
    values = np.clip(np.round(32 * random.normal(0, 2, (n_rows, width + padding))), -255, 255) / 32
    return torch.from_numpy(values).to(dtype)[:, :width]


@cases(0.1)
@given(
    case=batches(n=2, max_pieces=4),
    seed=st.integers(0, 10**6),
    topk=st.sampled_from([1, 5, 5, 20, 20, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    alignment=st.sampled_from(["entropy_dtw", "entropy_dtw", "byte"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    kind=st.sampled_from(sorted(BUILD)),
    threshold=st.sampled_from([0.3, 0.6, 0.6]),
    padding=st.sampled_from([0, 7]),
    chunk=st.sampled_from([None, None, 3]),
)
def test_the_whole_loss(case, seed, topk, temperature, alignment, dtype, kind, threshold, padding, chunk):
    """CDM from two texts to the gradient."""
    student_encoder, teacher_encoder, examples = case
    mapper = BUILD[kind](teacher_encoder.forms, student_encoder.forms, threshold=threshold, progress=False)
    batch, random = ResponseCollator(student_encoder, teacher_encoder, alignment)(examples), np.random.default_rng(seed)
    teacher, student = (
        rounded_logits(random, len(side.labels), len(encoder.forms), padding, dtype)
        for side, encoder in ((batch.teacher, teacher_encoder), (batch.student, student_encoder))
    )
    groups = batch.groups or entropy_dtw(entropy(student), entropy(teacher), batch)
    taken, by_example = taken_of(teacher, student, groups, topk), []
    for z in (teacher, student), (batch.teacher.labels, batch.student.labels):
        by_example += [part.split(side.lengths) for part, side in zip(z, (batch.teacher, batch.student))]

    expected, numbers, n_groups = [], ([], []), 0
    for e, (t, s, teacher_ids, student_ids) in enumerate(zip(*by_example)):
        if alignment == "byte":
            slow = slow_byte_alignment(batch.teacher.byte_ends[e], batch.student.byte_ends[e])
        else:
            slow = slow_alignment(distances(student_encoder, teacher_encoder, batch)[e], t, s)
        for side, found in zip(numbers, group_numbers(slow)):
            side += [n_groups + g for g in found]
        n_groups += len(slow)
        sides = (
            oracle_side(mapper.to_student, "t", "s", teacher_ids.tolist(), t),
            oracle_side(mapper.to_teacher, "s", "t", student_ids.tolist(), s),
        )
        expected.append(cdm_oracle.cdm(*sides, topk, temperature, groups=slow, taken=taken))
    assert as_lists((groups.teacher.group, groups.student.group)) == list(numbers)

    leaf, given, n_tokens = student.requires_grad_(), (student, teacher), len(student)
    if chunk:
        given = [ChunkedLogits(z, OutputHead(torch.eye(z.shape[1], dtype=dtype)), z.shape[1], chunk) for z in given]
    losses = cdm_losses(*given, batch, mapper, topk, temperature)
    rows, labels = range(n_tokens), batch.student.labels
    ce = -leaf.detach().double().log_softmax(-1)[rows, labels]
    torch.testing.assert_close(losses.ce.double(), ce, rtol=1e-5, atol=1e-5)
    assert losses.kd_sum().item() == pytest.approx(sum(e.kd_sum for e in expected), rel=1e-5, abs=1e-5)
    means = {"one_to_one": (groups.one_to_one, n_tokens), "aligned": (groups.aligned, n_tokens)}
    for name in ("mapped_rate", "teacher_mass"):
        means[name] = pytest.approx((sum(sum(getattr(e, name)) for e in expected), n_groups), rel=1e-5, abs=1e-6)
    assert {name: (float(total), count) for name, (total, count) in losses.means.items()} == means

    wanted = torch.cat([e.gradient for e in expected]) + leaf.detach().double().softmax(-1)
    wanted[rows, labels] -= 1
    (gradient,) = torch.autograd.grad(losses.kd_sum() + losses.ce.sum(), leaf)
    assert gradient.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)
