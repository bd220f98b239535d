"""Small tokenizers of every supported family, trained on the spot, and the real ones where at hand."""

import functools
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

REAL_TOKENIZERS = ("phi-3", "qwen2", "llama-3", "gemma-2", "opt", "gpt2", "llama-2", "smollm2")

SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs on.",
    "She sells sea shells by the sea shore; the shells she sells are surely sea shells.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\n",
    "A café in Zürich serves crème brûlée; “déjà vu”, said the naïve visitor.",
    "1234567890 + 42 = 1234567932, and 3.14159 is nearly pi.",
    "for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(i)\n",
    "東京は日本の首都です。 Москва — столица России.",
)


def real_dir() -> Path:
    """The folder with the real tokenizers and data; skips the test where CDM_REAL_DIR does not name it."""
    folder = os.environ.get("CDM_REAL_DIR")
    if not folder:
        pytest.skip("CDM_REAL_DIR is not set: it names the folder with the real tokenizers and data")
    return Path(folder)


@functools.cache
def _load(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def load_real(name: str):
    """One of REAL_TOKENIZERS, loaded once a session. Do not change it: tests share it."""
    return _load(real_dir() / "tokenizers" / name)


def byte_level_bpe(
    texts=SAMPLE_TEXTS, vocab_size: int = 400, all_bytes: bool = True, longest: int | None = None
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: every byte is a token (or only those in the texts), nothing is added to a text, EOS pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        special_tokens=["<|endoftext|>"],
        max_token_length=longest,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, "zoo/byte-level-bpe", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def sentencepiece_bpe(
    texts=SAMPLE_TEXTS, vocab_size: int = 600, byte_fallback: bool = True, longest: int | None = None
) -> PreTrainedTokenizerFast:
    """Llama-2's kind: `▁` for a space, a dummy prefix space, byte fallback, BOS in front of a text."""
    byte_tokens = _byte_tokens() if byte_fallback else []
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3 - len(byte_tokens), max_token_length=longest, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _sentencepiece_decoder(byte_fallback)
    _put_in_front(tokenizer, "<s>", 1)
    return _wrap(
        tokenizer,
        "zoo/sentencepiece-bpe",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def unigram(
    texts=SAMPLE_TEXTS, vocab_size: int = 500, byte_fallback: bool = True, longest: int = 16
) -> PreTrainedTokenizerFast:
    """SentencePiece's other model, with byte fallback; a dummy space and nothing else is added to a text."""
    byte_tokens = _byte_tokens() if byte_fallback else []
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 3 - len(byte_tokens),
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        max_piece_length=longest,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in pieces) - 10.0
    tokenizer = Tokenizer(
        models.Unigram([*pieces, *((token, lowest) for token in byte_tokens)], unk_id=2, byte_fallback=byte_fallback)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = _sentencepiece_decoder(byte_fallback)
    return _wrap(tokenizer, "zoo/unigram", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def wordpiece(texts=SAMPLE_TEXTS, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, `##` continuations, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return _wrap(
        tokenizer,
        "zoo/wordpiece",
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


ZOO = {
    "byte-level-bpe": byte_level_bpe,
    "sentencepiece-bpe": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece_decoder(byte_fallback: bool):
    bytes_back = [decoders.ByteFallback()] if byte_fallback else []
    return decoders.Sequence(
        [decoders.Replace("▁", " "), *bytes_back, decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )


def _put_in_front(tokenizer: Tokenizer, token: str, token_id: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def _wrap(tokenizer: Tokenizer, name: str, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, name_or_path=name, clean_up_tokenization_spaces=False, **roles
    )
