"""Stored signals: what they are filed under, that damage is found, that only what is missing is computed."""

import copy
import errno
import json
import logging
import os
import shutil
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.errors import InputError
from modeling.models import teacher_cache
from modeling.models.output_head import OutputHead
from modeling.models.teacher_cache import PartWriter, Settings, SignalCache, TopKHead, kept, weights_digest
from modeling.models.teachers import LiveTeacher, StoredTeacher, examples_of, fill
from modeling.text.batch import Side, example_key
from tests.unit.helpers import without_response

CPU = torch.device("cpu")
SETTINGS = Settings(
    weights="w", dtype="float32", stored_dtype="float32", topk=None, attn_implementation=None, n_tokens=11
)


# ------------------------------------------------------------------------------------------------------------ the keys


def test_every_setting_makes_another_folder(tmp_path):
    others = {
        "weights": "v",
        "dtype": "bfloat16",
        "stored_dtype": "float16",
        "topk": 8,
        "attn_implementation": "eager",
        "n_tokens": 12,
        "format": 2,
    }
    assert set(others) == {field.name for field in fields(Settings)}
    keys = {SETTINGS.key, *(replace(SETTINGS, **{name: value}).key for name, value in others.items())}
    assert len(keys) == 8 and replace(SETTINGS).key == SETTINGS.key
    # The same teacher under another name is found again.
    first = SignalCache(tmp_path, "old-name", SETTINGS)
    assert first.folder == tmp_path / f"old-name-{SETTINGS.key}"
    first.folder.mkdir()
    assert SignalCache(tmp_path, "new-name", SETTINGS).folder == first.folder


@pytest.fixture
def teacher_folder(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_the_digest_of_a_teacher(teacher_folder, tmp_path, monkeypatch):
    memory = tmp_path / "cache/digests.json"
    digest = weights_digest(str(teacher_folder), memory)
    read = []
    whole = teacher_cache.checksum
    monkeypatch.setattr(teacher_cache, "checksum", lambda file: read.append(file.name) or whole(file))
    assert weights_digest(str(teacher_folder), memory) == digest and not read

    (teacher_folder / "training_args.bin").write_bytes(b"x")
    (teacher_folder / "trainer_state.json").write_text("{}")
    shutil.copytree(teacher_folder, tmp_path / "copy")
    assert weights_digest(str(teacher_folder), memory) == weights_digest(str(tmp_path / "copy"), memory) == digest

    read.clear()
    weights = load_file(teacher_folder / "model.safetensors")
    weights["a"][500] = 1e-3
    save_file(weights, teacher_folder / "model.safetensors")
    changed = weights_digest(str(teacher_folder), memory)
    assert changed != digest and read == ["model.safetensors"]
    (teacher_folder / "config.json").write_text('{"logit_scale": 2}')
    assert weights_digest(str(teacher_folder), memory) not in (digest, changed)


def test_an_adapter_counts_with_its_base(teacher_folder, tmp_path):
    adapter, memory = tmp_path / "adapter", tmp_path / "digests.json"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(teacher_folder)}))
    save_file({"lora": torch.ones(3)}, adapter / "adapter_model.safetensors")
    digest = weights_digest(str(adapter), memory)
    save_file({"a": torch.ones(1000), "b": torch.zeros(1000)}, teacher_folder / "model.safetensors")
    changed = weights_digest(str(adapter), memory)
    save_file({"lora": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    assert len({digest, changed, weights_digest(str(adapter), memory)}) == 3


def test_a_hub_name_counts_by_its_commit(tmp_path, monkeypatch):
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(
        teacher_cache, "cached_file", lambda name, file: f"/hub/models--x--y/snapshots/{next(commits)}/{file}"
    )
    memory = tmp_path / "digests.json"
    assert [weights_digest("x/y", memory) for _ in range(2)] == ["x/y@" + "a" * 40, "x/y@" + "b" * 40]
    monkeypatch.setattr(teacher_cache, "cached_file", lambda name, file: f"/elsewhere/{file}")
    with pytest.raises(ValueError, match="the commit of the files of x/y is not known"):
        weights_digest("x/y", memory)


# ----------------------------------------------------------------------------------------------------- files and damage


def key_of(number: int) -> bytes:
    return example_key(np.array([number]), 1)


def hidden_of(number: int) -> torch.Tensor:
    """Of example `number`, which has so many response tokens."""
    return torch.arange(number * 4.0).reshape(number, 4) + 100 * number


@pytest.fixture
def cache(tmp_path):
    """A head, and three parts, with examples 1 and 2, 3 and 4, 5."""
    torch.manual_seed(0)
    cache = SignalCache(tmp_path, "teacher", SETTINGS)
    cache.write_head(OutputHead(torch.randn(11, 4), torch.randn(11), multiplier=0.5, divisor=3.0, cap=7.0))
    for numbers in ((1, 2), (3, 4), (5,)):
        cache.write_part({key_of(n): {"hidden": hidden_of(n)} for n in numbers})
    cache.open()
    return cache


def parts(cache) -> dict[int, object]:
    """The file of each example."""
    found = {}
    for file in cache.folder.glob("part-*"):
        keys = {row.numpy().tobytes() for row in load_file(file)["keys"]}
        found |= {number: file for number in range(1, 6) if key_of(number) in keys}
    return found


def test_what_was_written_is_read(cache):
    rows, head = cache.rows([key_of(n) for n in (4, 1, 5, 4)], CPU)
    assert torch.equal(rows, torch.cat([hidden_of(n) for n in (4, 1, 5, 4)]))
    rows = rows / 100
    z = (rows.double() @ head.weight.double().T + head.bias.double()) * 0.5 / 3
    torch.testing.assert_close(head(rows), (7 * (z / 7).tanh()).float(), rtol=1e-5, atol=1e-5)
    rows, _ = cache.rows([], CPU)
    assert rows.shape == (0, 4)
    with pytest.raises(ValueError, match=r"teacher-.* holds no signals of an example"):
        cache.rows([key_of(9)], CPU)


def test_signals_are_read_in_the_dtype_of_the_head(tmp_path):
    cache = SignalCache(tmp_path, "t", replace(SETTINGS, stored_dtype="bfloat16"))
    head = OutputHead(torch.randn(11, 4))
    cache.write_head(head)
    cache.write_part({key_of(3): kept(hidden_of(3) + 1 / 3, head, cache.settings)})
    cache.open()
    rows, _ = cache.rows([key_of(3)], CPU)
    assert rows.dtype == torch.float32 and torch.equal(rows, (hidden_of(3) + 1 / 3).bfloat16().float())


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size - 5)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_found_and_removed(cache, damage, caplog):
    (head,), part = cache.folder.glob("head-*"), parts(cache)[3]
    for file in (head, part):
        damage(file)
    with caplog.at_level(logging.WARNING):
        cache.verify()
    told = f"{head} is damaged, and removed. It is computed again."
    assert caplog.messages == [told, f"{part} is damaged, and removed. The examples in it are computed again."]
    fresh = SignalCache(cache.folder.parent, "teacher", SETTINGS)
    fresh.open()
    assert not fresh.has_head and set(fresh.index) == {key_of(n) for n in (1, 2, 5)}
    cache.open()
    assert torch.equal(cache.rows([key_of(5)], CPU)[0], hidden_of(5))


def test_ranks_share_the_checking(cache):
    """Each looks at every third file: what one passes over, another finds."""
    for file in cache.folder.glob("*-*.safetensors"):
        flip_a_bit(file)
    left = []
    for rank in range(3):
        cache.verify(rank, 3)
        left.append(len(list(cache.folder.glob("*-*.safetensors"))))
    assert left[0] > left[1] and left[2] < 4


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_write_that_is_cut_short_leaves_nothing_behind(cache, monkeypatch):
    before = set(cache.folder.iterdir())
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, told in ((KeyboardInterrupt("Ctrl-C"), "Ctrl-C"), (full, r"written: the disk is full\. .* Make room")):
        monkeypatch.setattr(os, "fsync", raising(error))
        with pytest.raises((InputError, KeyboardInterrupt), match=told):
            cache.write_part({key_of(6): {"hidden": hidden_of(6)}})
        assert set(cache.folder.iterdir()) == before


def test_what_a_killed_process_leaves_is_removed(cache):
    before = set(cache.folder.iterdir())
    (cache.folder / ".part-1.safetensors.17.partial").write_bytes(b"half")
    cache.verify()
    cache.open()
    assert set(cache.folder.iterdir()) == before and len(cache.index) == 5


def test_a_part_of_another_teacher_is_refused(cache, tmp_path):
    other = SignalCache(tmp_path, "other", replace(SETTINGS, weights="v"))
    other.folder.mkdir()
    stray = shutil.copy(parts(cache)[1], other.folder)
    with pytest.raises(ValueError, match="was made with other settings") as error:
        other.open()
    assert str(stray) in str(error.value)


def test_parts_are_written_as_they_fill_up(cache, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 8 * 16)  # 8 rows of 4 floats
    writer = PartWriter(cache)
    for number in (6, 7, 8):
        writer.add(key_of(number), {"hidden": hidden_of(number)})
    assert len(list(cache.folder.glob("part-*"))) == 3 + 2
    writer.flush()
    writer.flush()  # nothing is waiting
    assert len(list(cache.folder.glob("part-*"))) == 3 + 2
    monkeypatch.setattr(teacher_cache, "PART_SECONDS", 0)
    writer.add(key_of(9), {"hidden": hidden_of(1)})
    assert len(list(cache.folder.glob("part-*"))) == 3 + 3


def test_a_second_run_waits(cache, caplog):
    caplog.set_level(logging.INFO)
    entered = threading.Event()

    def second_run():
        with cache.locked():
            entered.set()

    with cache.locked():
        thread = threading.Thread(target=second_run)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()
    assert "waiting for it" in caplog.text


# ---------------------------------------------------------------------------------------------------- the top K alone


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_are_kept_and_the_rest_is_spread_evenly(dtype):
    """By hand: p = (.5, .2, .1, .1, .1) with K = 2 keeps .5 and .2, and each other token gets (1 - .7) / 3."""
    p = torch.tensor([[0.1, 0.5, 0.1, 0.2, 0.1], [0.04, 0.03, 0.9, 0.02, 0.01]])
    settings = replace(SETTINGS, topk=2, stored_dtype=dtype, n_tokens=5)
    signals = kept(p.log() + 3, OutputHead(torch.eye(5)), settings)  # a head that returns its input
    assert signals["values"].dtype == getattr(torch, dtype) and signals["ids"].tolist() == [[1, 3], [2, 0]]
    rows = torch.cat([tensor.float() for tensor in signals.values()], dim=1)
    got = TopKHead(5)(rows).softmax(-1)
    expected = torch.tensor([[0.1, 0.5, 0.1, 0.2, 0.1], [0.04, 0.02, 0.9, 0.02, 0.02]])
    torch.testing.assert_close(got, expected, rtol={"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype], atol=0)


def test_a_certain_teacher_leaves_the_rest_finite():
    """1 − Σ of the kept probabilities is 0 in float32 here, and its logarithm −inf; the losses need neither."""
    logits = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    signals = kept(logits, OutputHead(torch.eye(4)), replace(SETTINGS, topk=1, n_tokens=4))
    assert signals["rest"].item() == pytest.approx(-60, rel=1e-6)


@pytest.mark.parametrize("k", [5, 9])
def test_as_many_as_there_are_tokens_lose_nothing(k):
    logits = torch.randn(600, 5)  # more rows than are worked on at a time
    signals = kept(logits, OutputHead(torch.eye(5)), replace(SETTINGS, topk=k, n_tokens=5))
    rows = torch.cat([tensor.float() for tensor in signals.values()], dim=1)
    torch.testing.assert_close(TopKHead(5)(rows), logits.log_softmax(-1))


def test_a_cache_of_the_largest_needs_no_head(tmp_path):
    settings = replace(SETTINGS, topk=3, stored_dtype="float16")
    cache = SignalCache(tmp_path, "t", settings)
    logits = torch.randn(7, 11)
    signals = kept(logits, OutputHead(torch.eye(11)), settings)
    cache.write_part(
        {key_of(1): {n: t[:2] for n, t in signals.items()}, key_of(2): {n: t[2:] for n, t in signals.items()}}
    )
    cache.open()
    assert cache.has_head and not list(cache.folder.glob("head-*"))
    rows, head = cache.rows([key_of(2), key_of(1)], CPU)
    got, expected = head(rows), logits[[2, 3, 4, 5, 6, 0, 1]].log_softmax(-1)
    assert got.shape == (7, 11) and got.dtype == torch.float32
    torch.testing.assert_close(got.topk(3).values, expected.topk(3).values, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.topk(3).indices, expected.topk(3).indices)
    assert cache.rows([], CPU)[0].shape == (0, 7)


def test_values_that_a_dtype_cannot_hold_are_refused():
    hidden = torch.tensor([[1.0, 70_000.0]])
    with pytest.raises(ValueError, match=r"beyond torch.float16. Give --teacher_cache_dtype bfloat16"):
        kept(hidden, None, replace(SETTINGS, stored_dtype="float16"))
    assert kept(hidden, None, replace(SETTINGS, stored_dtype="bfloat16"))["hidden"].isfinite().all()


# ------------------------------------------------------------------------------------------ a model fills a cache


class CountingTeacher(LiveTeacher):
    """Notes how many examples each forward had."""

    def signal(self, side):
        self.__dict__.setdefault("batches", []).append(len(side.input_ids))
        return super().signal(side)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def dataset_of(lengths) -> Dataset:
    """Rows of so many tokens, of which the last ones, from the third on, are the response."""
    generator = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths, 1):
        ids = generator.integers(3, 50, length)
        columns = {"input_ids": ids, "response_start": 2, "byte_ends": np.arange(1, length - 1, dtype=np.int32)}
        columns["byte_start"] = 0
        rows.append({"row": number, **columns, **{f"teacher_{name}": value for name, value in columns.items()}})
    return Dataset.from_list(rows).with_format("numpy")


def side_of(examples, prefix="teacher_") -> Side:
    return Side.of(examples, prefix, pad_id=0)


def fill_all(model, dataset, folder, ranks=1, batch_size=3, **settings):
    """Each rank's teacher, after all have filled one cache."""
    cache = SignalCache(folder, "t", replace(SETTINGS, n_tokens=50, **settings))
    cache.open()
    missing = {key: e for key, e in examples_of([dataset, None]).items() if key not in cache.index}
    teachers = [CountingTeacher(model, 50) for _ in range(ranks)]
    for rank, teacher in enumerate(teachers):
        fill(cache, teacher, missing, 0, batch_size, CPU, rank=rank, ranks=ranks, progress=False)
    cache.open()
    return cache, teachers


@pytest.mark.parametrize(("ranks", "examples"), [(1, 7), (3, 7), (3, 2)])
def test_ranks_fill_a_cache_running_equally_often(model, tmp_path, ranks, examples):
    dataset = dataset_of([9, 4, 12, 3, 7, 7, 5][:examples])
    cache, teachers = fill_all(model, dataset, tmp_path, ranks, batch_size=2)
    assert set(cache.index) == set(examples_of([dataset])) and len(cache.index) == examples
    assert len({len(teacher.batches) for teacher in teachers}) == 1
    assert len(list(cache.folder.glob("head-*"))) == 1
    stored, live = StoredTeacher(cache), LiveTeacher(model, 50)
    for batch in ([0, 1], [1], [1, 0, 1]):
        side = side_of([dataset[i] for i in batch])
        expected = live.logits(side)
        assert expected.shape == (len(side.labels), 50)
        torch.testing.assert_close(stored.logits(side), expected, rtol=1e-5, atol=1e-5)
        for teacher in (stored, live):
            rows, head = teacher.signal(side)
            torch.testing.assert_close(head(rows[1:3]), expected[1:3], rtol=1e-5, atol=1e-5)


def test_only_what_is_missing_is_computed(model, tmp_path):
    dataset = dataset_of([9, 4, 12, 3, 7])
    cache, (teacher,) = fill_all(model, dataset, tmp_path)
    assert sum(teacher.batches) == 5
    # Equal rows are one example, and an order of the data is nothing to a cache.
    mixed = Dataset.from_list([dataset[i] for i in (3, 0, 3, 1)]).with_format("numpy")
    _, (teacher,) = fill_all(model, mixed, tmp_path)
    assert not hasattr(teacher, "batches")
    changed = [dict(dataset[i]) for i in range(5)]
    changed[2]["teacher_input_ids"] = np.append(changed[2]["teacher_input_ids"][:-1], 51)
    _, (teacher,) = fill_all(model, Dataset.from_list(changed).with_format("numpy"), tmp_path)
    assert teacher.batches == [1]
    parts = sorted(cache.folder.glob("part-*"), key=lambda file: file.stat().st_size)
    truncate(parts[-1])
    cache.verify()
    cache, (teacher,) = fill_all(model, dataset, tmp_path)
    assert sum(teacher.batches) == 5 and len(cache.index) == 6


def test_what_is_not_finite_is_not_stored(model, tmp_path):
    model = copy.deepcopy(model)
    model.get_input_embeddings().weight.data[51] = torch.nan
    rows = [dict(row) for row in dataset_of([9, 4, 12])]
    rows[1]["teacher_input_ids"] = np.append(rows[1]["teacher_input_ids"][:-2], [51, 4])
    with pytest.raises(InputError, match="NaN or infinite in row 2 of the data, and are not stored"):
        fill_all(model, Dataset.from_list(rows).with_format("numpy"), tmp_path)


def test_a_lost_head_alone_is_written_again(model, tmp_path):
    dataset = dataset_of([9, 4])
    cache, _ = fill_all(model, dataset, tmp_path)
    (head,) = cache.folder.glob("head-*")
    content = head.read_bytes()
    head.unlink()
    _, (teacher,) = fill_all(model, dataset, tmp_path)
    assert not hasattr(teacher, "batches") and head.read_bytes() == content


def test_an_example_that_takes_part_without_a_response(model, tmp_path):
    dataset = dataset_of([9, 4])
    cache, _ = fill_all(model, dataset, tmp_path)
    filler = without_response(dataset[1])
    stored, live = StoredTeacher(cache), LiveTeacher(model, 50)
    for examples in ([filler, dataset[0]], [filler]):
        side = side_of(examples)
        torch.testing.assert_close(stored.logits(side), live.logits(side), rtol=1e-5, atol=1e-5)


def test_a_teacher_that_is_fed_the_students_tokens(model, tmp_path):
    """Whatever the other side's tokens are."""
    rows = [dict(dataset_of([9, 4])[i]) for i in range(2)]
    for row in rows:
        row["teacher_input_ids"], row["teacher_byte_ends"] = row["teacher_input_ids"][:3], row["teacher_byte_ends"][:1]
    dataset, live = Dataset.from_list(rows).with_format("numpy"), LiveTeacher(model, 50)
    cache = SignalCache(tmp_path, "t", replace(SETTINGS, n_tokens=50))
    fill(cache, live, examples_of([dataset], prefix=""), 0, 4, CPU, prefix="", progress=False)
    cache.open()
    side = side_of([dataset[1], dataset[0]], prefix="")
    torch.testing.assert_close(StoredTeacher(cache).logits(side), live.logits(side), rtol=1e-5, atol=1e-5)
