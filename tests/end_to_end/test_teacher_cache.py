"""Training from stored teacher signals: the same losses, without the teacher."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.models.teachers import LiveTeacher, StoredTeacher
from modeling.training import teacher as teacher_loading
from tests.end_to_end.rig import ROOT, environment, launcher, run_script, steps, training_flags

N_TRAIN, N_VALIDATION = 16, 5
N_ALL = N_TRAIN + N_VALIDATION
SCRIPTS = {
    "FKD": "run_clm_llms_fkd",
    "RKD": "run_clm_llms_rkd",
    "ULD": "run_clm_uld",
    "MinED": "run_clm_MinED",
    "CDM": "run_clm_distill_CDM",
    "BPM": "run_clm_bpm",
    "two teachers": "run_clm_distill_CDM",
    "Strict": "run_clm_strict",
    "GOLD": "run_clm_gold",
    "SimCT": "run_clm_simct",
    "ALM": "run_clm_alm",
}


@pytest.fixture(scope="module")
def bench(small_pair, tmp_path_factory):
    """The small pair, and pieces of the sample data."""
    folder = tmp_path_factory.mktemp("bench")
    rows = json.loads((ROOT / "data/dolly_train.sample.json").read_text())
    rows = [{"prefix": row["prefix"][-70:], "text": row["text"][:60]} for row in rows]  # short: there are many runs
    (folder / "train.json").write_text(json.dumps(rows[:N_TRAIN]))
    (folder / "validation.json").write_text(json.dumps(rows[N_TRAIN : N_TRAIN + N_VALIDATION]))
    return SimpleNamespace(**vars(small_pair), train=folder / "train.json", validation=folder / "validation.json")


def arguments(bench: SimpleNamespace, method: str, output: Path, **changes) -> list[str]:
    given = {
        "model_name_or_path": bench.student,
        "teacher_path": bench.same if method in ("FKD", "RKD") else bench.teacher,
        "train_file": bench.train,
        "validation_file": bench.validation,
        "output_dir": output,
        "do_eval": True,
        "block_size": 256,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    mapper = dict.fromkeys(("CDM", "two teachers", "Strict", "GOLD", "SimCT"), bench.em)
    mapper |= {"MinED": bench.mined, "BPM": bench.prefixem}
    given["teacher_to_student_id_mapping"] = mapper.get(method)
    if method == "two teachers":
        given["same_tokenizer_teacher_path"] = bench.same
    return training_flags(**{**given, **changes})


@pytest.fixture
def train(bench, tmp_path, monkeypatch):
    """Runs a script's `main` in this process: `(logged steps, evaluation)`."""
    outputs = iter(range(1000))

    def train(method, **changes):
        output = tmp_path / f"output {next(outputs)}"
        script = importlib.import_module(f"modeling.{SCRIPTS[method]}")
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments(bench, method, output, **changes)])
        script.main()
        logged = steps(output) if (output / "trainer_state.json").exists() else []
        return logged, json.loads((output / "eval_results.json").read_text())

    return train


def without_times(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}


def assert_equal(expected, got, rel=1e-5):
    assert len(expected[0]) == len(got[0]) == 2 * N_TRAIN / 4
    assert "eval_loss" in expected[1]
    for want, entry in zip([*expected[0], expected[1]], [*got[0], got[1]]):
        assert without_times(entry) == pytest.approx(without_times(want), rel=rel, abs=1e-7)


@pytest.fixture
def without_teachers(bench, monkeypatch):
    """Loading any model but the student fails."""
    load = AutoModelForCausalLM.from_pretrained

    def only_the_student(path, *args, **kwargs):
        assert Path(path) == bench.student, f"{path} is loaded, though all of its signals are there"
        return load(path, *args, **kwargs)

    return lambda: monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", only_the_student)


@pytest.fixture
def run_examples(monkeypatch):
    """The number of examples of every forward of a live teacher, in order."""
    sizes = []
    forward = LiveTeacher.signal

    def counted(teacher, side):
        sizes.append(len(side.input_ids))
        return forward(teacher, side)

    monkeypatch.setattr(LiveTeacher, "signal", counted)
    return sizes


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_losses_are_those_of_the_live_teacher(train, method, tmp_path, without_teachers):
    """Two epochs and an evaluation: while the cache is filled, and from the stored signals alone."""
    live = train(method)
    cache = tmp_path / "cache"
    assert_equal(live, train(method, teacher_cache=cache))
    assert len(list(cache.glob("*-*/cache.json"))) == (2 if method == "two teachers" else 1)
    without_teachers()
    assert_equal(live, train(method, teacher_cache=cache))


def test_other_batches_in_another_order_read_the_same_signals(
    train, tmp_path, without_teachers, run_examples, monkeypatch
):
    live, freed = [], []
    init, read = LiveTeacher.__post_init__, StoredTeacher.signal
    monkeypatch.setattr(LiveTeacher, "__post_init__", lambda t: live.append(weakref.ref(t.model)) or init(t))
    monkeypatch.setattr(StoredTeacher, "signal", lambda t, side: freed.append(live[0]() is None) or read(t, side))
    _, evaluated = train("ULD", teacher_cache=tmp_path, learning_rate=0)
    assert sum(run_examples) == N_ALL
    assert len(live) == 1 and freed and all(freed)  # in training, the teacher's memory is free
    without_teachers()
    _, again = train(
        "ULD",
        teacher_cache=tmp_path,
        learning_rate=0,
        seed=7,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        block_size=300,
    )
    assert again["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        ({"teacher_cache_dtype": "bfloat16"}, 2e-2),
        ({"teacher_cache_topk": 300, "teacher_cache_dtype": "float16"}, 5e-2),
    ],
)
def test_smaller_forms_are_near(train, tmp_path, options, rel):
    live = train("CDM", do_train=False)[1]
    stored = train("CDM", do_train=False, teacher_cache=tmp_path, **options)[1]
    assert stored["eval_ce_loss"] == pytest.approx(live["eval_ce_loss"], rel=1e-6)
    chunked = train("CDM", do_train=False, teacher_cache=tmp_path, logits_chunk=7, **options)[1]
    assert chunked["eval_kd_loss"] == pytest.approx(stored["eval_kd_loss"], rel=1e-5)
    difference = abs(stored["eval_kd_loss"] / live["eval_kd_loss"] - 1)
    assert 0 < difference < rel


def test_a_killed_computation_is_resumed(bench, train, tmp_path, run_examples, capsys):
    """kill -9 in the middle of it; then a damaged part. Only what is missing runs."""
    code = (
        "import sys, time\n"
        "from modeling import run_clm_uld\n"
        "from modeling.models import teacher_cache\n"
        "from modeling.models.teachers import LiveTeacher\n"
        "teacher_cache.PART_BYTES = 1\n"
        "forward = LiveTeacher.signal\n"
        "LiveTeacher.signal = lambda *args: time.sleep(0.1) or forward(*args)\n"
        "run_clm_uld.main()\n"
    )
    cache = tmp_path / "cache"
    options = {"teacher_cache": cache, "per_device_eval_batch_size": 1}
    command = [sys.executable, "-c", code, *arguments(bench, "ULD", tmp_path / "killed", **options)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        while len(list(cache.glob("*-*/part-*"))) < 5:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (folder,) = cache.glob("*-*/")
    there = len(list(folder.glob("part-*")))
    assert 5 <= there < N_ALL

    resumed = train("ULD", **options)
    assert run_examples == [1] * (N_ALL - there)
    assert not list(folder.glob("*.partial"))
    assert_equal(train("ULD"), resumed)

    run_examples.clear()
    damaged = max(folder.glob("part-*"), key=lambda file: file.stat().st_size)  # the one of the resumed run
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert_equal(resumed, train("ULD", **options))
    assert f"{damaged} is damaged, and removed. The examples in it are computed again." in capsys.readouterr().err
    assert sum(run_examples) == N_ALL - there


def test_another_teacher_has_a_folder_of_its_own(bench, train, tmp_path, run_examples):
    train("ULD", do_train=False, teacher_cache=tmp_path / "cache")
    retrained = tmp_path / "retrained"
    model = AutoModelForCausalLM.from_pretrained(bench.teacher)
    shutil.copytree(bench.teacher, retrained)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    model.save_pretrained(retrained)
    for changes in ({"teacher_path": retrained}, {"attn_implementation": "eager"}, {"teacher_dtype": "bfloat16"}):
        run_examples.clear()
        train("ULD", do_train=False, teacher_cache=tmp_path / "cache", **changes)
        assert sum(run_examples) == N_VALIDATION
    described = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("*-*/cache.json")]
    assert sorted(Path(about["teacher"]).name for about in described) == ["retrained", "teacher", "teacher", "teacher"]


def test_a_rank_that_sees_another_folder_is_told(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_loading, "fill", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit):
        train("ULD", teacher_cache=tmp_path)
    assert (
        f"{tmp_path}: rank 0 does not see the signals of {N_ALL} examples that other ranks" in capsys.readouterr().err
    )


def test_two_sharded_teachers_beside_a_zero3_student(bench, train, tmp_path):
    """Every rank computes its share; the losses are those of one process with live teachers."""
    live = train("two teachers", num_train_epochs=1)
    output = tmp_path / "sharded"
    done = run_script(
        "modeling/run_clm_distill_CDM.py",
        *arguments(
            *(bench, "two teachers", output),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            teacher_cache=tmp_path / "cache",
            teacher_zero3=True,
            deepspeed=ROOT / "config/deepspeed_zero3_config.json",
        ),
        launch=launcher(2, deepspeed=True),
    )
    assert done.stdout.count("is sharded: this rank holds") + done.stderr.count("is sharded: this rank holds") == 2
    got = steps(output), json.loads((output / "eval_results.json").read_text())
    for name in ("loss", "kd_cdm_loss", "kd_fkd_loss"):
        assert [entry[name] for entry in got[0]] == pytest.approx([entry[name] for entry in live[0]], rel=1e-4)
        assert got[1][f"eval_{name}"] == pytest.approx(live[1][f"eval_{name}"], rel=1e-4)
