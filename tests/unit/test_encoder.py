"""Tokenising one side, cutting, and what must be the same tokenizer, on small trained tokenizers and the real ones."""

import json
from itertools import islice

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from modeling.errors import InputError
from modeling.text.encoder import Encoder, encode_pair, prepare_example, require_same_tokenizer
from modeling.text.rows import alpaca_prompt
from tests.unit.tokenizer_zoo import (
    REAL_TOKENIZERS,
    ZOO,
    byte_level_bpe,
    load_real,
    real_dir,
    sentencepiece_bpe,
    unigram,
    wordpiece,
)


@pytest.fixture(scope="module")
def small():
    return {name: Encoder(train()) for name, train in ZOO.items()}


@pytest.fixture(scope="module")
def real():
    real_dir()
    return {name: Encoder(load_real(name)) for name in REAL_TOKENIZERS}


def pieces(encoder: Encoder, encoded) -> list[bytes]:
    return [encoder.forms.forms[i] for i in encoded.input_ids[encoded.response_start :]]


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_the_response_is_the_text_then_eos(real, name):
    encoder = real[name]
    encoded = encoder.encode("Q: say it\n", "I say “é😀”.\n\n  Then\ttab")
    assert encoded.input_ids[-1] == encoder.eos_id
    assert b"".join(pieces(encoder, encoded)[:-1]) == "I say “é😀”.\n\n  Then\ttab".encode()
    assert encoded.byte_ends[-1] == len("I say “é😀”.\n\n  Then\ttab".encode()) + 1
    # Every token ends where its bytes say.
    lengths = [len(piece) for piece in pieces(encoder, encoded)[:-1]]
    assert encoded.byte_ends[:-1].tolist() == np.cumsum(lengths).tolist()


def test_hand_computed_ends(real):
    # qwen2 reads "é" (2 bytes) as one token and the rare "𒀀" (4 bytes) as several; both sides meet after each.
    for name in ("qwen2", "phi-3"):
        ends = real[name].encode("x:\n", "é𒀀.").byte_ends.tolist()
        assert ends[-1] == 8 and {2, 6, 7} <= set(ends), (name, ends)
        assert ends == sorted(ends)


def test_what_the_tokenizer_puts_in_front_is_kept_once(real):
    assert real["phi-3"].encode("a", "b").input_ids[0] == real["phi-3"].tokenizer.bos_token_id
    assert real["opt"].encode("a", "b").input_ids.tolist().count(2) == 2  # </s> in front, </s> as EOS behind
    assert real["qwen2"].encode("a", " b").input_ids.tolist() == [64, 293, real["qwen2"].eos_id]


def test_a_token_astride_the_border_belongs_to_the_response(real):
    # Qwen2 reads "hello" as one token, so with the prefix "hel" nothing of the prompt is left in front.
    encoded = real["qwen2"].encode("say hel", "lo you")
    tokens = real["qwen2"].tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.response_start :])
    assert tokens[0] == "Ġhello" and encoded.byte_ends.tolist() == [2, 6, 7] and encoded.byte_start == -4
    assert real["qwen2"].encode("say", " hello").byte_start == 0


def test_the_first_token_of_all_cannot_be_predicted(real):
    encoded = real["qwen2"].encode("", "hello you")
    assert encoded.response_start == 1 and encoded.byte_ends.tolist() == [9, 10] and encoded.byte_start == 5
    encoded = real["phi-3"].encode("", "hello you")  # BOS stands in front of it
    assert encoded.response_start == 1 and encoded.byte_ends.tolist() == [5, 9, 10] and encoded.byte_start == 0


def test_trailing_whitespace_in_a_token_counts(real):
    # Llama-3 has the token ".\n\n", whose reported offsets leave the newlines out.
    encoded = real["llama-3"].encode("Say:\n", "One.\n\nTwo.")
    assert encoded.byte_ends.tolist() == [3, 6, 9, 10, 11]


def test_a_normaliser_that_changes_the_text(small, real):
    # Qwen2 composes "e" + U+0301 (3 bytes) into "é" (2 bytes); ends count the bytes of the text that was given.
    encoded = real["qwen2"].encode("x:\n", "cafe\u0301 au lait")
    assert encoded.byte_ends[-1] == len("cafe\u0301 au lait".encode()) + 1
    assert {6, 9, 14} <= set(encoded.byte_ends.tolist())
    # The small WordPiece lower-cases and drops white space.
    encoded = small["wordpiece"].encode("Say:\n", "The  Cat")
    assert encoded.byte_ends[-1] == 9 and 3 in encoded.byte_ends and encoded.byte_ends[-2] == 8


def test_what_is_merged_or_dropped_behind_white_space_goes_with_it(small):
    # As XLNet: two quotes become one, whose offsets are those of the second; white space is split off, and comes back.
    xlnet = unigram(['a "b" a'] * 9, 300)
    quotes = [normalizers.Replace(written, '"') for written in ("``", "''")]
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    xlnet.backend_tokenizer.normalizer = normalizers.Sequence(quotes)
    xlnet.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    encoded = Encoder(xlnet).encode("a", " ``b '' a")
    tokens = xlnet.convert_ids_to_tokens(encoded.input_ids[encoded.response_start :])
    assert tokens == ["▁", '"', "b", "▁", '"', "▁", "a", "</s>"]
    assert encoded.byte_ends[[1, 2, 4, 6, 7]].tolist() == [3, 4, 7, 9, 10]
    assert 0 < encoded.byte_ends[0] < 3 and 4 < encoded.byte_ends[3] < 7 and 7 < encoded.byte_ends[5] <= 9
    # WordPiece drops control characters and white space.
    encoded = small["wordpiece"].encode("a", " b\x00 \x00\xadc \x00")
    assert encoded.byte_ends.tolist() == [3, 8, 11]


def test_a_byte_without_a_token_belongs_to_the_token_in_front(real):
    # This tokenizer knows the bytes of "ab" alone, drops others from a text, and counts its offsets without them.
    encoded = Encoder(byte_level_bpe(["ab"], 40, all_bytes=False)).encode("a", "éabxxab€")
    assert encoded.byte_ends.tolist() == [6, 11, 12]
    # SmolLM2 has no token for the control character U+0014.
    encoded = real["smollm2"].encode("x:\n", "one\x14two\x14, three")
    assert encoded.byte_ends.tolist() == [4, 8, 9, 15, 16]
    # A byte that a special token alone holds is part of it where it stands.
    tokenizer = wordpiece()
    tokenizer.add_tokens(["A", AddedToken("0\f", special=True, normalized=True)])
    assert Encoder(tokenizer).encode("", "A0\f").byte_ends.tolist() == [1, 3, 4]


def test_part_of_a_character_behind_white_space_that_no_token_holds():
    # The added token takes the white space behind it, and trimmed offsets leave it out. "ж" is two byte tokens.
    tokenizer = sentencepiece_bpe(["ab"], 300)
    tokenizer.add_tokens([AddedToken("A", rstrip=True, normalized=False)])
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = Encoder(tokenizer).encode("", "bA  ж")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["b", "A", "<0xD0>", "<0xB6>", "</s>"]
    assert encoded.byte_ends[0] == 2 and 4 <= encoded.byte_ends[1] < 6 and encoded.byte_ends[2:].tolist() == [6, 7]


def test_a_text_of_which_the_tokenizer_leaves_nothing(small):
    # WordPiece drops white space; what its template puts around nothing, [CLS] [SEP], is dropped as well.
    encoded = small["wordpiece"].encode("", " \n")
    assert encoded.input_ids.tolist() == [small["wordpiece"].eos_id] and not len(encoded.byte_ends)
    assert encode_pair([small["wordpiece"]], "", " \n", 16) is None


def brute_force_cut(encoders, prefix, text, block_size):
    """The longest beginning that fits, and its tokens."""
    for cut in range(len(text), 0, -1):
        encoded = [e.encode(prefix, text[:cut], eos=False) for e in encoders]
        if all(len(e.input_ids) <= block_size for e in encoded):
            return text[:cut], encoded
    raise ValueError("nothing fits")


@pytest.mark.parametrize("pair", [("qwen2", "phi-3"), ("opt", "llama-3"), ("gemma-2", "llama-2")])
def test_a_long_example_is_cut_to_the_longest_beginning_that_fits(real, pair):
    encoders = [real[name] for name in pair]
    with (real_dir() / "data/dolly/databricks-dolly-15k.jsonl").open() as file:
        rows = [json.loads(line) for line in islice(file, 400)]
    checked = 0
    for row in rows:
        if checked == 6:
            break
        prefix, text = alpaca_prompt(row["instruction"]), row["response"] + " 日本語 😀 naïve"
        whole = [e.encode(prefix, text) for e in encoders]
        if len(text) > 250 or max(e.response_start for e in whole) >= 63:
            continue
        encoded = encode_pair(encoders, prefix, text, 64)
        if all(len(e.input_ids) <= 64 for e in whole):
            assert all((a.input_ids == b.input_ids).all() for a, b in zip(encoded, whole))
            continue
        cut, expected = brute_force_cut(encoders, prefix, text, 64)
        checked += 1
        for side, want, encoder in zip(encoded, expected, encoders):
            assert side.input_ids.tolist() == want.input_ids.tolist()
            assert side.input_ids[-1] != encoder.eos_id
            assert side.byte_ends[-1] == len(cut.encode())
    assert checked == 6


def test_a_prompt_that_fills_the_block_leaves_the_example_out(real):
    encoders = [real["qwen2"], real["phi-3"]]
    assert encode_pair(encoders, "word " * 40, "answer", 16) is None
    assert encode_pair(encoders, "word ", "", 16) is None
    row = prepare_example({"row": 7, "prefix": "word " * 40, "text": "answer"}, encoders, 16)
    assert row["row"] == 7 and len(row["byte_ends"]) == 0 and len(row["teacher_byte_ends"]) == 0


def test_only_the_eos_does_not_fit(real):
    encoders = [real["qwen2"]]
    n = len(encoders[0].encode("ab ", "cd ef").input_ids)
    (encoded,) = encode_pair(encoders, "ab ", "cd ef", n - 1)
    assert encoded.byte_ends[-1] == 5 and encoded.input_ids[-1] != encoders[0].eos_id


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="declares no EOS token"):
        Encoder(tokenizer)


class TestSameTokenizer:
    def test_names_classes_special_flags_and_the_declared_eos_do_not_matter(self):
        student, teacher = Encoder(byte_level_bpe()), byte_level_bpe()
        teacher.name_or_path = "another/name"
        teacher.eos_token, teacher.pad_token = "!", None
        teacher = Encoder(teacher)
        assert teacher.eos_id != student.eos_id
        require_same_tokenizer(student, teacher)

    def test_the_first_id_that_differs_is_named(self):
        student, teacher = byte_level_bpe(), byte_level_bpe()
        teacher.name_or_path = "another/name"
        teacher.add_tokens(["<one more>"])
        differs = f"id {len(student)} is no token in the student's and '<one more>' in the teacher's"
        with pytest.raises(InputError, match=differs):
            require_same_tokenizer(Encoder(student), Encoder(teacher))
        with pytest.raises(InputError) as error:
            require_same_tokenizer(Encoder(student), Encoder(sentencepiece_bpe()))
        for part in (
            *("'zoo/byte-level-bpe'", "'zoo/sentencepiece-bpe'", "id 0 is '<|endoftext|>' in the student's"),
            *("'<unk>' in the teacher's", "run_clm_distill_CDM.py", "run_clm_MinED.py", "run_clm_uld.py"),
        ):
            assert part in str(error.value)

    def test_real_ones(self, real):
        require_same_tokenizer(real["qwen2"], Encoder(load_real("qwen2")))
        with pytest.raises(InputError, match="id 0 is "):
            require_same_tokenizer(real["qwen2"], real["phi-3"])
