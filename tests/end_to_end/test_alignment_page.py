"""The page of script_eval/show_alignment.py in a headless Chromium: what stands on it, and what pointing at it shows.

CDM_CHROMIUM names a Chromium or Chrome that is not on the PATH. Without any, these tests are skipped, or fail where
CDM_REQUIRE_BROWSER is 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer

from get_vocab_mapper.builders import build_em
from get_vocab_mapper.mapper_file import read_mapper, save_mapper
from get_vocab_mapper.token_forms import token_forms
from tests.end_to_end import oracle
from tests.end_to_end.oracle import SIDES
from tests.end_to_end.rig import ROOT, real_llama, response_of
from tests.reference import cdm_oracle

sys.path.insert(0, str(ROOT / "script_eval"))  # its scripts import each other as scripts do
import show_alignment

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

# Pieces of characters, white space of every sort, digits (where DTW errs), and what must not be run.
PREFIX = "Say it <script>window.ran = true</script> & so on:\n"
TEXT = (
    'In 1987, 東京 had 11.9 million people; a café 🙂.\n\tfor x in y:\n    done\u00a0</script><img src="x.png" '
    "onerror=\"window.ran = true\"> &amp; it's <b>over</b> in 365 days.\nThat's 120+245=<<120+245=365>>365."
)


PATIENCE = 300_000  # milliseconds: a machine may be busy with other tests


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CDM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"none of {', '.join(BROWSERS)} is there: apt-get install chromium, or name one in CDM_CHROMIUM"
        (pytest.fail if os.environ.get("CDM_REQUIRE_BROWSER") == "1" else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS.split(), timeout=PATIENCE)
        yield browser
        browser.close()


def make_page(path: Path, *arguments: object) -> Path:
    show_alignment.run(show_alignment.parse([*map(str, arguments), "--output", str(path), "--device", "cpu"]))
    return path


def opened(browser, path: Path, width: int = 1200, height: int = 760):
    """The page in a window of this size; `page.asked_for` collects what it loads, `page.said` what it complains of."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.asked_for, page.said = [], []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(path.resolve().as_uri())
    return page


# ----------------------------------------------------------------------------------------- the models, and what is true


def with_likely_tokens(folder: Path, ids: list[int], tokens: list[int]) -> None:
    """Changes the saved model's head so that after `ids` these tokens are the most probable."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        highest = (model.lm_head.weight @ hidden).max()
        for rank, token in enumerate(tokens):
            model.lm_head.weight[token] = hidden / hidden.dot(hidden) * (highest + 0.3 * (1 + len(tokens) - rank))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> SimpleNamespace:
    """A random teacher and student of real vocabularies, a mapper with entries of every kind, and both sides' tokens.

    At the end of TEXT the likely tokens are: one that is similar to one of the other side, one with a static entry,
    and one without any pair.
    """
    folder = tmp_path_factory.mktemp("alignment page")
    paths = {
        side: real_llama(folder / side, name, hidden=16, layers=1, seed=seed)
        for side, name, seed in (("teacher", "phi-3", 1), ("student", "qwen2", 2))
    }
    tokenizers = {side: AutoTokenizer.from_pretrained(path) for side, path in paths.items()}
    forms = {side: token_forms(tokenizer) for side, tokenizer in tokenizers.items()}
    em = build_em(forms["teacher"], forms["student"], progress=False)

    lone = np.flatnonzero((em.to_student.static < 0) & (np.diff(em.to_student.indptr) == 0))
    static, none = lone[~forms["teacher"].is_special[lone]][[10, 20]]
    similar = int(np.flatnonzero(np.diff(em.to_student.indptr))[50])
    its_similar = int(em.to_student.row(similar)[0][0])
    stands_for_it = int(np.flatnonzero(em.to_teacher.static < 0)[300])
    static_map = em.to_student.static.copy()
    static_map[static] = stands_for_it
    mapper = dataclasses.replace(em, kind="mined", to_student=dataclasses.replace(em.to_student, static=static_map))
    save_mapper(mapper, folder / "mapper.safetensors")

    likely = {"teacher": [similar, int(static), int(none)], "student": [its_similar, stands_for_it]}
    for side, tokenizer in tokenizers.items():
        with_likely_tokens(paths[side], tokenizer(PREFIX + TEXT)["input_ids"], likely[side])
    return SimpleNamespace(
        **paths, folder=folder, forms=forms, mapper=folder / "mapper.safetensors", tokenizers=tokenizers
    )  # fmt: skip


@pytest.fixture(scope="module")
def page_file(pair) -> Path:
    return make_page(
        pair.folder / "page.html",
        *("--teacher", pair.teacher, "--student", pair.student, "--mapper", pair.mapper, "--prefix", PREFIX),
        *("--text", TEXT),
    )


@pytest.fixture(scope="module")
def truth(pair) -> SimpleNamespace:
    """Everything that the page must say, from the models' own logits, straight from the definition."""
    tokens, logits = {}, {}
    for side in SIDES:
        model = AutoModelForCausalLM.from_pretrained(getattr(pair, side))
        tokens[side], logits[side] = response_of(model, pair.tokenizers[side], {"prefix": PREFIX, "text": TEXT})
    log_p = {side: z.log_softmax(-1) for side, z in logits.items()}
    entropies = {side: oracle.entropies(logits[side]) for side in SIDES}
    weights = {side: cdm_oracle.weights(h) for side, h in entropies.items()}
    said = {side: [log_p[side][i, token].item() for i, token in enumerate(tokens[side])] for side in SIDES}
    n_bytes = len(TEXT.encode())

    # The bytes of the text that each token covers; the end of the sequence is one byte more.
    sizes = {side: [len(pair.forms[side].forms[t]) for t in tokens[side][:-1]] + [1] for side in SIDES}
    ends = {side: list(itertools.accumulate(sizes[side])) for side in SIDES}
    assert ends["teacher"][-1] == ends["student"][-1] == n_bytes + 1

    groups = {"dtw": oracle.dtw_groups(tokens, logits, pair.forms), "byte": []}
    borders = [0, *sorted(set(ends["teacher"]) & set(ends["student"]))]
    for start, end in itertools.pairwise(borders):
        groups["byte"].append(tuple([i for i, e in enumerate(ends[side]) if start < e <= end] for side in SIDES))

    def covered(side: str, positions: list[int]) -> tuple[int, int]:
        return ends[side][positions[0]] - sizes[side][positions[0]], ends[side][positions[-1]]

    same = {name: [covered("teacher", i) == covered("student", j) for i, j in pairs] for name, pairs in groups.items()}
    return SimpleNamespace(
        tokens=tokens, logits=logits, entropies=entropies, weights=weights, said=said, groups=groups, same=same,
        ends=ends, n_bytes=n_bytes, mapper=read_mapper(pair.mapper),
    )  # fmt: skip


def mapped(pair, truth, group: tuple[list[int], list[int]]) -> SimpleNamespace:
    return oracle.mapped(truth.logits, pair.forms, truth.mapper, group)


# ------------------------------------------------------------------------------------------------------------ the page

# The bytes that the boxes of each group show on one side: marks (␣, E2, …) say theirs, other text is itself.
SHOWN_BYTES = """(groups, side) => groups.map((group) => [...group.querySelectorAll(`.${side} .token`)].map((token) =>
    [...token.childNodes].map((node) => node.dataset ? node.dataset.bytes
        : [...new TextEncoder().encode(node.data)].map((b) => b.toString(16).padStart(2, "0")).join("")).join("")))"""


def shown_bytes(buttons, side: str) -> list[list[bytes]]:
    return [[bytes.fromhex(box) for box in boxes] for boxes in buttons.evaluate_all(SHOWN_BYTES, side)]


def is_number(text: str, value: float) -> bool:
    """Three decimals (of six significant digits), or below 0.001 two significant digits."""
    return math.isclose(float(text), value, **({"abs_tol": 5.6e-4} if value >= 1e-3 else {"rel_tol": 0.06}))


def cells(table) -> list[list[str]]:
    return table.locator("tbody tr").evaluate_all("(all) => all.map((row) => [...row.cells].map((c) => c.textContent))")


def test_boxes_groups_and_marks_are_those_of_the_alignment(browser, page_file, truth):
    page = opened(browser, page_file)
    for name in ("dtw", "byte"):
        buttons = page.locator(f"#{name} button")
        assert buttons.count() == len(truth.groups[name])
        for k, side in enumerate(SIDES):
            boxes = shown_bytes(buttons, side)
            assert [len(b) for b in boxes] == [len(group[k]) for group in truth.groups[name]]
            *text, end = itertools.chain(*boxes)
            assert b"".join(text).decode() == TEXT
            assert end == {"teacher": b"<|endoftext|>", "student": b"<|im_end|>"}[side]
        marked = buttons.evaluate_all(
            """(all) => all.map((b) => b.matches(".off") && getComputedStyle(b).borderStyle === "dashed"
                && getComputedStyle(b, "::after").content.includes("≠"))"""
        )
        assert marked == [not same for same in truth.same[name]]
        labels = buttons.evaluate_all("(all) => all.map((b) => b.ariaLabel)")
        assert [label.endswith("; not the same bytes on both sides") for label in labels] == marked
    assert not all(truth.same["dtw"]) and all(truth.same["byte"])  # DTW errs on this text
    page.close()


def test_the_figures_are_those_of_training(browser, page_file, pair, truth):
    page = opened(browser, page_file)
    by_side, by_way = ({name: values for name, *values in cells(t)} for t in page.locator("#figures table").all())
    assert by_side["response tokens"] == [str(len(truth.tokens[side])) for side in SIDES]
    for side, text in zip(SIDES, by_side["bits per byte"]):
        assert is_number(text, -sum(truth.said[side]) / math.log(2) / truth.n_bytes)
    n_student = len(truth.tokens["student"])
    for column, name in enumerate(("dtw", "byte")):
        groups = truth.groups[name]
        results = [mapped(pair, truth, group) for group in groups]
        expected = {
            "one-to-one": sum(len(i) == len(j) == 1 for i, j in groups) / n_student,
            "aligned": sum(len(j) for (_, j), same in zip(groups, truth.same[name]) if same) / n_student,
            "mapped rate": sum(r.pairs for r in results) / 200 / len(groups),
            "teacher mass": sum(r.mass for r in results) / len(groups),
            "KD, nats a token": sum(r.kd * len(j) for r, (_, j) in zip(results, groups)) / n_student,
        }
        assert by_way["groups"][column] == str(len(groups))
        for label, value in expected.items():
            assert is_number(by_way[label][column], value), (name, label)
    page.close()


def detail_is_that_of(page, pair, truth, name: str, index: int) -> None:
    group = truth.groups[name][index]
    expected = mapped(pair, truth, group)
    title, *_ = page.locator("#detail h3").all_text_contents()
    assert title.endswith(f"group {index + 1} of {len(truth.groups[name])}")
    assert page.locator("#detail .differs").count() == (not truth.same[name][index])

    said = cells(page.locator("#said"))
    positions = [(side, i) for side, part in zip(SIDES, group) for i in part]
    assert len(said) == len(positions)
    for (side, i), (shown_side, _, span, h, w, p) in zip(positions, said):
        last = i == len(truth.tokens[side]) - 1
        assert shown_side == side and w == str(truth.weights[side][i])
        assert span == ("end" if last else f"{truth.ends[side][i - 1] if i else 0}–{truth.ends[side][i]}")
        assert is_number(h, truth.entropies[side][i]) and is_number(p, math.exp(truth.said[side][i]))

    mass, pairs, kd = page.locator("#detail p b").all_text_contents()
    assert is_number(mass, expected.mass) and is_number(kd, expected.kd) and pairs == str(expected.pairs)
    for side, other in (SIDES, SIDES[::-1]):
        rows = cells(page.locator(f"#top-{side}"))
        assert len(rows) == 10
        for (token, p, match, kind), (own, shown_p, shown_kind, partner) in zip(expected.candidates[side], rows):
            assert own == visible(pair.forms[side].forms[token])
            assert is_number(shown_p, p) and shown_kind == kind
            assert partner == ("" if match is None else visible(pair.forms[other].forms[match]))


def visible(form: bytes) -> str:
    """For tokens of whole characters, and for single bytes."""
    try:
        text = form.decode()
    except UnicodeDecodeError:
        return "".join(f"{byte:02X}" for byte in form)
    for hidden, mark in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(hidden, mark)
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)


def test_pointing_at_a_group_shows_what_the_mapping_makes_of_it(browser, page_file, pair, truth):
    page = opened(browser, page_file)
    last = len(truth.groups["dtw"]) - 1
    shown = mapped(pair, truth, truth.groups["dtw"][last]).candidates
    assert {kind for side in SIDES for *_, kind in shown[side][:10]} == {"exact", "static", "similar", "none"}
    several = next(g for g, (i, j) in enumerate(truth.groups["byte"]) if len(i) > 1 and len(j) > 1)
    wrong = truth.same["dtw"].index(False)
    for name, index in (("dtw", last), ("byte", several), ("dtw", wrong)):
        page.locator(f"#{name} button").nth(index).hover()
        detail_is_that_of(page, pair, truth, name, index)
        # The groups of the other alignment that share a token with it stand out too.
        other = "byte" if name == "dtw" else "dtw"
        overlapping = [
            any(set(a) & set(b) for a, b in zip(group, truth.groups[name][index])) for group in truth.groups[other]
        ]
        also = page.locator(f"#{other} button").evaluate_all("(all) => all.map((b) => b.classList.contains('also'))")
        assert also == overlapping
    page.close()


def test_the_keyboard_does_what_the_mouse_does(browser, page_file, pair, truth):
    page = opened(browser, page_file)
    buttons = page.locator("#dtw button")
    buttons.nth(0).focus()
    page.keyboard.press("Tab")
    detail_is_that_of(page, pair, truth, "dtw", 1)
    page.keyboard.press("Enter")  # keeps it
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    buttons.nth(3).hover()
    detail_is_that_of(page, pair, truth, "dtw", 1)
    page.keyboard.press("Escape")
    assert buttons.nth(1).get_attribute("aria-pressed") == "false"
    buttons.nth(4).hover()
    detail_is_that_of(page, pair, truth, "dtw", 4)
    buttons.nth(4).click()
    buttons.nth(2).hover()
    detail_is_that_of(page, pair, truth, "dtw", 4)
    buttons.nth(4).click()
    buttons.nth(2).hover()
    detail_is_that_of(page, pair, truth, "dtw", 2)
    page.close()


def test_nothing_is_loaded_and_no_text_is_run(browser, page_file):
    page = opened(browser, page_file)
    page.locator("button").evaluate_all("(all) => all.forEach((b) => b.focus())")  # shows the details of each
    assert page.locator("button").count() > 100
    page.locator("summary", has_text="The prompt").click()
    assert page.locator("details pre").text_content() == PREFIX
    assert page.evaluate("typeof window.ran") == "undefined"
    assert page.locator("img, iframe, b:text('over')").count() == 0
    assert page.asked_for == [page_file.resolve().as_uri()] and page.said == []
    assert "://" not in page_file.read_text(encoding="utf-8")
    page.close()


OVERLAPS = """() => {
    const boxes = [...document.querySelectorAll("#dtw button, #byte button")].map((b) => b.getBoundingClientRect());
    const inside = (a, b) => a.left > b.left && a.right < b.right && a.top > b.top && a.bottom < b.bottom;
    const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    const overlaps = boxes.some((a, i) => boxes.slice(i + 1).some((b) => !apart(a, b)));
    const spills = [...document.querySelectorAll("#dtw .token, #byte .token")]
        .some((t) => !inside(t.getBoundingClientRect(), t.closest("button").getBoundingClientRect()));
    const root = document.documentElement;
    return {overlaps, spills, wider: root.scrollWidth - root.clientWidth};
}"""


@pytest.mark.parametrize("width", [1200, 600, 320])
def test_it_fits_windows_of_any_width(browser, page_file, width):
    page = opened(browser, page_file, width)
    page.locator("#dtw button").nth(1).hover()
    assert page.evaluate(OVERLAPS) == {"overlaps": False, "spills": False, "wider": 0}
    page.close()


def test_neighbouring_groups_differ_in_greyscale(browser, page_file):
    page = opened(browser, page_file)
    colours = page.locator("#dtw button").evaluate_all(
        "(all) => all.map((b) => getComputedStyle(b).backgroundColor.match(/\\d+/g).map(Number))"
    )
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colours]
    assert all(abs(a - b) >= 30 for a, b in itertools.pairwise(grey))
    page.close()


# --------------------------------------------------------------------------------------------------- other ways to call


def test_without_a_mapper_an_em_mapper_is_built(browser, pair, truth, tmp_path):
    path = make_page(
        tmp_path / "page.html",
        *("--teacher", pair.teacher, "--student", pair.student, "--prefix", PREFIX, "--text", TEXT),
    )
    page = opened(browser, path)
    assert "em, θ = 0.3" in page.locator("#head").text_content()
    assert page.locator("#dtw button").count() == len(truth.groups["dtw"])
    page.locator("#dtw button").last.hover()
    kinds = {row[2] for side in SIDES for row in cells(page.locator(f"#top-{side}"))}
    assert kinds == {"exact", "similar", "none"}  # the static entry was only in the file
    page.close()


def test_with_tokenizers_only_the_page_says_so(browser, pair, tmp_path):
    path = make_page(
        tmp_path / "page.html",
        *("--teacher", pair.teacher, "--student", pair.student, "--tokenizers_only", "--text", TEXT),
    )
    page = opened(browser, path)
    (note,) = [text for text in page.locator(".note").all_text_contents() if "Tokenizers only" in text]
    assert "equal weights" in note
    page.locator("#byte button").nth(2).hover()
    assert page.locator("#said thead th").all_text_contents() == ["side", "token", "bytes"]
    assert page.locator("#tops").count() == 0 and page.said == []
    page.close()


def test_a_text_longer_than_a_model_takes_is_refused(pair, tmp_path):
    arguments = ("--teacher", pair.teacher, "--student", pair.student, "--text", "one two three " * 600)
    with pytest.raises(ValueError, match=r"--text: .* teacher tokens, and .* reads 1024 at most\. .*--block_size 1024"):
        make_page(tmp_path / "page.html", *arguments)
    assert not list(tmp_path.iterdir())
