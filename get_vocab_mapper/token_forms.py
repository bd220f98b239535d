"""The bytes that each token of a vocabulary stands for: the one form in which tokens are compared.

Two tokenizers write the same piece of text differently: ` the` is `Ġthe` in a byte-level vocabulary and
`▁the` in a SentencePiece one. `token_forms` undoes such marks, so that tokens of any two tokenizers can be
compared as bytes. The rules are read off the tokenizer's own model and decoder, so a tokenizer needs no
entry in any table here.

For every text, the forms of its tokens joined give the text's bytes, as the tokenizer's normaliser left them.
Two differences remain, and both are white space: a SentencePiece tokenizer may put one space in front of the
text, and a WordPiece tokenizer drops the white space that was there and its forms put one space before
every piece that starts a word.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROLES = ("eos", "bos", "pad", "unk")

_SUPPORTED = (
    "Supported are fast tokenizers that decode with ByteLevel (GPT-2, Llama-3, Qwen), with Metaspace or "
    "Replace and ByteFallback (SentencePiece: Llama-2, Phi-3, Gemma, T5), or with WordPiece (BERT)."
)


@dataclass(frozen=True)
class TokenForms:
    """The byte forms of one tokenizer's vocabulary, indexed by token id.

    Attributes:
        name: the tokenizer's `name_or_path`, for messages.
        forms: V byte strings. An id that the tokenizer does not use has the form b"" and counts as special.
        is_special: bool array [V]; such a token is never compared by edit distance or prefix.
        is_byte_fallback: bool array [V]; such a token (`<0x30>`) is a byte in a vocabulary of characters, which
            text is written with only where the vocabulary has no other token for it.
        roles: id of the tokens that the tokenizer declares as "eos", "bos", "pad" and "unk", in this order;
            a role that it does not declare is left out.
    """

    name: str
    forms: list[bytes]
    is_special: np.ndarray
    is_byte_fallback: np.ndarray
    roles: dict[str, int]

    def __len__(self) -> int:
        return len(self.forms)

    @cached_property
    def texts(self) -> list[str]:
        """V strings: each form as UTF-8, or as Latin-1 (one character a byte) where it is not valid UTF-8."""
        return [_read(form) for form in self.forms]

    @cached_property
    def spaceless(self) -> list[str]:
        """V strings: `texts` without U+0020. Other white space stays."""
        return [text.replace(" ", "") for text in self.texts]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 array [V]: the number of bytes of each form."""
        return np.fromiter(map(len, self.forms), dtype=np.int32, count=len(self.forms))

    @cached_property
    def by_preference(self) -> np.ndarray:
        """int64 array [V]: all ids in growing order, the byte-fallback tokens behind all others.

        Wherever ids of equal form compete, the first one in this order wins: it is the one that text is written with.
        """
        return np.argsort(self.is_byte_fallback, kind="stable")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that a map by text depends on: forms, special and byte-fallback flags, in id order.

        Roles are left out on purpose: a pad token that is set to EOS for batching changes no form.
        """
        digest = hashlib.sha256()
        digest.update(len(self.forms).to_bytes(8, "little"))
        digest.update(self.lengths.astype("<u4").tobytes())  # where each form ends in the joined bytes
        for flags in (self.is_special, self.is_byte_fallback):
            digest.update(np.asarray(flags, dtype=np.uint8).tobytes())
        digest.update(b"".join(self.forms))
        return digest.hexdigest()


def token_forms(tokenizer) -> TokenForms:
    """Read the byte form of every token off a fast tokenizer.

    Args:
        tokenizer: a transformers tokenizer backed by the `tokenizers` library.

    A special token keeps its literal text, and so does any other added token, unless the model's own
    vocabulary holds it too: then the model can produce it from text (in Gemma `▁▁` is an added token, and
    still what two spaces become), and it is read like the model's other tokens.

    Raises:
        ValueError: the tokenizer has no fast backend, or its decoder is none of the supported ones.
    """
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "decoder"):
        raise ValueError(
            f"Tokenizer {name!r} ({type(tokenizer).__name__}) has no fast backend (no tokenizer.json), which says "
            f"what its tokens stand for. Use a model that has one. {_SUPPORTED}"
        )
    read_token, byte_tokens = _token_reader(backend, name)

    id_of_token = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    size = max(len(tokenizer), max(id_of_token.values(), default=-1) + 1, max(added, default=-1) + 1)

    forms = [b""] * size
    is_special = np.ones(size, dtype=bool)  # ids that no token claims stay so
    is_byte_fallback = np.zeros(size, dtype=bool)
    for token, token_id in id_of_token.items():
        forms[token_id] = read_token(token)
        is_special[token_id] = False
        is_byte_fallback[token_id] = token in byte_tokens
    special_ids = {token_id for token_id in tokenizer.all_special_ids if token_id is not None}
    for token_id, token in added.items():
        if token.special:
            special_ids.add(token_id)
        if token_id in special_ids or backend.model.token_to_id(token.content) != token_id:
            forms[token_id] = token.content.encode()
            is_special[token_id] = is_byte_fallback[token_id] = False
    is_special[list(special_ids)] = True

    roles = {}
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token", None)
        token_id = None if token is None else backend.token_to_id(str(token))
        if token_id is not None:
            roles[role] = token_id
    return TokenForms(name, forms, is_special, is_byte_fallback, roles)


def _read(form: bytes) -> str:
    try:
        return form.decode("utf-8")
    except UnicodeDecodeError:
        return form.decode("latin-1")


def _token_reader(backend, name: str) -> tuple[Callable[[str], bytes], dict[str, bytes]]:
    """The function from a token of the model's vocabulary to its bytes, as the decoder defines it, and the names of
    the byte-fallback tokens with their bytes."""
    # A component's pickled state is its part of tokenizer.json; writing out the whole file would be slow.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
    model = backend.model

    def unreadable(what: str) -> ValueError:
        return ValueError(
            f"Cannot read the token forms of {name!r}: {what} (model {type(model).__name__}, decoder "
            f"{json.dumps(decoder, ensure_ascii=False)}). {_SUPPORTED}"
        )

    if decoder is None:
        raise unreadable("it has no decoder")
    if getattr(model, "end_of_word_suffix", None):
        raise unreadable(f"its tokens carry an end-of-word mark, {model.end_of_word_suffix!r}")

    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    continuation = getattr(model, "continuing_subword_prefix", None)

    if "WordPiece" in kinds:
        mark = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        if kinds != {"WordPiece"} or not mark or continuation not in (None, mark):
            raise unreadable(f"its continuation marks do not agree (model {continuation!r}, decoder {mark!r})")
        return _wordpiece_reader(mark), {}
    if continuation:
        raise unreadable(f"its tokens carry a continuation mark, {continuation!r}")

    if "ByteLevel" in kinds:
        if kinds - {"ByteLevel", "Fuse"}:
            raise unreadable("ByteLevel is mixed with other decoders")
        return _byte_level_reader(), {}

    replacements = []
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Strip" and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0:
            continue  # takes the dummy prefix space off the whole text: no token's own business
        elif step["type"] not in ("ByteFallback", "Fuse"):
            raise unreadable(f"decoder step {step['type']} has no byte form")
    if not replacements:
        raise unreadable("its decoder does not say how a space is written")
    byte_tokens = {}
    if "ByteFallback" in kinds or getattr(model, "byte_fallback", False):
        byte_tokens = {f"<0x{byte:{digits}}>": bytes([byte]) for byte in range(256) for digits in ("02X", "02x")}
    return _sentencepiece_reader(replacements, byte_tokens), byte_tokens


def _wordpiece_reader(mark: str) -> Callable[[str], bytes]:
    return lambda token: token[len(mark) :].encode() if token.startswith(mark) else b" " + token.encode()


def _byte_level_reader() -> Callable[[str], bytes]:
    """Undo GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    byte_of = {code: code for code in printable} | {0x100 + n: byte for n, byte in enumerate(others)}
    is_alphabetic = frozenset(map(chr, byte_of)).issuperset

    def read(token: str) -> bytes:
        # Like the decoder: a token with any character outside the alphabet is literal text.
        return token.translate(byte_of).encode("latin-1") if is_alphabetic(token) else token.encode()

    return read


def _sentencepiece_reader(replacements: list[tuple[str, str]], byte_tokens: dict[str, bytes]) -> Callable[[str], bytes]:
    def read(token: str) -> bytes:
        form = byte_tokens.get(token)
        if form is None:
            for written, meant in replacements:
                token = token.replace(written, meant)
            form = token.encode()
        return form

    return read
