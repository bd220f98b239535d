"""Strict, GOLD, SimCT and ALM: against their oracles on random and real tokenizers, by hand, and what must hold."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from get_vocab_mapper.builders import exact_matches
from get_vocab_mapper.mapper import Direction, VocabMapper
from get_vocab_mapper.mapper import Side as MapperSide
from modeling.losses.shared_tokens import SharedTokens
from modeling.run_clm_alm import alm_losses, boundary_tokens
from modeling.run_clm_gold import Columns, gold_losses
from modeling.run_clm_simct import simct_losses
from modeling.run_clm_strict import strict_losses
from modeling.text.alignment import Groups, byte_groups
from modeling.text.batch import Batch, ResponseCollator
from modeling.text.batch import Side as BatchSide
from modeling.text.encoder import Encoder, encode_pair, prepare_example
from tests.reference import byte_group_oracles as oracles
from tests.unit.helpers import random_logits
from tests.unit.test_rigs import batches, cases
from tests.unit.tokenizer_zoo import load_real, real_dir

# One setting of every flag that a method has, each beside the defaults of the others.
SETTINGS = {
    "strict": (
        {},
        {"topk": 0},
        {"topk": 0, "divergence": "jsd", "temperature": 2.0},
        {"topk": 3, "divergence": "forward", "temperature": 0.7},
        {"divergence": "jsd"},
        {"topk": 3, "span_weight": 0.02},
        {"topk": 10**6, "span_weight": 0.01, "temperature": 3.0},
    ),
    "gold": (
        {},
        {"hybrid": False},
        {"beta": 0.0, "temperature": 2.0},
        {"beta": 1.0},
        {"beta": 0.2, "matched_weight": 0.9},
        {"hybrid": False, "temperature": 0.7},
        {"matched_weight": 1.0, "temperature": 3.0},
    ),
    "simct": ({}, {"temperature": 2.0}, {"temperature": 0.7}),
    "alm": (
        {},
        {"debias": "none"},
        {"threshold": 0.5},
        {"threshold": 0.9, "temperature": 1.0},
        {"debias": "none", "temperature": 10.0},
        {"threshold": 1.0},
        {"threshold": 0.0},
    ),
}
MAPPERS = {}
EVERY = [(method, options) for method, settings in SETTINGS.items() for options in settings]
TEXTS = {
    "accents": "A café in Zürich serves crème brûlée; “déjà vu”, said the naïve visitor.",
    "CJK": "東京は日本の首都です。中文和한국어。",
    "emoji": "Well done 👩‍👩‍👧 🏳️‍🌈😀!",
    "tabs": "def f(x):\n\tif x:\n\t\treturn x\t# tab\n",
    "special": "It ends with </s> or <|endoftext|> now.",
    "one word": "yes",
}


def losses_of(method, student, teacher, batch, sides, options):
    """The project's loss of a batch, as the script of the method calls it. `sides`: the encoders, teacher first."""
    forms, options = [side.forms for side in sides], dict(options)
    if method == "alm":
        boundaries = tuple(torch.from_numpy(boundary_tokens(side.forms, [side.eos_id])) for side in sides)
        if options.pop("debias", "space") == "none":
            boundaries = None
        renamed = {"threshold": "space_threshold", "temperature": "binarization_temperature"}
        return alm_losses(student, teacher, batch, boundaries, **{renamed[name]: v for name, v in options.items()})
    mapper = em_mapper(*forms)
    if method == "gold":
        none = np.zeros(0, dtype=np.int64)
        matched = mapper.mutual_pairs() if options.pop("hybrid", True) else (none, none)
        return gold_losses(student, teacher, batch, Columns.of(matched, tuple(map(len, forms))), **options)
    shared = SharedTokens.of(mapper.mutual_pairs(tuple(side.is_special for side in forms)))
    if not len(shared):
        return None  # which the scripts refuse
    return {"strict": strict_losses, "simct": simct_losses}[method](student, teacher, batch, shared, **options)


def em_mapper(teacher, student):
    """The static maps alone: the similar tokens of a real pair take minutes, and no method here reads them."""
    key = id(teacher), id(student)
    if key not in MAPPERS:
        MAPPERS[key] = _em_mapper(teacher, student), teacher, student  # which keep their ids
    return MAPPERS[key][0]


def _em_mapper(teacher, student):
    static = exact_matches(teacher, student)
    ways = [
        Direction(way, np.zeros(len(way) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        for way in static
    ]
    return VocabMapper("em", 0.0, MapperSide.of(teacher), MapperSide.of(student), *ways)


def oracle_sides(encoders, batch, teacher, student):
    """Of each example, the oracle's two sides."""
    parts = []
    for encoder, side, logits in zip(encoders, (batch.teacher, batch.student), (teacher, student)):
        forms = encoder.forms
        own = [
            oracles.Side(
                *(forms.forms, forms.is_special.tolist(), forms.is_byte_fallback.tolist(), forms.roles),
                *(ids.tolist(), ends.tolist(), z.unbind(), start),
            )
            for ids, ends, z, start in zip(
                side.labels.split(side.lengths), side.byte_ends, logits.split(side.lengths), side.byte_starts
            )
        ]
        parts.append(own)
    return list(zip(*parts))


def default_options(method, options):
    given = dict(options)
    if method == "strict":
        return {"topk": 16, "temperature": 1.0} | given
    return given if method == "alm" else {"temperature": 1.0} | given


def check(method, options, encoders, batch, teacher, student, tolerance=1e-5):
    """Value, gradient, and all that is logged, against the oracle."""
    losses = losses_of(method, student, teacher, batch, encoders, options)
    if losses is None:
        return
    total, means, exact = oracles.ZERO, {}, student.detach().double().requires_grad_()
    for sides in oracle_sides(encoders, batch, teacher, exact):
        value, logged = getattr(oracles, method)(*sides, **default_options(method, options))
        total = total + value
        for name, (number, count) in logged.items():
            before = means.get(name, (0.0, 0))
            means[name] = (before[0] + number, before[1] + count)
    assert losses.kd_sum().item() == pytest.approx(total.item(), rel=tolerance, abs=tolerance)
    for name, (number, count) in means.items():
        got, of = losses.means[name] if name in losses.means else (losses.parts[name], count)
        assert torch.as_tensor(got).item() == pytest.approx(number, rel=tolerance, abs=tolerance), name
        assert float(of) == count, name
    assert set(means) | {"one_to_one"} == {*losses.means, *losses.parts, "one_to_one"}
    (gradient,) = torch.autograd.grad(losses.kd_sum(), student)
    wanted = torch.zeros_like(exact)
    if total.requires_grad:
        (wanted,) = torch.autograd.grad(total, exact)
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- random and real pairs


@cases(0.3)
@given(
    case=batches(n=2, max_pieces=5),
    seed=st.integers(0, 10**6),
    what=st.sampled_from(EVERY),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_random_tokenizers(case, seed, what, scale):
    student_encoder, teacher_encoder, examples = case
    batch = ResponseCollator(student_encoder, teacher_encoder, "byte")(examples)
    teacher, student = (
        scale * random_logits(len(side.labels), len(encoder.forms), seed=seed + i, dtype=torch.float64)
        for i, (side, encoder) in enumerate(((batch.teacher, teacher_encoder), (batch.student, student_encoder)))
    )
    check(*what, (teacher_encoder, student_encoder), batch, teacher, student.requires_grad_())


@cache
def encoder(name):
    return Encoder(load_real(name))


@cache
def responses():
    """Of each data set, a short one."""
    files = {"Dolly": ("dolly/databricks-dolly-15k.jsonl", "response"), "GSM8K": ("gsm8k/train.jsonl", "answer")}
    files["MBPP"] = ("mbpp/mbpp.jsonl", "code")
    found = dict(TEXTS)
    for name, (file, column) in files.items():
        with (real_dir() / "data" / file).open(encoding="utf-8") as lines:
            rows = (json.loads(line)[column] for line in lines)
            found[name] = next(row for row in rows if 60 < len(row) < 90)
    return found


@pytest.mark.parametrize("teacher_name, student_name", [
    ("phi-3", "qwen2"), ("llama-3", "gemma-2"), ("qwen2", "opt"), ("gemma-2", "phi-3"),
])  # fmt: skip
def test_real_tokenizers(teacher_name, student_name):
    """Every method with one setting after the other, over half of the real texts, a cut one too."""
    encoders = encoder(teacher_name), encoder(student_name)
    for number, (name, text) in enumerate(responses().items()):
        block_size = 1000 if number % 4 else 12  # cut
        example = prepare_example({"row": 1, "prefix": "Say:\n", "text": text[:32]}, encoders[::-1], block_size)
        assert example["cut"] == (block_size == 12), name
        batch = ResponseCollator(*encoders[::-1], "byte")([example])
        teacher, student = (
            random_logits(len(side.labels), len(e.forms), seed=number, dtype=torch.float64)
            for side, e in zip((batch.teacher, batch.student), encoders)
        )
        # As of models that know something: the text's own tokens are likely.
        for z, side in ((teacher, batch.teacher), (student, batch.student)):
            z.scatter_add_(1, side.labels[:, None], torch.full((len(z), 1), 14.0, dtype=z.dtype))
        for place, (method, settings) in enumerate(SETTINGS.items()):
            if (number + place) % 2:  # a method takes every other text: these vocabularies are large
                continue
            options = settings[number // 2 % len(settings)]
            check(method, options, encoders, batch, teacher, student.requires_grad_())


@pytest.mark.parametrize(
    "prefixes, starts",
    [
        (("[/INST] ", "assistant\n"), [-1, 0]),  # a chat template's space is in the teacher's first token
        (("", ""), [0, 3]),  # without BOS, the student's first token has nothing that could predict it
        (("[/INST]\n", "assistant\n"), [0, 0]),
    ],
)
def test_a_first_group_that_begins_elsewhere_is_no_unit(prefixes, starts):
    encoders = Encoder(load_real("phi-3")), Encoder(load_real("qwen2"))
    example = {"row": 1}
    for side, encoded in zip(("teacher_", ""), encode_pair(encoders, prefixes, "The quick brown fox", 64)):
        example |= {f"{side}{name}": value for name, value in vars(encoded).items()}
    batch = ResponseCollator(*reversed(encoders), "byte")([example])
    assert [side.byte_starts[0] for side in (batch.teacher, batch.student)] == starts
    same = starts[0] == starts[1]
    assert batch.groups.units.tolist() == [same, *[True] * (len(batch.groups) - 2), False]  # the last is EOS
    first = int(batch.groups.student.host_size[0])
    assert batch.groups.aligned == len(batch.student.labels) - (0 if same else first)


# ------------------------------------------------------------------------------------------------------------ by hand


def batch_of(teacher, student, special=None):
    """One example. A side is a list of (token, byte at which it ends). `special`: which tokens of the batch are."""
    sides = []
    for side in (teacher, student):
        ids, ends = zip(*side)
        example = {"row": 1, "input_ids": [0, *ids], "response_start": 1, "byte_ends": list(ends), "byte_start": 0}
        sides.append(BatchSide.of([example], "", 0))
    ends = [tuple(np.array([end for _, end in side]) for side in (teacher, student))]
    groups = Groups.of(ends, [byte_groups(*ends[0])], special)
    return Batch(sides[1], sides[0], rows=[1], n_bytes=[ends[0][1][-1]], groups=groups)


def logits_of(*rows):
    """float64 logits of the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def shared(n):
    return SharedTokens.of((np.arange(n), np.arange(n)))


EOS = np.array([False, True])
# Two tokens a side over three tokens of a vocabulary each; the second is the end of sequence, at byte 2.
ONE = batch_of([(0, 1), (2, 2)], [(0, 1), (2, 2)], (EOS, EOS))
UNIFORM = [1 / 3] * 3


def test_strict_by_hand():
    student, teacher = logits_of([0.6, 0.2, 0.2], UNIFORM), logits_of([0.1, 0.3, 0.6], UNIFORM).detach()
    # The pairs are tokens 0 and 1: (3/4, 1/4) of both is held against (1/4, 3/4).
    losses = strict_losses(student, teacher, ONE, shared(2), topk=16)
    assert losses.kd.tolist() == pytest.approx([0.75 * math.log(3) + 0.25 * math.log(1 / 3), 0])
    expected = {"shared_mass": (0.8, 1), "teacher_shared_mass": (0.4, 1), "topk_mass": (0.8, 1)}
    expected |= {"teacher_topk_mass": (0.4, 1), "coverage": (1, 2), "teacher_coverage": (1, 2)}
    assert {name: (float(a), float(b)) for name, (a, b) in losses.means.items()} == pytest.approx(
        {name: pytest.approx(value) for name, value in expected.items()}
    )
    # Of one pair alone, both sides are certain.
    one = strict_losses(student, teacher, ONE, shared(2), topk=1)
    assert one.kd.tolist() == pytest.approx([0, 0]) and float(one.means["topk_mass"][0]) == pytest.approx(0.6)
    forward = strict_losses(student, teacher, ONE, shared(2), topk=0, divergence="forward").kd[0]
    assert forward.item() == pytest.approx(0.25 * math.log(1 / 3) + 0.75 * math.log(3))
    jsd = strict_losses(student, teacher, ONE, shared(2), divergence="jsd").kd[0]
    assert jsd.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


TWO_THREE = batch_of([(0, 1), (1, 4), (2, 5)], [(1, 2), (0, 3), (1, 4), (2, 5)], (EOS[[0, 0, 1]], EOS[[0, 0, 0, 1]]))


def two_against_three():
    """A group of two teacher tokens, likely 1/2 and 1/4, and of three student tokens, 1/5, 1/2, 1/2; then EOS."""
    teacher = logits_of([0.5, 0.3, 0.2], [0.5, 0.25, 0.25], UNIFORM).detach()
    return logits_of([0.6, 0.2, 0.2], [0.5, 0.25, 0.25], [0.3, 0.5, 0.2], UNIFORM), teacher


def test_two_tokens_against_three_by_hand():
    student, teacher = two_against_three()
    assert not strict_losses(student, teacher, TWO_THREE, shared(2)).kd.any()
    spans = strict_losses(student, teacher, TWO_THREE, shared(2), span_weight=0.1)
    assert spans.kd_sum().item() == pytest.approx(3 * 0.1 * math.log((1 / 20) / (1 / 8)) ** 2)

    # SimCT: scores at the first rows, and the geometric means of 1/8 and 1/20.
    pi_teacher = np.array([0.5, 0.3, math.sqrt(1 / 8)])
    pi_student = np.array([0.6, 0.2, (1 / 20) ** (1 / 3)])
    pi_teacher, pi_student = pi_teacher / pi_teacher.sum(), pi_student / pi_student.sum()
    losses = simct_losses(student, teacher, TWO_THREE, shared(2))
    assert losses.kd_sum().item() == pytest.approx(3 * (pi_student * np.log(pi_student / pi_teacher)).sum())
    assert float(losses.means["span_share"][0]) == pytest.approx(pi_student[2])
    assert losses.means["one_to_one"] == (1, 4)

    # GOLD: the last rows, times 1/2 of the teacher and 1/10 of the student.
    p_teacher, p_student = np.array([0.5, 0.25, 0.25]) / 2, np.array([0.3, 0.5, 0.2]) / 10
    m = (p_teacher + p_student) / 2
    jsd = (p_teacher * np.log(p_teacher / m) + p_student * np.log(p_student / m))[:2].sum() / 2
    columns = Columns.of((np.arange(2), np.arange(2)), (3, 3))
    losses = gold_losses(student, teacher, TWO_THREE, columns)
    l1 = abs(p_teacher[2] - p_student[2])
    assert losses.kd_sum().item() == pytest.approx(3 * (2 / 3 * jsd + 1 / 3 * l1))
    assert losses.parts["jsd_loss"].item() == pytest.approx(3 * jsd)
    none = np.zeros(0, dtype=np.int64)
    sorted_alone = gold_losses(student, teacher, TWO_THREE, Columns.of((none, none), (3, 3)))
    assert sorted_alone.kd_sum().item() == pytest.approx(3 * (0.25 - 0.05 + 0.125 - 0.03 + 0.125 - 0.02))

    # ALM: 1/8 against 1/20; with white space, times the probability of tokens 0 and 2 (EOS) at the rows behind.
    for boundaries, factor in ((None, 1), ((torch.tensor([0, 2]), torch.tensor([2])), np.array([2 / 3, 1 / 3]))):
        p, q = np.exp(np.log(np.array([1 / 8, 1 / 20]) * factor) / 2 - 1e-6)
        losses = alm_losses(student, teacher, TWO_THREE, boundaries, binarization_temperature=2.0)
        expected = 3 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        assert losses.kd_sum().item() == pytest.approx(expected)
        assert [float(x) for x in losses.means["chunk_tokens"]] == [3, 1]


def test_groups_joined_by_the_space_threshold_by_hand():
    """Three groups of a token each, then EOS; tokens 0 and 2 are boundaries. The teacher gives them 0.05 behind the
    first group, 0.4 behind the second."""
    flags = EOS[[0, 0, 0, 1]]
    tokens = [(1, 1), (1, 2), (1, 3), (2, 4)]
    batch = batch_of(tokens, tokens, (flags, flags))
    teacher = logits_of([0.2, 0.7, 0.1], [0.03, 0.95, 0.02], [0.3, 0.6, 0.1], [0.1, 0.3, 0.6]).detach()
    student = logits_of([0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4])
    boundaries = (torch.tensor([0, 2]),) * 2
    chunks = [((0.7 * 0.95) * 0.4, (0.8 * 0.5) * 0.8, 2), (0.6 * 0.7, 0.2 * 0.7, 1)]
    expected = 0
    for t, s, n in chunks:
        p, q = (math.exp(math.log(x) / 100 - 1e-6) for x in (t, s))
        expected += n * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    losses = alm_losses(student, teacher, batch, boundaries)
    assert losses.kd_sum().item() == pytest.approx(expected)
    assert [float(x) for x in losses.means["chunk_tokens"]] == [3, 2]
    assert losses.covered.tolist() == [2, 1, 0, 0]
    apart = alm_losses(student, teacher, batch, boundaries, space_threshold=0.04)
    assert [float(x) for x in apart.means["chunk_tokens"]] == [3, 3]
    whole = alm_losses(student, teacher, batch, boundaries, space_threshold=1.0)
    assert [float(x) for x in whole.means["chunk_tokens"]] == [3, 1]


def test_the_last_group_of_a_cut_text_is_no_unit():
    """The sides end at bytes 3 and 4: what follows byte 1 is not the same text. And behind a text that ends alike, but
    was cut in front of its EOS, no row says whether it ends there."""
    rows = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]
    student, teacher = logits_of(*rows, UNIFORM), logits_of([0.2, 0.3, 0.5], [0.1, 0.8, 0.1], UNIFORM).detach()
    batch = batch_of([(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 4)])
    columns, boundaries = Columns.of((np.arange(2), np.arange(2)), (3, 3)), (torch.tensor([0]),) * 2
    for losses in (
        strict_losses(student, teacher, batch, shared(2), span_weight=1.0),
        gold_losses(student, teacher, batch, columns),
        simct_losses(student, teacher, batch, shared(2)),
        alm_losses(student, teacher, batch, boundaries),
    ):
        assert [float(x) for x in losses.means["coverage"]] == [1, 3]
        (gradient,) = torch.autograd.grad(losses.kd_sum(), student)
        if "chunk_tokens" in losses.means:  # the row behind the unit says whether it is one
            assert gradient[1].any()
        else:
            assert gradient[0].any() and not gradient[1].any()
    cut = batch_of([(0, 1), (1, 3)], [(0, 1), (1, 3)])
    losses = alm_losses(student[:2], teacher[:2], cut, boundaries, space_threshold=1.0)
    p, q = (math.exp(math.log(x) / 100 - 1e-6) for x in (0.2 * 0.8, 0.5 * 0.4))
    assert losses.kd_sum().item() == pytest.approx(2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))))


def test_boundary_tokens():
    """Those that begin with white space, byte tokens too, and the end."""
    forms = encoder("phi-3").forms
    found = boundary_tokens(forms, [encoder("phi-3").eos_id])
    assert {forms.forms[i][:1] for i in found} == {b" ", b"\t", b"\n", b"\r", b"\v", b"\f", b"<"}
    assert [forms.forms[i] for i in found if forms.is_special[i]] == [b"<|endoftext|>"]
    assert all(i in found for i, form in enumerate(forms.forms) if form.startswith(b" "))


def test_mutual_pairs():
    """Each token in one pair at most; the special ones only where they are asked for."""
    forms = encoder("phi-3").forms, encoder("qwen2").forms
    mapper = em_mapper(*forms)
    everything = mapper.mutual_pairs()
    text = mapper.mutual_pairs(tuple(side.is_special for side in forms))
    for v, u in (everything, text):
        assert len(np.unique(v)) == len(np.unique(u)) == len(v)
    extra = set(zip(*map(np.ndarray.tolist, everything))) - set(zip(*map(np.ndarray.tolist, text)))
    assert {(forms[0].forms[v], forms[1].forms[u]) for v, u in extra} == {(b"<|endoftext|>", b"<|im_end|>")}  # EOS
    assert all(forms[0].forms[v] == forms[1].forms[u] for v, u in zip(*text))


# --------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize(("method", "options"), EVERY)
def test_a_student_that_is_its_teacher_learns_nothing(pair, method, options):
    """Of one tokenizer and equal logits: no divergence, and no gradient."""
    collator = ResponseCollator(pair.student, pair.student, "byte")
    examples = [prepare_example(row, [pair.student, pair.student], 512) for row in pair.rows[:2]]
    batch = collator(examples)
    z = random_logits(len(batch.student.labels), len(pair.student.forms), dtype=torch.float64)
    student = z.clone().requires_grad_()
    losses = losses_of(method, student, z, batch, (pair.student, pair.student), options)
    assert losses.kd.abs().max().item() < 1e-12 and losses.covered.sum() > 0
    (gradient,) = torch.autograd.grad(losses.kd_sum(), student)
    if method != "gold":  # JSD of probabilities that do not sum to 1 may have one, at beta = 0 and 1
        assert gradient.abs().max().item() < 1e-9


@pytest.mark.parametrize(("method", "options"), EVERY)
def test_gradcheck(pair, method, options):
    """Finite differences: nothing that the loss depends on is left without its gradient."""
    row = {"row": 1, "prefix": "Say:", "text": " naïve shells"}
    sides = pair.teacher, pair.student
    batch = ResponseCollator(pair.student, pair.teacher, "byte")([prepare_example(row, sides[::-1], 512)])
    teacher, student = (
        random_logits(len(side.labels), len(e.forms), seed=i, dtype=torch.float64)
        for i, (side, e) in enumerate(zip((batch.teacher, batch.student), sides))
    )
    assert not batch.groups.alone.all() and (batch.groups.alone & batch.groups.units).any()
    directions = random_logits(3, *student.shape, seed=9, dtype=torch.float64) / 3

    def along(steps):
        moved = student + (steps[:, None, None] * directions).sum(0)
        return losses_of(method, moved, teacher, batch, sides, options).kd

    assert torch.autograd.gradcheck(along, torch.zeros(3, dtype=torch.float64, requires_grad=True), atol=1e-6)
