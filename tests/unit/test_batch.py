"""The batch that methods read: which logits predict which tokens, and what depends on the text alone."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from modeling.errors import InputError
from modeling.text.alignment import Groups, byte_groups, dtw_groups, same_index_rows
from modeling.text.batch import ResponseCollator, example_key, require_same_tokens
from modeling.text.encoder import Encoder, prepare_example
from tests.unit.helpers import without_response
from tests.unit.tokenizer_zoo import load_real

TEXTS = [("Q: one\nA: ", "yes"), ("Q: another one\nA: ", "no, the naïve 😀 is  not")]
ALIGNMENTS = (None, "index", "byte", "dtw", "entropy_dtw", "prefix")


@pytest.fixture(scope="module")
def encoders():
    """The student's, and the teacher's."""
    return Encoder(load_real("qwen2")), Encoder(load_real("phi-3"))


def prepared(encoders, texts=TEXTS):
    return [prepare_example({"row": i, "prefix": p, "text": t}, encoders, 64) for i, (p, t) in enumerate(texts, 7)]


def collated(encoders, alignment=None):
    return ResponseCollator(*encoders, alignment)(prepared(encoders))


def response(example, prefix):
    return example[f"{prefix}input_ids"][example[f"{prefix}response_start"] :].tolist()


def test_either_side(encoders):
    examples, batch = prepared(encoders), collated(encoders)
    for side, prefix, encoder in zip((batch.student, batch.teacher), ("", "teacher_"), encoders):
        ids = [example[f"{prefix}input_ids"].tolist() for example in examples]
        width = max(map(len, ids))
        assert side.input_ids.tolist() == [row + [encoder.pad_id] * (width - len(row)) for row in ids]
        assert side.attention_mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in ids]
        responses = [response(example, prefix) for example in examples]
        assert side.labels.tolist() == [token for tokens in responses for token in tokens]
        assert side.example.tolist() == [b for b, tokens in enumerate(responses) for _ in tokens]
        assert side.lengths == list(map(len, responses))
        # The causal shift: what is said one place before a response token predicts it.
        assert torch.equal(side.input_ids.flatten()[side.predictor_rows + 1], side.labels)
        assert torch.equal(side.predictor_rows // width, side.example)
        for b, (example, ends, key) in enumerate(zip(examples, side.byte_ends, side.keys)):
            assert ends.dtype == np.int32 and ends.tolist() == example[f"{prefix}byte_ends"].tolist()
            assert key == example_key(ids[b], example[f"{prefix}response_start"])
    assert batch.rows == [7, 8] and batch.n_bytes == [3, len(TEXTS[1][1].encode())]
    assert ResponseCollator(encoders[0])(examples).teacher is None


def test_the_bytes_of_a_text_that_was_cut(encoders):
    """No EOS stands behind it."""
    example = prepare_example({"row": 1, "prefix": "Q\n", "text": "one two three"}, encoders[:1], 4)
    assert example["cut"] and ResponseCollator(encoders[0])([example]).n_bytes == [example["byte_ends"][-1]]


def test_what_each_alignment_adds(encoders):
    batches = {alignment: collated(encoders, alignment) for alignment in ALIGNMENTS}
    added = {"index_rows": "index", "token_distances": "entropy_dtw", "prefix_rows": "prefix"}
    for name, alignment in added.items():
        assert [a for a, batch in batches.items() if getattr(batch, name) is not None] == [alignment]
    assert [a for a, batch in batches.items() if batch.groups is not None] == ["byte", "dtw"]

    batch = batches["entropy_dtw"]
    lengths = list(zip(batch.teacher.lengths, batch.student.lengths))
    assert batches["index"].index_rows.tolist() == same_index_rows(lengths).tolist()
    ends = list(zip(batch.teacher.byte_ends, batch.student.byte_ends))
    equal = [
        dtw_groups(d.table, d.teacher_index, d.student_index, np.ones(m), np.ones(n))
        for d, (m, n) in zip(batch.token_distances, lengths)
    ]
    for alignment, groups in (("byte", [byte_groups(*pair) for pair in ends]), ("dtw", equal)):
        special = None
        if alignment == "byte":
            sides = zip(encoders[::-1], (batch.teacher, batch.student))
            special = tuple(encoder.forms.is_special[side.labels] for encoder, side in sides)
        expected, got = Groups.of(ends, groups, special), batches[alignment].groups
        assert torch.equal(got.packed, expected.packed)
        assert (got.one_to_one, got.aligned) == (expected.one_to_one, expected.aligned)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_example_without_a_response_is_padded_and_nothing_else(encoders, alignment):
    """Wherever it stands: all but the models' input is that of the others alone."""
    collator, (first, second) = ResponseCollator(*encoders, alignment), prepared(encoders)
    blank = without_response(first)
    alone, batch = collator([second]), collator([blank, second, blank])
    width = batch.student.input_ids.shape[1]
    assert batch.student.input_ids[0, : len(first["input_ids"])].tolist() == first["input_ids"].tolist()
    assert torch.equal(batch.student.predictor_rows, alone.student.predictor_rows + width)
    assert describe(batch, models=False) == describe(alone, models=False)
    empty = collator([blank])
    assert len(empty.student.input_ids) == 1 and empty.rows == empty.n_bytes == empty.student.lengths == []
    for tensor in (empty.student.predictor_rows, empty.student.labels, empty.teacher.example):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64
    assert empty.groups is None or len(empty.groups) == 0


def describe(value, models=True, made=lambda tensor: tensor):
    """All that is in a batch, as lists; `made` is applied to its tensors. Without the models' input, where asked."""
    if is_dataclass(value):
        left_out = () if models else ("input_ids", "attention_mask", "predictor_rows")
        parts = (f.name for f in fields(value) if f.name not in left_out)
        return {name: describe(getattr(value, name), models, made) for name in parts}
    if isinstance(value, torch.Tensor):
        return made(value).tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [describe(part, models, made) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_moving_a_batch_keeps_all_of_it(encoders, alignment, monkeypatch):
    """To a device, and to pinned memory (here a copy in its place, as there may be no accelerator)."""
    batch, pinned = collated(encoders, alignment), []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def is_pinned(tensor):
        assert any(tensor is copy or tensor._base is copy for copy in pinned)
        return tensor

    def on_meta(tensor):
        assert tensor.device.type == "meta"
        return torch.zeros(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert describe(batch.pin_memory(), made=is_pinned) == describe(batch)
    assert describe(batch.to("cpu", non_blocking=True)) == describe(batch)
    describe(batch.to("meta"), made=on_meta)


def test_padding_with_eos_is_masked_and_eos_itself_is_learnt():
    gpt2 = Encoder(load_real("gpt2"))  # has no pad token
    assert gpt2.pad_id == gpt2.eos_id
    side = ResponseCollator(gpt2)(prepared([gpt2], [("a b c", " d"), ("a", " d")])).student
    assert side.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert side.input_ids[1, 2:].tolist() == [gpt2.eos_id] * 3
    assert side.labels[side.example == 1].tolist()[1:] == [gpt2.eos_id]


def test_an_example_is_known_by_its_tokens():
    key = example_key(np.array([5, 6, 7, 8]), 2)
    assert len(key) == 16
    assert example_key([5, 6, 7, 8], np.int64(2)) == key  # whatever holds the numbers
    assert example_key(np.array([5, 6, 7, 8], dtype=np.int32), 2) == key
    others = [([5, 6, 7, 9], 2), ([6, 5, 7, 8], 2), ([5, 6, 7, 8], 3), ([5, 6, 7], 2), ([5, 6, 7, 8, 0], 2)]
    assert len({key, *(example_key(np.array(ids), start) for ids, start in others)}) == 6


def test_responses_of_other_tokens_name_their_row(encoders):
    student, _ = encoders
    require_same_tokens(collated((student, student)))
    same = prepared((student, student))
    for ends in ([3, 4], same[1]["byte_ends"][:-1].tolist()):
        same[1]["teacher_byte_ends"] = np.array(ends)
        same[1]["teacher_response_start"] = len(same[1]["teacher_input_ids"]) - len(ends)
        with pytest.raises(InputError, match=rf"Row 8 .* response tokens and the teacher {len(ends)}, "):
            require_same_tokens(ResponseCollator(student, student)(same))
    same[1]["teacher_byte_ends"] = np.append(same[1]["byte_ends"][1:], 99)  # as many, which end elsewhere
    same[1]["teacher_response_start"] = same[1]["response_start"]
    with pytest.raises(InputError, match="Row 8"):
        require_same_tokens(ResponseCollator(student, student)(same))
