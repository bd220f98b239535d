"""Runs that are killed, told to end, or find the disk full: nothing cut short is taken for whole, nothing is lost.

Most runs here are the real script in a fork of this process, which has the heavy imports done and can be killed at any
point. Each one that ended early is started again and must come to the uninterrupted run's losses.
"""

import contextlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerState

from modeling import files, run_clm_sft
from modeling.errors import InputError
from modeling.training import checkpoints, datasets
from modeling.training.checkpoints import defect, last_complete_checkpoint, publish, saving
from tests.end_to_end.rig import (
    ROOT,
    environment,
    flags,
    free_port,
    in_a_fork,
    launcher,
    log_history,
    steps,
    tiny_llama,
    training_flags,
)
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

KILLED = 137
STOPPED = 143


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny student, another tokenizer, and 24 rows: 6 steps an epoch of 4 rows each. Every path has spaces in it."""
    folder = tmp_path_factory.mktemp("runs and faults")
    tokenizer = byte_level_bpe()
    tiny_llama(folder / "the student", tokenizer, len(tokenizer), seed=1)
    other = sentencepiece_bpe()
    other.save_pretrained(folder / "other tokenizer")
    rows = [{"prefix": f"Row {i}. ", "text": SAMPLE_TEXTS[i % len(SAMPLE_TEXTS)]} for i in range(24)]
    (folder / "the rows.json").write_text(json.dumps(rows))
    (folder / "held out.json").write_text(json.dumps(rows[:4]))
    return folder


def arguments(bench: Path, output: Path, **changes) -> list[str]:
    given = {
        "model_name_or_path": bench / "the student",
        "train_file": bench / "the rows.json",
        "output_dir": output,
        "block_size": 48,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "learning_rate": 1e-2,
    }
    return training_flags(**{**given, **changes})


def train(bench: Path, output: Path, before: Callable[[], None] = lambda: None, **changes) -> SimpleNamespace:
    """The script, in a fork in which `before` has been called first."""

    def action():
        before()
        sys.argv = ["run_clm_sft.py", *arguments(bench, output, **changes)]
        run_clm_sft.main()

    return in_a_fork(action)


def trained(bench: Path, output: Path, **changes) -> SimpleNamespace:
    done = train(bench, output, **changes)
    assert done.status == 0, done.output
    return done


@pytest.fixture(scope="module")
def whole(bench):
    """The uninterrupted run: 8 steps, checkpoints after 3, 6 and 8."""
    output = bench / "whole"
    trained(bench, output)
    return output


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in steps(folder)]


def assert_same_run(got: Path, expected: Path) -> None:
    """The same losses and gradients at every step, and the very same weights."""
    assert losses(got) == losses(expected)
    assert (got / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def kill_at(owner, name: str, path: str, cut: bool) -> Callable[[], None]:
    """The process ends where `owner.name` writes a file whose path holds this: before it does, or half-way through."""

    def patch():
        write = getattr(owner, name)

        def write_or_die(*args, **kwargs):
            file = next(str(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, Path)))
            if path not in file:
                return write(*args, **kwargs)
            if cut:
                write(*args, **kwargs)
                os.truncate(file, os.path.getsize(file) // 2)
            os._exit(KILLED)

        setattr(owner, name, write_or_die)

    return patch


def half_saved_model(path: str) -> Callable[[], None]:
    """The process ends half-way through the weights of a model that it saves in this folder."""

    def patch():
        save = PreTrainedModel.save_pretrained

        def save_half(self, folder, *args, **kwargs):
            save(self, folder, *args, **kwargs)
            if path in str(folder):
                weights = Path(folder, "model.safetensors")
                os.truncate(weights, weights.stat().st_size // 2)
                os._exit(KILLED)

        PreTrainedModel.save_pretrained = save_half

    return patch


# --------------------------------------------------------------------------------------------------------- SIGKILL


@pytest.mark.parametrize(
    ("death", "whole_one"),
    [
        pytest.param(half_saved_model("checkpoint-6"), "checkpoint-3", id="the weights"),
        pytest.param(kill_at(torch, "save", "checkpoint-6/optimizer.pt", True), "checkpoint-3", id="the optimizer"),
        pytest.param(
            kill_at(TrainerState, "save_to_json", "checkpoint-6", True), "checkpoint-3", id="the trainer's state"
        ),
        pytest.param(half_saved_model(".saving"), "checkpoint-8", id="the trained model"),
        pytest.param(kill_at(checkpoints.os, "replace", "tokenizer.json", False), "checkpoint-8", id="moving it"),
    ],
)
def test_killed_while_saving(bench, whole, tmp_path, death, whole_one):
    """Checkpoints are kept down to one: the older one goes only after the newer one is whole."""
    output = tmp_path / "out put"
    assert train(bench, output, death, save_total_limit=1).status == KILLED
    assert last_complete_checkpoint(str(output)) == str(output / whole_one)
    assert not (output / "model.safetensors").exists() and not (output / "train_results.json").exists()
    again = trained(bench, output, save_total_limit=1)
    assert f"Resuming from {output / whole_one}" in again.output
    assert_same_run(output, whole)
    assert sorted(path.name for path in output.glob(".*")) == []


def test_a_finished_run_started_again_trains_no_further_step(bench, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    again = trained(bench, tmp_path / "out")
    assert "All 8 steps had been trained before." in again.output
    assert_same_run(tmp_path / "out", whole)
    assert "train_loss" not in json.loads((tmp_path / "out/train_results.json").read_text())


def in_order_of_writing(checkpoint: Path) -> list[Path]:
    return sorted((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda path: path.stat().st_mtime_ns)


def assert_seen_to_be_cut_short(checkpoint: Path, folder: Path) -> None:
    """Every way to end within a checkpoint's saving: the first so many files, the last of them whole or half."""
    files = in_order_of_writing(checkpoint)
    assert files[-1] == checkpoint / "trainer_state.json", files
    for number, path in enumerate(files):
        copy = folder / checkpoint.name / path.relative_to(checkpoint)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        os.truncate(copy, path.stat().st_size // 2)
        assert defect(folder / checkpoint.name) is not None, f"half of {path}"
        shutil.copy(path, copy)
        assert (defect(folder / checkpoint.name) is None) == (number == len(files) - 1), path
    for path in files:  # of the whole one: as after a power failure, which may take the end of any file
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            copy = folder / checkpoint.name / path.relative_to(checkpoint)
            os.truncate(copy, path.stat().st_size - 1)
            assert defect(folder / checkpoint.name) == f"{path.relative_to(checkpoint)} is cut short."
            shutil.copy(path, copy)
    assert defect(folder / checkpoint.name) is None


def test_a_checkpoint_cut_short_anywhere_is_passed_over(bench, whole, tmp_path):
    assert_seen_to_be_cut_short(whole / "checkpoint-6", tmp_path / "copy")
    output = tmp_path / "out"
    output.mkdir()
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(whole / name, output / name)
    weights = output / "checkpoint-6/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    told = train(bench, output, resume_from_checkpoint=output / "checkpoint-6")
    assert told.status == 2
    assert (
        f"--resume_from_checkpoint {output}/checkpoint-6: model.safetensors is cut short. Give another checkpoint, or "
        "leave the flag out."
    ) in told.output
    again = trained(bench, output)
    assert f"{output}/checkpoint-6 is passed over: model.safetensors is cut short." in again.output
    assert_same_run(output, whole)


def test_checkpoints_that_are_no_use(bench, whole, tmp_path):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    assert "--save_only_model" in defect(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert defect(checkpoint) == "model-00002-of-00002.safetensors missing."
    assert defect(tmp_path / "checkpoint-9") == "there is no such folder."


def test_starting_over_never_resumes_the_earlier_run(bench, whole, tmp_path):
    """Its checkpoints are of later steps than the new run's, which is killed before it has any of those."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    death = kill_at(torch, "save", "checkpoint-6/optimizer.pt", True)
    over = train(bench, output, death, resume_from_checkpoint=False, seed=7)
    assert over.status == KILLED
    assert f"the checkpoints of an earlier run in {output} are now in {output}/earlier-1." in over.output
    assert sorted(path.name for path in (output / "earlier-1").iterdir()) == [
        *("checkpoint-3", "checkpoint-6", "checkpoint-8"),
    ]
    assert last_complete_checkpoint(str(output)) == str(output / "checkpoint-3")
    trained(bench, output, seed=7)
    trained(bench, tmp_path / "seed 7", seed=7)
    assert_same_run(output, tmp_path / "seed 7")
    assert losses(output) != losses(whole)


@pytest.fixture(scope="module")
def adapted(bench):
    """A run with LoRA: one checkpoint, after 3 steps."""
    trained(bench, bench / "adapted", use_lora=True, max_steps=3)
    return bench / "adapted"


def resumed(bench, run, folder, **changes):
    shutil.copytree(run / "checkpoint-3", folder / "checkpoint-3")
    return train(bench, folder, **{"max_steps": 4, **changes})


@pytest.mark.parametrize(
    ("lora", "changes", "flag"),
    [
        (False, {"optim": "adafactor"}, "--optim was adamw_torch when it was saved, and is adafactor"),
        (False, {"use_lora": True}, "--use_lora was false"),
        (False, {"freeze_layers": 1}, "--freeze_layers"),
        (False, {"freeze_emb": True}, "--freeze_emb"),
        (False, {"model_name_or_path": "wider"}, "--model_name_or_path"),
        (True, {"model_name_or_path": "wider", "use_lora": True}, "--model_name_or_path"),
        (True, {"use_lora": True, "lora_rank": 4}, "--lora_rank was 16 when it was saved, and is 4"),
        (True, {"use_lora": True, "lora_alpha": 4}, "--lora_alpha"),
        (True, {"use_lora": True, "lora_target_modules": "q_proj"}, "--lora_target_modules"),
        (True, {}, "--use_lora was true"),
    ],
)
def test_a_checkpoint_is_not_resumed_with_other_settings(bench, whole, adapted, tmp_path, lora, changes, flag):
    if "model_name_or_path" in changes:
        tokenizer = byte_level_bpe()
        wider = tiny_llama(tmp_path / "wider", tokenizer, len(tokenizer), hidden=48)
        changes = {**changes, "model_name_or_path": wider}
    told = resumed(bench, adapted if lora else whole, tmp_path / "out", **changes)
    assert told.status == 2 and "Traceback" not in told.output
    message = told.output.splitlines()[-1]
    assert f"{tmp_path / 'out'}/checkpoint-3 cannot be resumed: " in message and flag in message
    assert "--resume_from_checkpoint false" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (False, {"optim": "adamw_torch", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        (False, {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_steps": 9, "seed": 3}),
        (True, {"use_lora": True, "lora_dropout": 0.1, "merge_lora": True, "bf16": True}),
    ],
)
def test_what_may_change_when_a_checkpoint_is_resumed(bench, whole, adapted, tmp_path, lora, changes):
    done = resumed(bench, adapted if lora else whole, tmp_path / "out", **changes)
    assert done.status == 0 and "Resuming from" in done.output, done.output
    assert steps(tmp_path / "out")[-1]["step"] == changes.get("max_steps", 4)


def test_another_experiment_in_the_same_folder_is_told(bench, whole, tmp_path):
    """Also where nothing is left to train: the folder's model is not that of the new settings."""
    same = resumed(bench, whole, tmp_path / "same")
    assert same.status == 0 and "other settings" not in same.output
    done = resumed(bench, whole, tmp_path / "out", learning_rate=1e-4, block_size=100)
    (line,) = [line for line in done.output.splitlines() if "is of a run with other settings" in line]
    assert "--block_size was 48, and is 100" in line and "--learning_rate was 0.01, and is 0.0001" in line
    assert "--seed" not in line and "--resume_from_checkpoint false starts over" in line


def test_the_record_of_a_checkpoints_settings(bench, whole, tmp_path):
    """A checkpoint of DeepSpeed's is none of a plain run's; an old one has no record, and is resumed."""
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out/checkpoint-3")
    record = tmp_path / "out/checkpoint-3/resume_settings.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"deepspeed": "ZeRO-2 on 2 ranks"}))
    told = train(bench, tmp_path / "out")
    assert told.status == 2 and "--deepspeed was ZeRO-2 on 2 ranks when it was saved, and is none" in told.output
    record.unlink()
    trained(bench, tmp_path / "out")
    assert_same_run(tmp_path / "out", whole)


def test_a_checkpoint_saved_over_an_older_one_of_its_step_is_not_whole_before_its_end(bench, whole, tmp_path):
    output = tmp_path / "out"
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(whole / name, output / name)
    # Its trainer_state.json is there from the beginning.
    death = kill_at(torch, "save", "checkpoint-6/optimizer.pt", False)
    assert train(bench, output, death, resume_from_checkpoint=output / "checkpoint-3").status == KILLED
    assert last_complete_checkpoint(str(output)) == str(output / "checkpoint-3")


def test_a_model_that_is_replaced_is_never_a_mixture(tmp_path):
    """At every moment of the move the folder has no weights, or the new model entirely."""
    names = ("config.json", "adapter_config.json", "model-1.safetensors", "model.safetensors.index.json")
    for death in range(len(names) + 1):
        old, new = tmp_path / f"old {death}", tmp_path / f"new {death}"
        for folder, text in ((old, "old"), (new, "new")):
            folder.mkdir()
            for name in names[: 4 if folder is new else 3]:
                (folder / name).write_text(text)
        (old / "model.safetensors").write_text("old")

        def dies(source, target, left=[death]):  # noqa: B006 - a counter of its own for each move
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            os.rename(source, target)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(checkpoints.os, "replace", dies)
            publish(new, old)
        there = {path.name: path.read_text() for path in old.iterdir()}
        assert "old" not in {text for name, text in there.items() if name.endswith(".safetensors")}
        assert "adapter_config.json" not in there or there["adapter_config.json"] == "new"
        assert ("model.safetensors.index.json" in there) == (death == len(names))
        if "model.safetensors.index.json" in there:
            assert set(there.values()) == {"new"} and not new.exists()


@pytest.mark.parametrize("function", ["prepare_example", "read_rows"])
def test_killed_while_preparing_the_data(bench, whole, tmp_path, function):
    """In the cache of tokenised rows, too, a file that is there is whole."""
    shutil.copy(bench / "the rows.json", tmp_path / "train.json")
    (tmp_path / "train.json").open("a").write("\n")  # another file, for the cache

    def dies_at_row_10():
        real = getattr(datasets, function)

        def prepare_example(row, **options):
            if row["row"] == 10:
                os._exit(KILLED)
            return real(row, **options)

        def read_rows(*args):
            for row in real(*args):
                if row["row"] == 10:
                    os._exit(KILLED)
                yield row

        setattr(datasets, function, prepare_example if function == "prepare_example" else read_rows)

    train_file = tmp_path / "train.json"
    assert train(bench, tmp_path / "out", dies_at_row_10, train_file=train_file).status == KILLED
    trained(bench, tmp_path / "out", train_file=train_file)
    assert losses(tmp_path / "out") == losses(whole)


# ---------------------------------------------------------------------------------------------------------- SIGTERM


def sigterm_in_step(step: int, times: int = 1, to_all: bool = False) -> Callable[[], None]:
    """SIGTERM arrives in the midst of a step: at this process, or at all of its group."""

    def patch():
        forward = run_clm_sft.SFTTrainer.student_logits

        def student_logits(self, *args, **kwargs):
            if self.model.training and self.state.global_step == step - 1:
                for _ in range(times):
                    (os.killpg if to_all else os.kill)(os.getpid(), signal.SIGTERM)
            return forward(self, *args, **kwargs)

        run_clm_sft.SFTTrainer.student_logits = student_logits

    return patch


def checkpoint_names(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        pytest.param(4, {}, id="in the midst of an epoch"),
        pytest.param(4, {"save_strategy": "no"}, id="no checkpoints wanted"),
        pytest.param(6, {"eval_strategy": "epoch", "save_strategy": "epoch"}, id="at the end of an epoch"),
        pytest.param(
            5,
            {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "best",
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
                "greater_is_better": True,
                "save_total_limit": 1,
            },
            id="the best to be loaded",
        ),
        pytest.param(8, {}, id="in the last step"),
    ],
)
def test_sigterm_saves_the_step_and_the_run_resumes_there(bench, tmp_path, step, changes):
    if "eval_strategy" in changes:
        changes = {**changes, "do_eval": True, "validation_file": bench / "held out.json"}
    trained(bench, tmp_path / "whole", **changes)
    output = tmp_path / "out"
    stopped = train(bench, output, sigterm_in_step(step, times=2), **changes)
    assert stopped.status == STOPPED, stopped.output
    assert stopped.output.count("SIGTERM: a checkpoint is saved after this step.") == 1
    assert f"SIGTERM: stopped after step {step} of 8, which is saved." in stopped.output
    assert last_complete_checkpoint(str(output)) == str(output / f"checkpoint-{step}")
    # It does not look like a finished run.
    assert not list(output.glob("*.safetensors")) and not list(output.glob("*.json"))
    again = trained(bench, output, **changes)
    assert f"Resuming from {output}/checkpoint-{step}" in again.output
    assert_same_run(output, tmp_path / "whole")
    evaluations = [
        [(entry["step"], entry["eval_loss"]) for entry in log_history(folder) if "eval_loss" in entry]
        for folder in (output, tmp_path / "whole")
    ]
    assert evaluations[0] == evaluations[1]
    assert ("eval_strategy" in changes) == bool(evaluations[0])


def test_sigterm_that_reaches_the_data_loaders_workers_too(bench, whole, tmp_path):
    """As a scheduler sends it, to every process: the workers must last until the step is done."""
    output, changes = tmp_path / "out", {"dataloader_num_workers": 2}
    stopped = train(bench, output, sigterm_in_step(4, to_all=True), **changes)
    assert stopped.status == STOPPED, stopped.output
    assert checkpoint_names(output) == {"checkpoint-3", "checkpoint-4"}
    trained(bench, output, **changes)
    assert losses(output) == losses(whole)


def test_a_second_sigterm_ends_at_once(bench, tmp_path):
    def twice():
        checkpoints.SAME_SIGNAL = 0.0  # no launcher passes the first one on
        sigterm_in_step(5, times=2)()

    assert train(bench, tmp_path / "out", twice).status == -signal.SIGTERM
    assert checkpoint_names(tmp_path / "out") == {"checkpoint-3"}


# -------------------------------------------------------------------------------------------------------- a full disk


def largest_file(size: int) -> Callable[[], None]:
    """No file may grow beyond this: the system's own error in the midst of a write, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_the_disk_is_full_while_a_checkpoint_is_saved(bench, whole, tmp_path):
    output = tmp_path / "out"
    trained(bench, output, max_steps=3, lr_scheduler_type="constant")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    changes = {"max_steps": 6, "lr_scheduler_type": "constant"}
    weights = os.path.getsize(output / "model.safetensors")
    for limit, part in ((weights - 1, "the weights"), (weights + 1000, "the optimizer, which is larger")):
        full = train(bench, output, largest_file(limit), **changes)
        assert full.status == 2, (part, full.output)
        last = full.output.splitlines()[-1]
        assert last.startswith(f"run_clm_sft.py: error: {output}/checkpoint-6 could not be saved: "), last
        for words in ("Earlier checkpoints are as they were", "--save_total_limit", "start the same command again"):
            assert words in last
        assert "would be larger than allowed (ulimit -f)" in last or "MiB are free" in last
        assert last_complete_checkpoint(str(output)) == str(output / "checkpoint-3")
        assert {path: path.read_bytes() for path in before} == before
    trained(bench, output, **changes)
    trained(bench, tmp_path / "expected", **changes)
    assert losses(output) == losses(tmp_path / "expected")


def test_the_disk_is_full_while_the_trained_model_is_saved(bench, whole, tmp_path):
    """The model of an earlier run stays as it was; no part of the new one shows."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-8")
    before = (output / "model.safetensors").read_bytes()
    limit = largest_file(len(before) - 1)
    full = train(bench, output, limit, save_strategy="no", learning_rate=1e-3)
    assert full.status == 2
    last = full.output.splitlines()[-1]
    assert last.startswith(f"run_clm_sft.py: error: {output} could not be saved: the file would be larger"), last
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError(122, "Disk quota exceeded"), "the disk quota is used up"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk took"),
    ],
)
def test_what_each_writer_says_of_a_full_disk_is_understood(tmp_path, error, reason):
    message = re.escape(f"{tmp_path}/a/b could not be saved: {reason}")
    with pytest.raises(InputError, match=message), saving(tmp_path / "a/b"):
        raise error


def test_other_errors_are_left_alone(tmp_path):
    for error in (OSError(13, "Permission denied"), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)) as caught, saving(tmp_path):
            raise error
        assert caught.value is error


# --------------------------------------------------------------------------------------------------------- the mapper


def build_mapper(bench: Path, output: Path, before: Callable[[], None] = lambda: None) -> SimpleNamespace:
    def action():
        before()
        pair = flags(teacher=bench / "other tokenizer", student=bench / "the student", output=output)
        sys.argv = ["get_em_mapper.py", *pair]
        runpy.run_path(str(ROOT / "get_vocab_mapper/get_em_mapper.py"), run_name="__main__")

    return in_a_fork(action)


def dies_in(name: str) -> Callable[[], None]:
    return lambda: setattr(files.os, name, lambda *_: os._exit(KILLED))


def test_killed_while_a_mapper_is_written(bench, tmp_path):
    output = tmp_path / "the mapper.safetensors"
    for name in ("fsync", "replace"):
        assert build_mapper(bench, output, dies_in(name)).status == KILLED
        assert not output.exists()
    assert build_mapper(bench, output).status == 0
    whole = output.read_bytes()
    assert build_mapper(bench, output, dies_in("replace")).status == KILLED
    assert output.read_bytes() == whole


def test_the_disk_is_full_while_a_mapper_is_written(bench, tmp_path):
    output = tmp_path / "the mapper.safetensors"
    full = build_mapper(bench, output, largest_file(10_000))  # more than the output takes, less than the mapper
    assert full.status == 2 and f"--output {output}: it cannot be written: File too large." in full.output
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- generation


def generate(bench: Path, output: Path, before: Callable[[], None] = lambda: None, **changes) -> SimpleNamespace:
    given = {"model": bench / "the student", "data": bench / "prompts.jsonl", "output": output, "max_length": 160}

    def action():
        sys.path.insert(0, str(ROOT / "script_eval"))
        before()
        sys.argv = ["generate.py", "--use_cpu", *flags(**{**given, "batch_size": 2, "seed": 3, **changes})]
        runpy.run_path(str(ROOT / "script_eval/generate.py"), run_name="__main__")

    return in_a_fork(action)


@pytest.fixture(scope="module")
def responses(bench):
    """Those of the uninterrupted run."""
    rows = [{"prompt": f"Row {i}. The quick"} for i in range(7)]
    (bench / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = bench / "responses.jsonl"
    done = generate(bench, output)
    assert done.status == 0, done.output
    text = output.read_text()
    assert [json.loads(line)["row"] for line in text.splitlines()] == list(range(7))
    return text


def dies_writing_batch(number: int, left: float) -> Callable[[], None]:
    """The process ends when that batch's lines are written, of which the given share is on the disk."""

    def patch():
        sync, calls = os.fsync, []

        def sync_or_die(descriptor):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
                calls.append(descriptor)
            if len(calls) == number:
                content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
                *_, last, _ = content.split(b"\n")
                os.ftruncate(descriptor, len(content) - int((len(last) + 1) * (1 - left)))
                os._exit(KILLED)
            sync(descriptor)

        os.fsync = sync_or_die

    return patch


@pytest.mark.parametrize("left", [0.0, 0.5, 1.0], ids=["nothing of a line", "half a line", "whole lines"])
def test_killed_while_generating(bench, responses, tmp_path, left):
    output = tmp_path / "out.jsonl"
    assert generate(bench, output, dies_writing_batch(2, left)).status == KILLED
    torn = output.read_bytes()
    assert 0 < len(torn) < len(responses.encode()) and torn.endswith(b"\n") == (left != 0.5)
    assert generate(bench, output).status == 0
    assert output.read_text() == responses


def test_the_disk_is_full_while_generating(bench, responses, tmp_path):
    output = tmp_path / "out.jsonl"
    full = generate(bench, output, largest_file(len(responses.encode()) - 20))
    assert full.status == 1
    last = full.output.splitlines()[-1]
    assert f"error: {output} could not be written: File too large." in last and "the same command again" in last
    kept = output.read_text()
    assert kept.endswith("\n") and set(kept.splitlines()) < set(responses.splitlines())
    assert generate(bench, output).status == 0
    assert output.read_text() == responses


# ------------------------------------------------------------------------------------------------------- several ranks


def rank_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        if any(word.endswith("run_clm_sft.py") for word in process.cmdline()[:3]):
            return process.environ().get("RANK")
    return None


def signal_rank(launched: subprocess.Popen, rank: str, number: int, once: Path, seconds: int = 120) -> None:
    """Signals the process of that rank as soon as the file is there."""
    until = time.monotonic() + seconds
    while not once.exists():
        assert launched.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(launched.pid).children(recursive=True) if rank_of(p) == rank]
    assert len(ranks) == 1
    ranks[0].send_signal(number)


def launch(command: list[str], log: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(command, env=environment(**env), stdout=log.open("w"), stderr=subprocess.STDOUT, text=True)


LONG = {"max_steps": 100_000, "num_train_epochs": 1, "lr_scheduler_type": "constant", "optim": "sgd", "save_steps": 2}


@pytest.fixture(scope="module")
def steady(bench):
    """The first 60 losses of a long run in one process."""
    trained(bench, bench / "steady", **{**LONG, "max_steps": 60, "save_strategy": "no"})
    return [loss for _, loss, _ in losses(bench / "steady")]


def test_a_rank_told_to_end_then_a_rank_killed(bench, steady, tmp_path):
    """Two ranks under torchrun. SIGTERM at one alone: both save and end. SIGKILL of one: the other ends too.

    Both times the run goes on to the losses of the uninterrupted one.
    """
    output = tmp_path / "out"
    words = arguments(bench, output, **{**LONG, "per_device_train_batch_size": 2})

    def start(log: str) -> subprocess.Popen:
        return launch([*launcher(2, cold=True), str(ROOT / "modeling/run_clm_sft.py"), *words], tmp_path / log)

    running = start("told to end")
    signal_rank(running, "1", signal.SIGTERM, output / "checkpoint-2/trainer_state.json")
    assert running.wait(60) != 0
    told = (tmp_path / "told to end").read_text()
    stopped_after = int(re.search(r"SIGTERM: stopped after step (\d+) of 100000", told)[1])
    first = last_complete_checkpoint(str(output))
    assert first == str(output / f"checkpoint-{stopped_after}"), told
    assert sorted(path.name for path in Path(first).glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not list(output.glob("*.json"))

    running = start("killed")
    later = stopped_after + 2 + stopped_after % 2
    signal_rank(running, "1", signal.SIGKILL, output / f"checkpoint-{later}/trainer_state.json")
    assert running.wait(45) != 0
    second = last_complete_checkpoint(str(output))
    assert int(second.rpartition("-")[2]) >= later

    got = [entry["loss"] for entry in json.loads(Path(second, "trainer_state.json").read_text())["log_history"]]
    assert len(got) < len(steady), "the machine was too slow to interrupt the run within this many steps"
    assert got == pytest.approx(steady[: len(got)], rel=1e-4)


def test_sigterm_to_a_shell_script_with_deepspeed_below_it(bench, steady, warm, tmp_path):
    """The script alone is told; DeepSpeed's launchers, two ranks and ZeRO-2 are below it. Status 143; it goes on.

    In a copy of the project whose folder's name has spaces, as all the other paths have.
    """
    root, output = tmp_path / "a project's copy", tmp_path / "out put"
    for folder in ("config", "get_vocab_mapper", "modeling", "script_train"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"STUDENT": bench / "the student", "DATA": bench / "the rows.json", "OUTPUT": output, "BATCH_SIZE": 2}
    settings |= {"BLOCK_SIZE": 48, "ACCUMULATION": 1, "WORKERS": 1, "REPORT_TO": "none", "LEARNING_RATE": 1e-2}
    settings |= {"DEVICE": "cpu", "NPROC": 2, "SCHEDULER": "constant", "WARMUP": 0}
    changes = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "seed": 42, "save_total_limit": 2}

    def start(log: str, steps: int, python: str) -> subprocess.Popen:
        script = root / "script_train/phi-qwen/train_sft_a100_qwen.sh"
        command = ["bash", str(script), *flags(max_steps=steps, optim="sgd", disable_tqdm=True, **changes)]
        env = {"MASTER_PORT": free_port(), "PYTHON": python, **settings}
        return launch(command, tmp_path / log, **{k: str(v) for k, v in env.items()})

    running = start("told to end", 100_000, sys.executable)
    until = time.monotonic() + 400  # DeepSpeed compiles a part of itself on its first start
    while not (output / "checkpoint-2/trainer_state.json").exists():
        assert running.poll() is None and time.monotonic() < until, (tmp_path / "told to end").read_text()
        time.sleep(0.01)
    assert_seen_to_be_cut_short(output / "checkpoint-2", tmp_path / "copy")
    running.terminate()
    assert running.wait(60) == STOPPED
    told = (tmp_path / "told to end").read_text()
    assert "SIGTERM: stopped after step" in told, told
    last = last_complete_checkpoint(str(output))
    done = int(last.rpartition("-")[2])
    assert f"SIGTERM: stopped after step {done} of 100000" in told and not list(output.glob("*.json"))
    running = start("goes on", done + 2, warm)
    assert running.wait(200) == 0, (tmp_path / "goes on").read_text()
    got = [loss for _, loss, _ in losses(output)]
    assert len(got) == done + 2 <= len(steady)
    assert got == pytest.approx(steady[: len(got)], rel=1e-4)
