"""Token forms: what each token stands for, and that the forms of a text's tokens give the text back."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from get_vocab_mapper.token_forms import TokenForms, token_forms
from tests.unit.tokenizer_zoo import REAL_TOKENIZERS, SAMPLE_TEXTS, ZOO, load_real, real_dir

HARD_TEXTS = (
    "Ça va, señor Müller? Ångström, naïve coöperation, e\u0301 against é.",
    "東京は日本の首都です。我们去北京吧！ 안녕하세요 세계",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇫🇷 and ❤️",
    "“curly” ‘quotes’ — dashes – and … dots",
    "\tone tab\t\ttwo tabs\n\n\nthree lines\r\nCRLF\r\n\r\n  indented\n    more",
    "control \x00\x01\x07\x1b[0m\x7f\x85\xa0\xad end",
    "_x and  x and   three spaces ",
    " leading space",
    "<0x0A is no byte token, nor is 0x0A>",
    "Ġthe Ċ Ã© are letters here",
    "⁂ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\u200d\ufeff\u2028\u2029 ﷽",
    "x" * 300 + " " * 70 + "=" * 130,
)


@pytest.fixture(scope="module")
def zoo():
    return {name: train() for name, train in ZOO.items()}


@pytest.fixture(scope="module")
def forms_of():
    cache = {}

    def get(tokenizer) -> TokenForms:
        if id(tokenizer) not in cache:
            cache[id(tokenizer)] = (
                token_forms(tokenizer),
                tokenizer,
            )  # the tokenizer too: its id stays taken
        return cache[id(tokenizer)][0]

    return get


def is_sentencepiece(tokenizer) -> bool:
    return "▁" in str(tokenizer.backend_tokenizer.decoder.__getstate__().decode())


def assert_gives_the_text_back(tokenizer, forms: TokenForms, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(forms.forms[token_id] for token_id in ids)
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalised = normalizer.normalize_str(text) if normalizer is not None else text
    if is_sentencepiece(tokenizer):
        expected = normalised.replace("▁", " ").encode()  # such a tokenizer cannot tell the two apart
        assert joined in (expected, b" " + expected)
    else:
        assert joined == normalised.encode()


def assert_gives_the_words_back(tokenizer, forms: TokenForms, text: str) -> None:
    """WordPiece drops white space, so only the rest can come back; and an unknown word is gone."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return
    joined = b"".join(forms.forms[token_id] for token_id in ids).decode()
    assert "".join(joined.split()) == "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())


def data_texts() -> list[str]:
    """Some rows of each kind of data, spread over the file."""
    texts = []
    for file, columns, step in (
        ("dolly/databricks-dolly-15k.jsonl", ("instruction", "context", "response"), 150),
        ("gsm8k/train.jsonl", ("question", "answer"), 100),
        ("mbpp/mbpp.jsonl", ("text", "code"), 10),
    ):
        lines = (real_dir() / "data" / file).read_text(encoding="utf-8").splitlines()
        for line in lines[::step]:
            row = json.loads(line)
            texts += [row[column] for column in columns if row[column]]
    return texts


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_real_tokenizers_give_real_and_hard_texts_back(name, forms_of):
    tokenizer = load_real(name)
    forms = forms_of(tokenizer)
    assert len(forms) == len(tokenizer) == len(forms.is_special)
    for text in (*HARD_TEXTS, *SAMPLE_TEXTS, *data_texts()):
        assert_gives_the_text_back(tokenizer, forms, text)


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(min_size=1))
def test_real_tokenizers_give_random_text_back(name, forms_of, text):
    tokenizer = load_real(name)
    forms = forms_of(tokenizer)
    # SmolLM2's vocabulary lacks some bytes, such as 0xF1, and the tokenizer drops them from a text.
    without_token = set(range(256)) - {form[0] for form in forms.forms if len(form) == 1}
    assume(name != "smollm2" or not without_token & set(text.encode()))
    assert_gives_the_text_back(tokenizer, forms, text)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"wordpiece"}))
@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_small_tokenizers_give_random_text_back(name, zoo, forms_of, text):
    for text_too in (text, *HARD_TEXTS, *SAMPLE_TEXTS):
        assert_gives_the_text_back(zoo[name], forms_of(zoo[name]), text_too)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="abcdefgh eoistn.,ÉX\n\t'-", min_size=1))
def test_wordpiece_gives_the_words_back(zoo, forms_of, text):
    tokenizer = zoo["wordpiece"]
    assume(tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"])
    for text_too in (text, *SAMPLE_TEXTS):
        assert_gives_the_words_back(tokenizer, forms_of(tokenizer), text_too)


@pytest.mark.parametrize(
    ("name", "token", "form"),
    [
        ("gpt2", "Ġthe", b" the"),
        ("gpt2", "Ċ", b"\n"),
        ("gpt2", "ĉ", b"\t"),
        ("gpt2", "Ã", b"\xc3"),
        ("opt", "</s>", b"</s>"),
        ("qwen2", "<|im_end|>", b"<|im_end|>"),
        ("qwen2", "<tool_call>", b"<tool_call>"),
        ("llama-3", "ĠĠĠĠ", b"    "),
        ("llama-3", "<|reserved_special_token_0|>", b"<|reserved_special_token_0|>"),
        ("llama-2", "▁the", b" the"),
        ("llama-2", "<0x0A>", b"\n"),
        ("llama-2", "<0xC3>", b"\xc3"),
        ("phi-3", "▁the", b" the"),
        ("phi-3", "<|end|>", b"<|end|>"),
        ("gemma-2", "<0x0D>", b"\r"),
        ("gemma-2", "▁▁", b"  "),  # an added token and still what two spaces become
        ("gemma-2", "<unused0>", b"<unused0>"),
    ],
)
def test_the_form_of_a_token(name, token, form, forms_of):
    tokenizer = load_real(name)
    assert forms_of(tokenizer).forms[tokenizer.get_vocab()[token]] == form


@pytest.mark.parametrize("name", [*REAL_TOKENIZERS, "byte-level-bpe", "sentencepiece-bpe", "unigram"])
def test_what_looks_alike_stays_apart(name, zoo, forms_of):
    tokenizer = zoo[name] if name in zoo else load_real(name)
    forms = forms_of(tokenizer)

    def joined(text: str) -> bytes:
        return b"".join(forms.forms[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])

    assert joined("_x") != joined(" x")
    assert joined("a\tb") != joined("a\nb")
    assert joined("a b") != joined("a\u00a0b")


def test_wordpiece_forms(zoo, forms_of):
    tokenizer = zoo["wordpiece"]
    forms = forms_of(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert forms.forms[vocabulary["the"]] == b" the"
    assert forms.forms[vocabulary["##o"]] == b"o"
    assert forms.forms[vocabulary["[CLS]"]] == b"[CLS]"


def test_special_tokens_and_roles_of_real_tokenizers(forms_of):
    phi = forms_of(load_real("phi-3"))
    assert list(phi.roles.items()) == [("eos", 32000), ("bos", 1), ("pad", 32000), ("unk", 0)]
    assert phi.is_special[[0, 1, 32000, 32010]].all()
    assert not phi.is_special[2]  # `</s>`, which this tokenizer does not flag
    qwen = forms_of(load_real("qwen2"))
    assert list(qwen.roles.items()) == [("eos", 151645), ("pad", 151643)]
    assert not qwen.is_special[load_real("qwen2").get_vocab()["<tool_call>"]]
    assert forms_of(load_real("llama-3")).is_special.sum() == 256
    gemma = forms_of(load_real("gemma-2"))
    assert gemma.is_special[:5].all()
    assert not gemma.is_special[5:100].any()


def test_added_tokens_keep_their_literal_text():
    for train in ZOO.values():
        tokenizer = train()
        literal = ["foo▁bar", "Ġfoo", "##foo", "<0xZZ>", "two  spaces", "日本"]
        tokenizer.add_tokens(literal)
        tokenizer.add_tokens([AddedToken("▁special", special=True)], special_tokens=True)
        forms = token_forms(tokenizer)
        ids = tokenizer.convert_tokens_to_ids(literal)
        assert [forms.forms[i].decode() for i in ids] == literal
        assert not forms.is_special[ids].any()
        special_id = tokenizer.convert_tokens_to_ids("▁special")
        assert forms.forms[special_id] == "▁special".encode()
        assert forms.is_special[special_id]


def test_byte_level_token_outside_the_byte_alphabet_is_literal():
    forms = token_forms(wrap(models.BPE({"Ġa": 0, "日": 1, "a b": 2}, []), decoders.ByteLevel()))
    assert forms.forms == [b" a", "日".encode(), b"a b"]


def test_byte_tokens_are_bytes_only_where_the_tokenizer_falls_back_to_bytes():
    vocabulary = {"<0x0A>": 0, "▁a": 1}
    with_fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model_falls_back = models.BPE(vocabulary, [], byte_fallback=True)
    for model, decoder, falls_back in (
        (models.BPE(vocabulary, []), with_fallback, True),
        (models.BPE(vocabulary, []), decoders.Metaspace(), False),
        (model_falls_back, decoders.Metaspace(), True),
        (model_falls_back, decoders.ByteLevel(), False),
    ):
        forms = token_forms(wrap(model, decoder))
        assert forms.forms[0] == (b"\n" if falls_back else b"<0x0A>")
        assert forms.is_byte_fallback.tolist() == [falls_back, False]


def test_byte_fallback_tokens_come_last_by_preference():
    vocabulary = {"0": 0, "<0x30>": 1, "<0x0A>": 2, "a": 3, "</s>": 4, "<0x61>": 5}
    tokenizer = wrap(models.BPE(vocabulary, [], byte_fallback=True), decoders.Metaspace())
    tokenizer.add_tokens([AddedToken("<0x61>", special=True)], special_tokens=True)  # now it is what it says
    forms = token_forms(tokenizer)
    assert forms.forms == [b"0", b"0", b"\n", b"a", b"</s>", b"<0x61>"]
    assert forms.is_byte_fallback.tolist() == [False, True, True, False, False, False]
    assert forms.by_preference.tolist() == [0, 3, 4, 5, 1, 2]


@pytest.mark.parametrize("name", ["phi-3", "llama-2", "gemma-2"])
def test_of_equal_forms_text_is_written_with_the_preferred_one(name, forms_of):
    tokenizer = load_real(name)
    forms = forms_of(tokenizer)
    assert forms.is_byte_fallback.sum() == {"gemma-2": 255}.get(name, 256)
    ids_of_form = {}
    for i in forms.by_preference.tolist():
        ids_of_form.setdefault(forms.forms[i], []).append(i)
    rivals = {form: ids for form, ids in ids_of_form.items() if forms.is_byte_fallback[ids[-1]] and form.isascii()}
    assert rivals[b"\n"] == tokenizer.convert_tokens_to_ids(["\n", "<0x0A>"] if name == "gemma-2" else ["<0x0A>"])
    for form, ids in rivals.items():
        written = tokenizer(f"a{form.decode()}b\n{form.decode()}\n", add_special_tokens=False)["input_ids"]
        assert ids[0] in written and not set(ids[1:]) & set(written)


def test_an_unused_id_is_empty_and_special():
    forms = token_forms(wrap(models.BPE({"a": 0, "b": 3}, []), decoders.ByteLevel()))
    assert forms.forms == [b"a", b"", b"", b"b"]
    assert forms.is_special.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("model", "decoder", "found"),
    [
        (models.BPE({"a": 0}, []), None, "no decoder"),
        (models.BPE({"a": 0}, []), decoders.CTC(), "CTC"),
        (models.BPE({"a": 0}, []), decoders.Fuse(), "how a space is written"),
        (models.BPE({"a": 0}, []), decoders.Replace(Regex("▁+"), " "), "Replace"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), decoders.BPEDecoder("</w>"), "</w>"),
        (models.BPE({"a": 0}, [], continuing_subword_prefix="@@"), decoders.ByteLevel(), "@@"),
        (
            models.BPE({"a": 0}, []),
            decoders.Sequence([decoders.ByteLevel(), decoders.Replace("▁", " ")]),
            "ByteLevel is mixed",
        ),
        (models.WordPiece({"a": 0}, unk_token="a"), decoders.WordPiece("@@"), "'@@'"),
    ],
)
def test_an_unreadable_tokenizer_is_refused(model, decoder, found):
    with pytest.raises(ValueError, match="Supported are fast tokenizers") as caught:
        token_forms(wrap(model, decoder))
    assert found in str(caught.value)
    assert "'some/name'" in str(caught.value)


def test_a_tokenizer_without_fast_backend_is_refused():
    class Slow:
        name_or_path = "some/slow"

    with pytest.raises(ValueError, match=r"'some/slow' \(Slow\) has no fast backend.*Supported are"):
        token_forms(Slow())


def test_texts_spaceless_and_lengths():
    forms = make([b" a b", b"\xc3", "é ".encode(), b" ", b"\t"])
    assert forms.texts == [" a b", "Ã", "é ", " ", "\t"]
    assert forms.spaceless == ["ab", "Ã", "é", "", "\t"]
    assert forms.lengths.tolist() == [4, 1, 3, 1, 1]
    assert forms.lengths.dtype == np.int32


def test_the_fingerprint_tells_vocabularies_apart():
    base = make([b"ab", b"c"])
    assert base.fingerprint == make([b"ab", b"c"]).fingerprint
    others = [
        make([b"a", b"bc"]),
        make([b"c", b"ab"]),
        make([b"ab", b"c", b""]),
        make([b"ab", b"c"], special=[0]),
        make([b"ab", b"c"], special=[1]),
        make([b"ab", b"c"], byte_fallback=[1]),
    ]
    assert len({forms.fingerprint for forms in (base, *others)}) == 7
    padded = TokenForms("other/name", base.forms, base.is_special, base.is_byte_fallback, {"pad": 1})
    assert padded.fingerprint == base.fingerprint


def make(forms: list[bytes], special=(), byte_fallback=()) -> TokenForms:
    is_special, is_byte_fallback = (np.isin(range(len(forms)), ids) for ids in (special, byte_fallback))
    return TokenForms("made", forms, is_special, is_byte_fallback, {})


def wrap(model, decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="some/name")
