"""Prefix search against brute force, on made, random and real vocabularies."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from get_vocab_mapper.prefix_search import PrefixSearch
from get_vocab_mapper.token_forms import TokenForms, token_forms
from tests.unit.random_tokenizers import tokenizers, words
from tests.unit.tokenizer_zoo import REAL_TOKENIZERS, load_real


def made(forms, special=(), fallback=()) -> TokenForms:
    flags = [np.isin(range(len(forms)), list(ids)) for ids in (special, fallback)]
    return TokenForms("made", [bytes(form) for form in forms], *flags, {})


def taking_part(forms: TokenForms) -> list[int]:
    """By form, equal ones by preference."""
    ids = [i for i, form in enumerate(forms.forms) if form and not forms.is_special[i]]
    return sorted(ids, key=lambda i: (forms.forms[i], forms.is_byte_fallback[i], i))


def beginning_with(forms: TokenForms, prefix: bytes) -> list[int]:
    return [i for i in taking_part(forms) if forms.forms[i].startswith(prefix)]


def longest(forms: TokenForms, text: bytes) -> int:
    found = [i for i in taking_part(forms) if text.startswith(forms.forms[i])]
    best = max((len(forms.forms[i]) for i in found), default=0)
    return next((i for i in found if len(forms.forms[i]) == best), -1)


def check(forms: TokenForms, texts: list[bytes]) -> None:
    search = PrefixSearch(forms)
    assert search.order.tolist() == taking_part(forms)
    assert search.longest_of_each(texts).tolist() == [longest(forms, text) for text in texts]
    assert search.longest_of_each(sorted(texts)).tolist() == [longest(forms, text) for text in sorted(texts)]
    for text in texts:
        lo, hi = search.beginning_with(text)
        assert search.order[lo:hi].tolist() == beginning_with(forms, text)
        assert search.longest(text) == longest(forms, text)


few_bytes = st.lists(st.sampled_from([0, 1, 97, 98, 255]), max_size=5).map(bytes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_bytes(data):
    """Equal forms, empty ones, bytes that are no UTF-8, zero bytes at the end of a form."""
    forms = data.draw(st.lists(few_bytes, max_size=14))
    ids = st.sets(st.integers(0, max(len(forms) - 1, 0)))
    texts = data.draw(st.lists(few_bytes, min_size=1, max_size=6))
    check(made(forms, data.draw(ids), data.draw(ids)), texts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_tokenizers(data):
    forms = token_forms(data.draw(tokenizers(data.draw(words))).tokenizer)
    pieces = st.sampled_from(forms.forms)
    check(forms, data.draw(st.lists(st.builds(lambda a, b: a + b[:2], pieces, pieces), min_size=1, max_size=12)))


def test_by_hand():
    forms = made([b"a", b"ab", b"ab", b"abc", b"", b"b", b"abd", b"a\x00"], special=[5], fallback=[1])
    search = PrefixSearch(forms)
    assert search.order.tolist() == [0, 7, 2, 1, 3, 6]
    assert search.longest(b"abx") == 2  # of two equal ones not the byte-fallback token
    assert search.longest(b"a\x00\x00") == 7 and search.longest(b"a") == 0 and search.longest(b"ba") == -1
    assert search.beginning_with(b"ab") == (2, 6) and search.beginning_with(b"") == (0, 6)
    assert search.beginning_with(b"abcd") == (5, 5)


def test_an_empty_vocabulary():
    search = PrefixSearch(made([b"x", b""], special=[0]))
    assert search.longest(b"x") == -1 and search.beginning_with(b"x") == (0, 0)
    assert search.longest_of_each([]).tolist() == []


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_real_vocabularies(name):
    """Every slice and longest token of a sample of beginnings, by a scan over the vocabulary."""
    forms, random = token_forms(load_real(name)), np.random.default_rng(0)
    search = PrefixSearch(forms)
    ids = random.choice(len(forms), 40, replace=False)
    texts = [forms.forms[i] + forms.forms[k] for i, k in zip(ids, ids[::-1])]
    texts += [b" ", b"1", b"\xe2\x80", b"\xff", b"\t", forms.forms[ids[0]][:1]]
    order = taking_part(forms)
    assert search.order.tolist() == order
    preferred = {forms.forms[i]: i for i in reversed(order)}
    for text in texts:
        lo, hi = search.beginning_with(text)
        assert search.order[lo:hi].tolist() == [i for i in order if forms.forms[i].startswith(text)]
        prefixes = [text[:n] for n in range(len(text), 0, -1) if text[:n] in preferred]
        assert search.longest(text) == (preferred[prefixes[0]] if prefixes else -1)
    # Of every token's form it is the token itself, or the one that is written for it.
    found = search.longest_of_each([forms.forms[i] for i in order])
    assert found.tolist() == [preferred[forms.forms[i]] for i in order]


def test_a_large_vocabulary_is_sorted_in_time():
    forms = token_forms(load_real("gemma-2"))
    assert len(forms) == 256_000 and len(forms.by_preference) and len(forms.lengths)
    took = []
    for _ in range(3):
        start = time.process_time()
        PrefixSearch(forms)
        took.append(time.process_time() - start)
    assert min(took) < 2
