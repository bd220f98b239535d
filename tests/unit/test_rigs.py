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

from get_vocab_mapper.token_forms import token_forms
from get_vocab_mapper.vocab_mapper import VocabMapper, build_em, build_mined, build_prefixem
from modeling.alignment import (
    aligned_tokens,
    byte_groups,
    concatenate_groups,
    dtw_groups,
    entropy,
    entropy_weights,
    one_to_one_tokens,
)
from modeling.contextual_mapping import contextual_kl, direction_maps
from modeling.examples import Encoder, ResponseCollator, encode_pair, prepare_example
from tests.reference import cdm_oracle, vocab_mapper_oracle
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
def responses(draw, n: int = 1, max_pieces: int = 8):
    """`(encoders, [(prepared row, Response), …])` of a random pair; each response has a token on both sides."""
    student, teacher, known = draw(pairs())
    encoders = [Encoder(student.tokenizer), Encoder(teacher.tokenizer)]
    rows = []
    for number in range(1, n + 1):
        row = {"row": number, "prefix": draw(texts(known, 3)), "text": draw(texts(known, max_pieces, min_pieces=1))}
        prepared = prepare_example(row, encoders, draw(st.sampled_from([1000, 1000, 12])))
        if len(prepared["ends"]):
            rows.append(prepared)
    assume(rows)
    return encoders, list(zip(rows, ResponseCollator(*encoders, edit_distances=True)(rows)["responses"]))


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
    ids, start, ends = encoded.input_ids, encoded.response_start, encoded.ends
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
        assert ends.tolist() == [end for place, end in enumerate(expected, len(front)) if end > 0 and place > 0]
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
        assert side.response_start == want.response_start and side.ends.tolist() == want.ends.tolist()
        if expected is not whole and made.keeps(prefix + kept):
            assert side.ends[-1] == n_bytes(kept)  # the same text on both sides


# ------------------------------------------------------------------------------------------------------- alignment


def group_numbers(groups) -> tuple[list[int], list[int]]:
    """The oracle's [(teacher positions, student positions)] as one number a token."""
    return tuple([g for g, group in enumerate(groups) for _ in group[side]] for side in (0, 1))


def distances(encoders, prepared: dict) -> list[list[int]]:
    """Of every teacher token from every student token of a response, in plain Python."""
    student, teacher = encoders
    sides = []
    for side in ("teacher_", ""):
        sides.append(prepared[f"{side}input_ids"][prepared[f"{side}response_start"] :].tolist())

    def distance(t: int, s: int) -> int:
        if t == teacher.eos_id and s == student.eos_id:
            return 0
        return cdm_oracle.levenshtein(*map(cdm_oracle.without_spaces, (teacher.forms.texts[t], student.forms.texts[s])))

    return [[distance(t, s) for s in sides[1]] for t in sides[0]]


def bytes_of(ends: np.ndarray, group: np.ndarray, g: int) -> set[int]:
    """The bytes that group g covers on one side."""
    starts = [0, *ends[:-1].tolist()]
    return {b for start, end, h in zip(starts, ends.tolist(), group) if h == g for b in range(start, end)}


def check_statistics(response, teacher_group, student_group) -> None:
    """Groups cover both sides once and in order; what is counted about them, by sets of bytes."""
    for group, ends in ((teacher_group, response.teacher_ends), (student_group, response.ends)):
        assert group.dtype == np.int32 and len(group) == len(ends)
        assert [g for g, _ in groupby(group)] == list(range(max(student_group) + 1))
    flags = aligned_tokens(response.teacher_ends, response.ends, teacher_group, student_group)
    alone = one_to_one_tokens(teacher_group, student_group)
    for j, g in enumerate(student_group):
        teacher_bytes = bytes_of(response.teacher_ends, teacher_group, g)
        student_bytes = bytes_of(response.ends, student_group, g)
        if teacher_bytes or student_bytes:
            assert flags[j] == (teacher_bytes == student_bytes)
        assert alone[j] == ((teacher_group == g).sum() == (student_group == g).sum() == 1)


@cases(0.15)
@given(case=responses())
def test_byte_alignment(case):
    _, [(_, response)] = case
    teacher_ends, student_ends = response.teacher_ends.tolist(), response.ends.tolist()
    borders = sorted(set(teacher_ends) & set(student_ends))
    expected = [
        [next((g for g, border in enumerate(borders) if end <= border), max(len(borders) - 1, 0)) for end in ends]
        for ends in (teacher_ends, student_ends)
    ]
    groups = byte_groups(response.teacher_ends, response.ends)
    assert [group.tolist() for group in groups] == expected
    check_statistics(response, *groups)
    if teacher_ends[-1] == student_ends[-1]:
        assert aligned_tokens(response.teacher_ends, response.ends, *groups).all()


@cases(0.15)
@given(case=responses(), seed=st.integers(0, 10**6))
def test_dynamic_time_warping(case, seed):
    encoders, [(prepared, response)] = case
    table = distances(encoders, prepared)
    assert response.distance[np.ix_(response.teacher_index, response.student_index)].tolist() == table
    random = np.random.default_rng(seed)
    teacher_weights, student_weights = random.integers(3, 6, len(table)), random.integers(3, 6, len(table[0]))
    cost = (np.array(table) * teacher_weights[:, None] * student_weights).tolist()
    path = cdm_oracle.dtw_path(cost)
    index = response.teacher_index, response.student_index
    teacher_group, student_group = dtw_groups(response.distance, *index, teacher_weights, student_weights)
    assert (teacher_group.tolist(), student_group.tolist()) == group_numbers(cdm_oracle.cut_at_diagonals(path))
    check_statistics(response, teacher_group, student_group)


# -------------------------------------------------------------------------------------------------------- mappers


def assert_table(table, rows: list[list[tuple[float, int]]]) -> None:
    found = [list(zip(*(part.tolist() for part in table.row(i)[::-1]))) for i in range(len(table.indptr) - 1)]
    assert found == [[(float(np.float32(d)), i) for d, i in sorted(row)] for row in rows]


@cases(0.1)
@given(pair=pairs(), threshold=st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0]), lower=st.sampled_from([0.1, 0.25, 0.3]))
def test_mappers(pair, threshold, lower, tmp_path_factory):
    student, teacher = (token_forms(made.tokenizer) for made in pair[:2])
    similar = vocab_mapper_oracle.similar(teacher, student, threshold, Levenshtein.distance)
    file = tmp_path_factory.getbasetemp() / "mapper.safetensors"
    for kind, build in BUILD.items():
        mapper = build(teacher, student, threshold=threshold, progress=False)
        forward, backward = vocab_mapper_oracle.static_map(kind, teacher, student, Levenshtein.distance)
        assert mapper.teacher_to_student.tolist() == forward
        assert mapper.student_to_teacher.tolist() == backward
        check_similar(mapper, similar)
        check_inverse(mapper, teacher, student)
        mapper.save(file)
        loaded = VocabMapper.load(file, teacher, student)
        assert (loaded.kind, loaded.threshold) == (kind, threshold)
        assert loaded.teacher_to_student.tolist() == forward and loaded.student_to_teacher.tolist() == backward
        if lower <= threshold:
            check_similar(loaded.with_threshold(lower), {pair: d for pair, d in similar.items() if d < lower})


def check_similar(mapper: VocabMapper, pairs: dict[tuple[int, int], float]) -> None:
    by_teacher = [[] for _ in range(mapper.teacher.size)]
    by_student = [[] for _ in range(mapper.student.size)]
    for (v, u), d in pairs.items():
        by_teacher[v].append((d, u))
        by_student[u].append((d, v))
    assert_table(mapper.similar_to_student, by_teacher)
    assert_table(mapper.similar_to_teacher, by_student)


def check_inverse(mapper: VocabMapper, teacher, student) -> None:
    """A student token's teacher token maps back to it, or to another of the same text."""
    for u, v in enumerate(mapper.student_to_teacher.tolist()):
        if v >= 0:
            back = mapper.teacher_to_student[v]
            assert back == u or student.forms[back] == student.forms[u]


# ------------------------------------------------------------------------------------------------------- the loss


def oracle_side(mapper: VocabMapper, forms, ids: np.ndarray, logits: torch.Tensor, to_student: bool):
    """One side for the oracle, which knows tokens by name: here their side and id, since forms may be equal."""
    own, other = ("t", "s") if to_student else ("s", "t")
    static = mapper.teacher_to_student if to_student else mapper.student_to_teacher
    table = mapper.similar_to_student if to_student else mapper.similar_to_teacher
    names = [f"{own}{v}" for v in range(len(forms))]
    return cdm_oracle.Side(
        vocabulary=names,
        tokens=ids.tolist(),
        logits=logits.double(),
        match={name: f"{other}{u}" for name, u in zip(names, static.tolist()) if u >= 0},
        similar={
            name: {f"{other}{u}": d for u, d in zip(*(part.tolist() for part in table.row(v)))}
            for v, name in enumerate(names)
        },
    )


def slow_alignment(encoders, prepared: dict, teacher: torch.Tensor, student: torch.Tensor):
    table = distances(encoders, prepared)
    entropies = cdm_oracle.entropies(teacher), cdm_oracle.entropies(student)
    weights = [cdm_oracle.weights(values) for values in entropies]
    for values, side_weights, logits in zip(entropies, weights, (teacher, student)):
        fast = entropy_weights(entropy(logits), [len(values)]).tolist()
        for value, slow_weight, fast_weight in zip(values, side_weights, fast):
            if slow_weight != fast_weight:  # an entropy on the very border of two weights
                low, high = min(values), max(values)
                exact = 3 / (1 + np.exp(2 - 4 * (value - low) / (high - low))) + 3
                assert abs(exact - round(exact)) < 1e-4
                assume(False)
    cost = [[d * a * b for d, b in zip(row, weights[1])] for row, a in zip(table, weights[0])]
    return cdm_oracle.cut_at_diagonals(cdm_oracle.dtw_path(cost))


def slow_byte_alignment(response):
    ends = response.teacher_ends.tolist(), response.ends.tolist()
    borders = sorted(set(ends[0]) & set(ends[1]))
    borders[-1:] = [max(ends[0][-1], ends[1][-1])]  # the last group holds what follows the last common end
    return [
        tuple([i for i, end in enumerate(side) if low < end <= high] for side in ends)
        for low, high in zip([0, *borders], borders)
    ]


def random_logits(random, n_rows: int, width: int, padding: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/32 that bfloat16 holds exactly: float32 and float64 see the same ties between means."""
    values = np.clip(np.round(32 * random.normal(0, 2, (n_rows, width + padding))), -255, 255) / 32
    return torch.from_numpy(values).to(dtype)[:, :width]


@cases(0.1)
@given(
    case=responses(n=2, max_pieces=4),
    seed=st.integers(0, 10**6),
    topk=st.sampled_from([1, 5, 5, 20, 20, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    alignment=st.sampled_from(["dtw", "dtw", "byte"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    kind=st.sampled_from(sorted(BUILD)),
    threshold=st.sampled_from([0.3, 0.6, 0.6]),
    padding=st.sampled_from([0, 7]),
    with_labels=st.booleans(),
)
def test_the_whole_loss(case, seed, topk, temperature, alignment, dtype, kind, threshold, padding, with_labels):
    encoders, examples = case
    student_encoder, teacher_encoder = encoders
    mapper = BUILD[kind](teacher_encoder.forms, student_encoder.forms, threshold=threshold, progress=False)
    random = np.random.default_rng(seed)
    logits = [
        (
            random_logits(random, len(response.teacher_ends), len(teacher_encoder.forms), padding, dtype),
            random_logits(random, len(response.ends), len(student_encoder.forms), padding, dtype),
        )
        for _, response in examples
    ]

    groups, labels = [], []
    kd_sum, gradients, rates, masses = 0.0, [], [], []
    for (prepared, response), (teacher, student) in zip(examples, logits):
        if alignment == "byte":
            groups.append(byte_groups(response.teacher_ends, response.ends))
            slow = slow_byte_alignment(response)
        else:
            slow = slow_alignment(encoders, prepared, teacher, student)
            index = response.teacher_index, response.student_index
            weights = [entropy_weights(entropy(side), [len(side)]).numpy() for side in (teacher, student)]
            groups.append(dtw_groups(response.distance, *index, *weights))
        ids = [prepared[f"{side}input_ids"][prepared[f"{side}response_start"] :] for side in ("teacher_", "")]
        labels.append(torch.from_numpy(ids[1]))
        expected = cdm_oracle.cdm(
            oracle_side(mapper, teacher_encoder.forms, ids[0], teacher, True),
            oracle_side(mapper, student_encoder.forms, ids[1], student, False),
            topk,
            temperature,
            groups=slow,
        )
        assert [group.tolist() for group in groups[-1]] == list(group_numbers(slow))
        kd_sum += expected.kd_sum
        gradients.append(expected.gradient)
        rates += expected.mapped_rate
        masses += expected.teacher_mass

    leaf = torch.cat([student for _, student in logits]).requires_grad_()
    result = contextual_kl(
        leaf,
        torch.cat([teacher for teacher, _ in logits]),
        concatenate_groups(groups),
        *direction_maps(mapper),
        topk,
        temperature,
        torch.cat(labels) if with_labels else None,
    )
    sizes = torch.from_numpy(concatenate_groups(groups).student_size)
    total = (sizes * result.kd).sum()
    gradient = torch.cat(gradients)
    assert total.item() == pytest.approx(kd_sum, rel=1e-5, abs=1e-5)
    if with_labels:
        ce = -leaf.detach().double().log_softmax(-1)[range(len(leaf)), torch.cat(labels)]
        torch.testing.assert_close(result.ce.double(), ce, rtol=1e-5, atol=1e-5)
        gradient = gradient + leaf.detach().double().softmax(-1)
        gradient[range(len(leaf)), torch.cat(labels)] -= 1
        total = total + result.ce.sum()
    assert result.mapped_rate.tolist() == pytest.approx(rates)
    assert result.teacher_mass.tolist() == pytest.approx(masses, rel=1e-5, abs=1e-6)
    (fast_gradient,) = torch.autograd.grad(total, leaf)
    assert fast_gradient.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(fast_gradient.double(), gradient, **tolerance)
