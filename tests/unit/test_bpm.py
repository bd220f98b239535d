"""BPM from texts to gradients: its rows by hand, and values, gradients and logged figures against the slow oracle."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from get_vocab_mapper.builders import build_prefixem
from get_vocab_mapper.token_forms import TokenForms
from modeling.losses.logits import ChunkedLogits
from modeling.models.output_head import OutputHead
from modeling.run_clm_bpm import boundary_map, bpm_losses
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from tests.reference import bpm_oracle
from tests.unit.helpers import assert_same, random_logits
from tests.unit.test_rigs import batches, cases
from tests.unit.tokenizer_zoo import load_real, real_dir


def oracle_side(encoder: Encoder, ids, ends, start) -> bpm_oracle.Side:
    forms = encoder.forms
    flags = forms.is_special.tolist(), forms.is_byte_fallback.tolist()
    return bpm_oracle.Side(forms.forms, *flags, encoder.eos_id, ids.tolist(), ends.tolist(), start)


def expected(batch, student: Encoder, teacher: Encoder, z_student, z_teacher, **options):
    """The oracle's KD of all tokens of a batch, and its sums."""
    sides = (batch.student, student, z_student), (batch.teacher, teacher, z_teacher)
    parts = [
        [
            (oracle_side(encoder, ids, ends, start), z)
            for ids, ends, z, start in zip(
                side.labels.split(side.lengths), side.byte_ends, logits.split(side.lengths), side.byte_starts
            )
        ]
        for side, encoder, logits in sides
    ]
    values, sums = [], {}
    for (student, z_s), (teacher, z_t) in zip(*parts):
        kd, logged = bpm_oracle.bpm(teacher, student, z_t, z_s, **options)
        values.append(kd)
        sums = {name: sums.get(name, 0) + value for name, value in logged.items()}
    return torch.cat(values), sums


def check(batch, student: Encoder, teacher: Encoder, boundary, seed=0, chunk=None, scale=1.0, **options):
    z_student, z_teacher = (
        random_logits(len(side.labels), len(encoder.forms), seed=seed + i) * scale
        for i, (side, encoder) in enumerate(((batch.student, student), (batch.teacher, teacher)))
    )
    leaf, given = z_student.requires_grad_(), [z_student, z_teacher]
    if chunk:
        given = [ChunkedLogits(z, OutputHead(torch.eye(z.shape[1])), z.shape[1], chunk) for z in given]
    losses = bpm_losses(*given, batch, boundary, **options)
    values, sums = expected(batch, student, teacher, leaf, z_teacher, **options)
    assert_same(losses.kd, values, leaf)
    got = {name: float(total) for name, (total, _) in losses.means.items()}
    got["residual_mass, of"] = losses.means["residual_mass"][1]
    assert got == pytest.approx(sums, rel=1e-5, abs=1e-5)
    assert [losses.means[name][1] for name in ("interior", "spanning", "dropped")] == 3 * [len(leaf)]
    return losses, sums


def boundary_of(student: Encoder, teacher: Encoder):
    return boundary_map(build_prefixem(teacher.forms, student.forms, 0.0, progress=False), student, teacher)


# ------------------------------------------------------------------------------------------------- random tokenizers


@cases(0.13)
@given(
    case=batches(n=2, max_pieces=6),
    beta=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    spanning=st.booleans(),
    mask_whitespace=st.booleans(),
    chunk=st.sampled_from([None, None, 3]),
)
def test_random_tokenizers(case, beta, temperature, spanning, mask_whitespace, chunk):
    *encoders, examples = case
    batch = ResponseCollator(*encoders, "prefix")(examples)
    options = {"beta": beta, "temperature": temperature, "spanning": spanning, "mask_whitespace": mask_whitespace}
    _, sums = check(batch, *encoders, boundary_of(*encoders), chunk=chunk, **options)
    for kind in ("interior", "spanning", "dropped"):
        if sums[kind]:
            event(kind)


# ------------------------------------------------------------------------------------------------------ real pairs

PAIRS = (("phi-3", "qwen2"), ("llama-3", "gemma-2"), ("qwen2", "opt"), ("gemma-2", "phi-3"))
HARD = (
    "Cafe\u0301 é déjà",  # an accent of its own, and composed ones
    "東京は日本 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 😀!",
    "if x:\n\t\tfoo( 12345)\n        return  1",
)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: " to ".join(pair))
def real(request):
    """`(student, teacher, boundary map)`."""
    teacher, student = (Encoder(load_real(name)) for name in request.param)
    return student, teacher, boundary_of(student, teacher)


def data_rows():
    folder = real_dir() / "data"
    for file, columns in (
        ("dolly/databricks-dolly-15k.jsonl", ("instruction", "response")),
        ("gsm8k/train.jsonl", ("question", "answer")),
        ("mbpp/mbpp.jsonl", ("text", "code")),
    ):
        with (folder / file).open(encoding="utf-8") as lines:
            row = json.loads(next(lines))
        yield [row[column] for column in columns]


def test_real_pairs(real):
    """A piece of each data set, accents, CJK, emoji that both sides split, tabs; one response is cut."""
    student, teacher, boundary = real
    pieces = [(f"{prefix}\n", text[:20]) for prefix, text in data_rows()] + [("Q: ", text) for text in HARD]
    rows = [{"row": i, "prefix": prefix, "text": text} for i, (prefix, text) in enumerate(pieces)]
    collate = ResponseCollator(student, teacher, "prefix")
    for row in rows:
        check(collate([prepare_example(row, [student, teacher], 512)]), student, teacher, boundary, scale=0.7)
    lengths = [len(encoder.encode("Q: ", HARD[2]).input_ids) for encoder in (student, teacher)]
    cut = prepare_example({"row": 1, "prefix": "Q: ", "text": HARD[2]}, [student, teacher], max(lengths) - 3)
    assert cut["cut"] and len(cut["byte_ends"])
    check(collate([cut]), student, teacher, boundary, scale=0.7)


def test_rows_are_found_in_time(real):
    """In a response of 512 tokens, once a collator has seen such text.

    The least of many: it takes 1 to 3 ms, and more where other processes share the caches.
    """
    student, teacher, _ = real
    with (real_dir() / "data/dolly/databricks-dolly-15k.jsonl").open(encoding="utf-8") as lines:
        text = " ".join(json.loads(next(lines))["response"] for _ in range(40))
    end = student.encode("", text).byte_ends[511]
    row = {"row": 1, "prefix": "Q: ", "text": text.encode()[:end].decode("utf-8", "ignore")}
    collate = ResponseCollator(student, teacher, "prefix")
    batch = collate([prepare_example(row, [student, teacher], 2000)])
    assert len(batch.student.labels) >= 500
    took = []
    for _ in range(100):
        start = time.process_time()
        collate.find_prefix_rows(batch.student, batch.teacher)
        took.append(time.process_time() - start)
    assert min(took) < 0.005


# --------------------------------------------------------------------------------------------------------- by hand


class Vocabulary(Encoder):
    """A vocabulary given as bytes; EOS is its last token."""

    def __init__(self, *forms: bytes):
        special = np.arange(len(forms) + 1) == len(forms)
        self.forms = TokenForms("made", [*forms, b"</s>"], special, ~special & False, {"eos": len(forms)})
        self.stop_ids, self.tokenizer = (len(forms),), None

    pad_id = 0

    def columns(self, prefix: str, tokens: list[bytes], eos: bool) -> dict:
        ids = [self.forms.forms.index(token) for token in tokens]
        ends = np.cumsum([len(token) for token in tokens]).tolist()
        if eos:
            ids, ends = [*ids, self.eos_id], [*ends, ends[-1] + 1]
        return {
            f"{prefix}input_ids": np.array([0, *ids]),
            f"{prefix}response_start": 1,
            f"{prefix}byte_ends": np.array(ends, dtype=np.int32),
            f"{prefix}byte_start": 0,
        }


def losses_by_hand(teacher, teacher_tokens, student, student_tokens, p_teacher, p_student, eos=True, **options):
    """The losses of one response, with these probabilities of each side's tokens in every row."""
    example = {"row": 1, **student.columns("", student_tokens, eos), **teacher.columns("teacher_", teacher_tokens, eos)}
    batch = ResponseCollator(student, teacher, "prefix")([example])
    z = [torch.tensor(p, dtype=torch.float64).log() for p in (p_student, p_teacher)]
    return bpm_losses(*z, batch, boundary_of(student, teacher), **options), batch.prefix_rows


def forward_kl(q, p):
    q, p = (torch.tensor(x, dtype=torch.float64) for x in (q, p))
    return (torch.xlogy(q, q) - q * p.log()).sum().item()


def test_an_interior_row_by_hand():
    """The student writes `a` `b`, the teacher `ab`: at `b`, what goes on from `a` counts, `ab` and `ac`."""
    teacher, student = Vocabulary(b"ab", b"ac", b"b", b"a"), Vocabulary(b"a", b"b", b"x")
    of_teacher = [[0.3, 0.1, 0.4, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]]
    of_student = [[0.5, 0.2, 0.2, 0.1]] * 3
    losses, rows = losses_by_hand(teacher, [b"ab"], student, [b"a", b"b"], of_teacher, of_student, beta=0.0)
    assert rows.teacher_row.tolist() == [0, 0, 1] and rows.interior.tolist() == [False, True, False]
    # Row 0: `ab`, `ac` and `a` go to a, b to b, EOS to EOS. Row 1: 0.3 of 0.4 goes to b, the c of `ac` nowhere.
    assert losses.kd.tolist() == pytest.approx(
        [
            forward_kl([0.5, 0.4, 0.1], [0.5, 0.2, 0.1]),
            forward_kl([0.75, 0.25], [0.2, 0.8]),
            forward_kl([0.6, 0.2, 0.2], [0.5, 0.2, 0.1]),
        ]
    )
    assert losses.means["residual_mass"] == (pytest.approx(0.25), 3)
    assert losses.means["interior"] == (1, 3) and float(losses.means["dropped"][0]) == 0


@pytest.mark.parametrize("spanning", [True, False])
def test_a_token_over_two_and_over_three_teacher_tokens_by_hand(spanning):
    teacher, student = Vocabulary(b"a", b"b", b"bc", b"c", b"cd"), Vocabulary(b"a", b"ab", b"abc", b"c")
    p = [0.3, 0.2, 0.1, 0.15, 0.05, 0.2]
    of_student = [[0.3, 0.2, 0.2, 0.2, 0.1]] * 2
    # `ab` is `a`, and then whatever begins with b; a boundary row: 0.3 · (0.2 + 0.1) moves from a to ab.
    losses, _ = losses_by_hand(
        *(teacher, [b"a", b"b"], student, [b"ab"], [p] * 3, of_student), beta=0.0, spanning=spanning
    )
    x = 0.3 * 0.3 * spanning
    # b and bc are no student tokens, nor does one begin them: 0.3 goes to ⊥. c and cd go to c.
    p_student = [0.3, 0.2, 0.2, 0.1, 0.2] if spanning else [0.3, 0.2, 0.1, 0.4]
    q = [0.3 - x, x, 0.2, 0.2, 0.3] if spanning else [0.3, 0.2, 0.2, 0.3]
    assert losses.kd[0].item() == pytest.approx(forward_kl(q, p_student))
    # `abc` is `a`, `b`, and then whatever begins with c.
    losses, rows = losses_by_hand(
        *(teacher, [b"a", b"b", b"c"], student, [b"abc"], [p] * 4, of_student), beta=0.0, spanning=spanning
    )
    x = 0.3 * 0.2 * (0.15 + 0.05) * spanning
    q = [0.3 - x, x, 0.2, 0.2, 0.3] if spanning else q
    assert losses.kd[0].item() == pytest.approx(forward_kl(q, p_student))
    assert losses.means["spanning"] == (1, 2) and rows.spanning.tolist() == [True, False]


@pytest.mark.parametrize("masked", [True, False])
def test_a_row_of_white_space_by_hand(masked):
    teacher, student = Vocabulary(b" ", b"a"), Vocabulary(b" \t", b" ", b"a")
    losses, rows = losses_by_hand(
        *(teacher, [b" ", b"a"], student, [b" ", b"a"], [[0.5, 0.3, 0.2]] * 3, [[0.1, 0.4, 0.3, 0.2]] * 3),
        beta=0.0,
        mask_whitespace=masked,
    )
    assert rows.white_space.tolist() == [True, False, False]
    each = forward_kl([0.5, 0.3, 0.2], [0.4, 0.3, 0.2])
    assert losses.kd.tolist() == pytest.approx([0.0 if masked else each, each, each])
    assert float(losses.means["dropped"][0]) == masked and losses.means["residual_mass"][1] == 3 - masked


def test_mass_that_has_nowhere_to_go_by_hand():
    """No student token begins `z`, and the teacher's special tokens are nothing but its own: all of it is ⊥."""
    teacher, student = Vocabulary(b"z", b"a"), Vocabulary(b"a", b"b")
    losses, _ = losses_by_hand(
        *(teacher, [b"a"], student, [b"a"], [[0.9, 0.05, 0.05]] * 2, [[0.6, 0.3, 0.1]] * 2), beta=0.5
    )
    q, p = [0.05, 0.05, 0.9], [0.6, 0.1, 0.3]
    m = [(a + b) / 2 for a, b in zip(q, p)]
    assert losses.kd.tolist() == pytest.approx([(forward_kl(q, m) + forward_kl(p, m)) / 2] * 2)
    assert losses.means["residual_mass"] == (pytest.approx(1.8), 2)


def test_what_the_teacher_rules_out_is_dropped_by_hand():
    """An interior row whose teacher says that no token goes on so."""
    teacher, student = Vocabulary(b"ab", b"b"), Vocabulary(b"a", b"b")
    losses, _ = losses_by_hand(
        *(teacher, [b"ab"], student, [b"a", b"b"], [[1e-12, 0.7, 0.3], [0.2, 0.3, 0.5]], [[0.4, 0.4, 0.2]] * 3)
    )
    assert losses.kd[1].item() == 0 and losses.kd[0].item() > 0
    assert float(losses.means["dropped"][0]) == 1
    assert float(losses.means["residual_mass"][0]) == pytest.approx(1.0, abs=1e-6)


def test_the_end_of_a_text_by_hand():
    """EOS is a row like any other. A cut text has none, and tokens that no longer end together are dropped."""
    teacher, student = Vocabulary(b"a", b"bc"), Vocabulary(b"a", b"b", b"c")
    of_teacher, of_student = [[0.3, 0.3, 0.4]] * 3, [[0.25, 0.25, 0.25, 0.25]] * 4
    losses, rows = losses_by_hand(
        *(teacher, [b"a", b"bc"], student, [b"a", b"b", b"c"], of_teacher, of_student), beta=0.0
    )
    boundary = forward_kl([0.3, 0.3, 0.4], [0.25, 0.25, 0.25])
    assert losses.kd.tolist() == pytest.approx([boundary, boundary, forward_kl([1.0], [0.25]), boundary])
    losses, rows = losses_by_hand(
        *(teacher, [b"a", b"bc"], student, [b"a", b"b"], of_teacher[:2], of_student[:2]), eos=False, beta=0.0
    )
    # The only common end is that of `a`, and what follows the last one belongs to its group.
    assert rows.teacher_row.tolist() == [-1, -1] and losses.kd.tolist() == [0, 0]
    assert float(losses.means["dropped"][0]) == 2 and losses.means["residual_mass"] == (0, 0)


def test_tokens_astride_the_prompts_end():
    """The teacher's first token holds the prompt's last space, the student's does not: an interior row."""
    teacher, student = Vocabulary(b" a", b" b", b"a"), Vocabulary(b"a", b"b")
    example = {"row": 1, **student.columns("", [b"a"], True), **teacher.columns("teacher_", [b" a"], True)}
    example["teacher_byte_ends"], example["teacher_byte_start"] = np.array([1, 2], dtype=np.int32), -1
    rows = ResponseCollator(student, teacher, "prefix")([example]).prefix_rows
    assert rows.interior.tolist() == [True, False] and rows.continued.tokens.tolist() == [0, 1]
