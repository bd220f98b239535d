"""Random tokenizers of every supported family, trained on random words, and random texts, as hypothesis strategies."""

import random
from dataclasses import dataclass

from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.unit.tokenizer_zoo import ZOO

HARD = (
    *("e\u0301", "a\u0308\u0323", "\u0301", "ﬁn", "①", "½", "İ", "ß", "ẞ", "Σς", "ǅ", "²", "١٢", "가", "각", "क्षि"),
    *("😀", "👩‍👩‍👧", "🇫🇷", "❤️", "🏳️‍🌈", "\u200d", "\ufe0f", "﷽", "𒀀", "\u200b", "\ufeff", "\u3000", "\xa0", "\xad"),
    *("\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028", "\r\n", "\n\n", "\r", "\t\t", "  ", "        "),
    *("''", "``", " ''"),
    *("▁", "Ġ", "##", "##a", "<0x0A>", "</s>", "<s>", "<unk>", "<|endoftext|>", "[SEP]", "[UNK]", "<|x|>", "."),
)
NORMALISERS = {
    "NFC": normalizers.NFC,
    "NFKC": normalizers.NFKC,
    "NFD": normalizers.NFD,
    "lower case": normalizers.Lowercase,
    "no accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "quotes": lambda: normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]),
}

pieces = st.one_of(
    st.text(alphabet="abcdehlotsABT'-.,", min_size=1, max_size=6),
    st.text(alphabet="abcdehlotsABT'-.,", min_size=1, max_size=6),
    st.text(alphabet="0123456789", min_size=1, max_size=5),
    st.text(alphabet="éüñÅçøяЖ", min_size=1, max_size=4),
    st.text(alphabet="日本語中文한국カ。", min_size=1, max_size=4),
    st.text(alphabet=" \t\n\r", min_size=1, max_size=5),
    st.sampled_from(HARD),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3),
)
words = st.lists(pieces, min_size=3, max_size=8)


def texts(words: list[str], max_pieces: int = 10, min_pieces: int = 0) -> st.SearchStrategy[str]:
    """Texts of the given words, which tokenizers were trained on, spaces, and pieces that they have not seen."""
    part = st.one_of(st.sampled_from(words), st.just(" "), pieces)
    return st.lists(part, min_size=min_pieces, max_size=max_pieces).map("".join)


@dataclass(frozen=True)
class RandomTokenizer:
    """A tokenizer, and how it was made, for the message of a test that fails."""

    tokenizer: PreTrainedTokenizerFast
    style: str  # a key of tokenizer_zoo.ZOO
    options: dict
    added: tuple[str, ...]  # all tokens that are looked for in a text before it is tokenised

    def __repr__(self) -> str:
        return f"RandomTokenizer({self.style}, {self.options})"

    def keeps(self, text: str) -> bool:
        """Must the forms of the text's tokens, joined, be the text, but for one space in front?"""
        return (
            self.style != "wordpiece"
            and self.options["normaliser"] is None
            and self.options["complete"]
            and not any(token in text for token in self.added)  # they may take or get white space beside them
            and (self.style == "byte-level-bpe" or "▁" not in text)
            and (self.style != "unigram" or "<0x" not in text)  # it takes such letters for the byte they name
        )


@st.composite
def tokenizers(draw, words: list[str], styles: tuple[str, ...] = tuple(ZOO)) -> RandomTokenizer:
    """A tokenizer of at most some 300 tokens, trained on texts of these words."""
    style = draw(st.sampled_from(styles))
    flag = st.booleans()
    options = {
        "seed": draw(st.integers(0, 999)),
        "spaced": draw(flag),  # words of the training texts stand apart
        "merges": draw(st.integers(0, 35)),
        "normaliser": draw(st.sampled_from([None] * 4 + sorted(NORMALISERS))),
        "complete": draw(flag) or draw(flag),  # every byte has a token
        "longest": draw(st.sampled_from([None, 2, 4])),
        "digits": draw(flag),  # each digit is a token
        "dummy": draw(st.sampled_from(["none", "first", "always"])),  # space in front of a text
        "template": draw(st.sampled_from(["none", "bos", "bos eos"])),
        "trim": draw(flag),
        "roles": draw(st.sampled_from(["all", "no pad", "eos is bos"])),
    }
    tokenizer = _trained(style, options, words)
    backend = tokenizer.backend_tokenizer
    _split_and_normalise(backend, style, options)

    options["added"] = draw(st.lists(_added_tokens(words), max_size=2)) if draw(flag) else []
    for token in options["added"]:
        tokenizer.add_tokens([token], special_tokens=token.special)
    if options["roles"] == "no pad":
        tokenizer.pad_token = None
    if options["roles"] == "eos is bos":
        tokenizer.bos_token = tokenizer.eos_token
    _add_template(tokenizer, options)
    added = tuple(token.content for token in backend.get_added_tokens_decoder().values())
    return RandomTokenizer(tokenizer, style, options, added)


def _added_tokens(words: list[str]) -> st.SearchStrategy[AddedToken]:
    # The library panics over a token of which a normaliser leaves nothing; and nobody declares a byte token special.
    usable = [word for word in words if "<0x" not in word and any(c.isalnum() or c.isspace() for c in word)]
    content = st.sampled_from([*usable, "<|x|>", "  ", "\n\n", "foo"])
    flag = st.booleans()
    return st.builds(
        AddedToken, content=content, special=flag, lstrip=flag, rstrip=flag, single_word=flag, normalized=flag
    )


def _trained(style: str, options: dict, words: list[str]) -> PreTrainedTokenizerFast:
    choose = random.Random(options["seed"])
    gap = " " if options["spaced"] else ""
    corpus = [gap.join(choose.choices(words, k=choose.randint(2, 8))) for _ in range(8)]
    merges, longest, complete = options["merges"], options["longest"], options["complete"]
    n_characters = len(set("".join(corpus)) | {"▁"})
    if style == "wordpiece":
        return ZOO[style](corpus, 5 + 2 * n_characters + merges)
    if style == "byte-level-bpe":
        return ZOO[style](corpus, 257 + merges if complete else 40 + merges, all_bytes=complete, longest=longest)
    size = 3 + 256 * complete + n_characters + merges + 4
    return ZOO[style](corpus, size, byte_fallback=complete, longest=longest or 16)


def _split_and_normalise(backend, style: str, options: dict) -> None:
    """Replace the tokenizer's normaliser and pre-tokenizer by those of the options."""
    steps = [] if options["normaliser"] is None else [NORMALISERS[options["normaliser"]]()]
    splits = [pre_tokenizers.Digits(individual_digits=True)] if options["digits"] else []
    if style == "byte-level-bpe":
        # A prefix space goes to every part that the pre-tokenizers before have split.
        prefix_space = options["dummy"] != "none" and not splits
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=options["dummy"] != "always"))
    elif style == "wordpiece":
        steps.append(normalizers.BertNormalizer(lowercase=options["dummy"] != "none"))
        splits.append(pre_tokenizers.BertPreTokenizer())
    elif options["dummy"] == "always":  # as in Llama-2: every stretch between added tokens gets a space
        steps += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    else:
        scheme = "first" if options["dummy"] == "first" else "never"
        splits.insert(0, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=options["spaced"]))
    backend.normalizer = normalizers.Sequence(steps) if steps else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else None


def _add_template(tokenizer: PreTrainedTokenizerFast, options: dict) -> None:
    """BOS in front of a text and EOS behind it, as far as wanted and there."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    front = [bos] if bos is not None and options["template"] != "none" else []
    behind = [eos] if options["template"] == "bos eos" else []
    backend = tokenizer.backend_tokenizer
    template = processors.TemplateProcessing(
        single=[*front, "$A", *behind],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*front, *behind}],
    )
    # Trimmed offsets leave out the white space at either end of a token. (The library panics where bytes are missing.)
    trim = [processors.ByteLevel(trim_offsets=True)] if options["trim"] and options["complete"] else []
    backend.post_processor = processors.Sequence([*trim, template])
