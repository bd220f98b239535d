"""script_train/compare_methods.sh: once for real with tiny models, interrupted twice; and which steps run, and when.

For the latter the Python that it calls is played by a script that only leaves behind what each command would.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.end_to_end.rig import ROOT, environment, tiny_llama
from tests.end_to_end.warm_python import warm_python
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

SCRIPT = ROOT / "script_train/compare_methods.sh"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Models and rows: a teacher, a student of another tokenizer, a teacher of the student's, two files."""
    folder = tmp_path_factory.mktemp("a comparison's")
    byte_level, sentencepiece = byte_level_bpe(), sentencepiece_bpe()
    made = SimpleNamespace(
        teacher=tiny_llama(folder / "the teacher", sentencepiece, len(sentencepiece), seed=1),
        student=tiny_llama(folder / "the student", byte_level, len(byte_level), seed=2),
        same=tiny_llama(folder / "same tokenizer", byte_level, len(byte_level) + 8, seed=3),
        data=folder / "train.json",
        validation=folder / "held out.jsonl",
    )
    rows = [{"prefix": text[:20], "text": text[20:]} for text in SAMPLE_TEXTS]
    made.data.write_text(json.dumps(rows[:4]))
    made.validation.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    return made


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """An interpreter that starts scripts quickly."""
    with warm_python(tmp_path_factory.mktemp("warm")) as python:
        yield python


def compare(
    pair: SimpleNamespace, output: Path, fails: bool = False, **settings: object
) -> subprocess.CompletedProcess:
    """Runs it on the CPU; with `fails`, it must end otherwise than well."""
    given = {
        **{"PYTHON": sys.executable, "DEVICE": "cpu", "PRECISION": "fp32", "OUTPUT": output},
        **{name.upper(): getattr(pair, name) for name in ("teacher", "student", "data", "validation")},
        **settings,
    }
    env = environment(**{name: str(value) for name, value in given.items() if value is not None})
    done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ all of it


def test_a_comparison_that_is_interrupted_twice(pair, warm, tmp_path):
    output, runs = tmp_path / "the comparison", tmp_path / "the comparison/runs"
    settings = {
        **{
            "PYTHON": warm,
            "METHODS": "SFT FKD ULD",
            "SEEDS": "1 2",
            "EPOCHS": 2,
            "LEARNING_RATE": 1e-3,
            "BATCH_SIZE": 2,
        },
        **{"ACCUMULATION": 1, "TEACHER_EPOCHS": 1, "TEACHER_BATCH_SIZE": 2, "TEACHER_ACCUMULATION": 1, "TOPK": 20},
        **{"BLOCK_SIZE": 128, "WORKERS": 1, "LIMIT": 2, "EVAL_SEEDS": 10, "MAX_LENGTH": 48, "CHECKPOINTS": "epoch"},
    }
    # Killed when the first student's training has ended, before anything has taken note of it.
    first = compare(pair, output, fails=True, **settings, STOP_AFTER="runs/SFT/seed_1")
    assert first.returncode == -9
    assert "FKD left out. The student's tokenizer" in first.stdout and "SFT, seed 1: training" in first.stdout
    assert (runs / "SFT/seed_1/train_results.json").exists() and not (output / "summary").exists()
    before = {**files_of(output / "teacher"), **files_of(output / "references"), **files_of(output / "mappers")}

    # Then in the middle of a training, which has a checkpoint.
    second = compare(pair, output, fails=True, **settings, DIE_AT_CHECKPOINT="runs/ULD/seed_1")
    assert "The teacher is fine-tuned on the data: done before" in second.stdout
    assert (runs / "ULD/seed_1/checkpoint-2").is_dir()
    assert not (runs / "ULD/seed_1/train_results.json").exists()
    before |= files_of(runs / "SFT/seed_1")

    third = compare(pair, output, **settings)
    assert f"Going on from {runs}/ULD/seed_1/checkpoint-2." in third.stderr
    fourth = compare(pair, output, **settings)

    finished = {str(path): path.stat().st_mtime_ns for path in map(Path, before) if path.exists()}
    assert finished == before
    assert not list(output.rglob("checkpoint-*"))
    assert read(runs / "ULD/seed_1/trainer_state.json")["global_step"] == 4
    assert fourth.stdout.count("done before") == 21

    # The table's figures are those of the files.
    table = (output / "summary/table.md").read_text()
    for method in ("SFT", "ULD"):
        files = [runs / method / f"seed_{seed}/evaluation/held_out/eval_results.json" for seed in (1, 2)]
        cells = []
        for key in ("eval_bits_per_byte", "eval_kd_loss"):
            values = [read(file)[key] for file in files]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        assert [cell.strip(" *") for cell in row.split("|")[-3:-1]] == cells
        scores = [read(runs / method / f"seed_{seed}/evaluation/instructions/results.json") for seed in (1, 2)]
        rouge = [score["scores"]["held-out"]["rouge_l"]["mean"] for score in scores]
        assert f"{statistics.mean(rouge):.2f} ± {statistics.stdev(rouge):.2f}" in row
    assert "held-out ROUGE-L ↑ | bits per byte ↓ | KD ↓ |" in table and "\n- " not in table

    # What they are held against.
    untrained = read(output / "references/student_untrained/evaluation/held_out/eval_results.json")
    assert "| student_untrained | 1 |" in table and f"| {untrained['eval_bits_per_byte']:.3f} |" in table
    for name in ("teacher_untuned", "teacher_tuned"):
        figure = read(output / f"references/{name}/evaluation/held_out/eval_results.json")["eval_bits_per_byte"]
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith(f"| {figure:.3f} | – |")
    assert table.index("teacher_untuned") < table.index("teacher_tuned") < table.index("student_untrained")
    assert "FKD left out" in fourth.stdout.split("table.md")[-1]
    for picture in ("curves.png", "scores.png"):
        assert (output / "summary" / picture).read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------- which steps are run

# Takes note of what it is asked for, and leaves an empty file where the command would leave its last one.
PLAYED = """#!/bin/bash
[[ ${1:-} != - ]] || exit 0
declare -A given
name=$1
for word; do
    if [[ $word == --* ]]; then name=$word; else given[$name]=$word; fi
done
case "${1##*/} ${2:-}" in
    "compare_methods.py tokenizers") printf '%s' "$DIFFERENCE"; exit ;;
    "compare_methods.py rows" | get_*_mapper.py*) last=${given[--output]} ;;
    run_clm_*)
        last=${given[--output_dir]}/eval_results.json
        [[ -z ${given[--do_train]:-} ]] || last=${given[--output_dir]}/train_results.json
        ;;
    collect_results.py*) last=${given[--folder]}/results.json ;;
    summarize.py*) exit ;;
    *) exit ;;
esac
printf '%s\\n' "${last#"$COMPARISON"/}" >>"$NOTES"
[[ -z ${FAIL_AT:-} || $last != *$FAIL_AT* ]] || exit 3
mkdir -p "${last%/*}"
: >"$last"
"""


@pytest.fixture
def played(pair, tmp_path):
    """`(**settings) -> (the last files of the steps that were run, the finished process)`, always in one folder."""
    python, notes, output = tmp_path / "python", tmp_path / "notes", tmp_path / "out put"
    python.write_text(PLAYED)
    python.chmod(0o755)

    def run(fails: bool = False, **settings: object) -> tuple[list[str], subprocess.CompletedProcess]:
        notes.write_text("")
        given = {"PYTHON": python, "NOTES": notes, "COMPARISON": output, "DIFFERENCE": "They differ.", "SEEDS": "1 2"}
        done = compare(pair, output, fails, **{**given, **settings})
        return notes.read_text().splitlines(), done

    run.output = output
    return run


HELD_OUT, ROUGE = "evaluation/held_out/eval_results.json", "evaluation/instructions/results.json"
REFERENCES = [f"references/{name}" for name in ("teacher_untuned", "teacher_tuned", "student_untrained")]


def of_runs(methods: str, *files: str, seeds: str = "1 2") -> list[str]:
    return [f"runs/{m}/seed_{s}/{file}" for s in seeds.split() for m in methods.split() for file in files]


def test_everything_is_done_once_and_in_order(played):
    steps, done = played()
    assert "FKD and RKD left out. They differ." in done.stdout
    assert steps == [
        "sets/held-out/valid.jsonl",
        *(f"references/teacher_untuned/{file}" for file in (HELD_OUT, ROUGE)),
        "teacher/train_results.json",
        *(f"references/teacher_tuned/{file}" for file in (HELD_OUT, ROUGE)),
        *("mappers/em/mapper.safetensors", "mappers/MinED/mapper.safetensors"),
        *(f"references/student_untrained/{file}" for file in (HELD_OUT, ROUGE)),
        *of_runs("SFT ULD MinED CDM", "train_results.json", HELD_OUT, ROUGE),
    ]
    assert f"[{len(steps)}/{len(steps)}] CDM, seed 2: ROUGE-L" in done.stdout
    assert played()[0] == []


TRAINED = ("train_results.json", HELD_OUT, ROUGE)
DISTILLED = "ULD MinED CDM"
EVERY = "SFT ULD MinED CDM"


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"EPOCHS": 4}, of_runs(EVERY, *TRAINED)),
        ({"ULD_TEMPERATURE": 3.0}, of_runs("ULD", *TRAINED)),
        ({"MINED_TEMPERATURE": 3.0}, of_runs("MinED", *TRAINED)),
        ({"SEEDS": "1 2 3"}, of_runs(EVERY, *TRAINED, seeds="3")),
        ({"SEEDS": "2"}, []),
        ({"METHODS": "CDM SFT"}, []),
        ({"WORKERS": 2, "TEACHER_CACHE": 0, "REPORT_TO": "tensorboard"}, []),
        ({"LIMIT": 1}, [f"{run}/{ROUGE}" for run in REFERENCES] + of_runs(EVERY, ROUGE)),
        ({"TOP_P": 0.9}, [f"{run}/{ROUGE}" for run in REFERENCES] + of_runs(EVERY, ROUGE)),
        (  # CDM's own setting, and with it the measure of all
            {"TOPK": 7},
            [
                f"references/student_untrained/{HELD_OUT}",
                *of_runs(EVERY, HELD_OUT),
                *of_runs("CDM", "train_results.json", ROUGE),
            ],
        ),
        (  # another teacher for all but SFT, and another measure for SFT too
            {"TEACHER_EPOCHS": 9},
            [
                *(
                    "teacher/train_results.json",
                    f"references/teacher_tuned/{HELD_OUT}",
                    f"references/teacher_tuned/{ROUGE}",
                ),
                *(f"references/student_untrained/{HELD_OUT}", *of_runs("SFT", HELD_OUT), *of_runs(DISTILLED, *TRAINED)),
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_another_setting_does_again_what_depends_on_it(played, change, again):
    played()
    steps, _ = played(**change)
    assert sorted(steps) == sorted(again)


def test_other_rows_and_models_and_lost_results(played, pair, tmp_path):
    data, student = tmp_path / "data.json", tmp_path / "student"
    data.write_text("[]")
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"1")
    settings = {"DATA": data, "STUDENT": student}
    played(**settings)
    data.write_text("[ ]")
    steps, _ = played(**settings)
    assert "teacher/train_results.json" in steps and f"references/teacher_untuned/{HELD_OUT}" not in steps
    assert set(of_runs(EVERY, *TRAINED)) < set(steps)
    (student / "model.safetensors").write_bytes(b"2")
    steps, _ = played(**settings)
    assert set(of_runs(EVERY, *TRAINED)) < set(steps) and "teacher/train_results.json" not in steps
    assert {"mappers/em/mapper.safetensors", f"references/student_untrained/{ROUGE}"} < set(steps)
    (played.output / "runs/ULD/seed_2" / HELD_OUT).unlink()
    assert played(**settings)[0] == of_runs("ULD", HELD_OUT, seeds="2")


def test_what_was_begun_is_gone_on_from_with_the_same_settings_only(played):
    """A step that failed keeps its folder for the next try; another setting begins with an empty one."""
    run = played.output / "runs/ULD/seed_1"
    played(fails=True, FAIL_AT="runs/ULD/seed_1/train")
    (run / "checkpoint-5").mkdir(parents=True)
    steps, _ = played(fails=True, FAIL_AT="runs/ULD/seed_1/train")
    assert steps == ["runs/ULD/seed_1/train_results.json"]
    assert (run / "checkpoint-5").is_dir()
    played(fails=True, FAIL_AT="runs/ULD/seed_1/train", ULD_ALPHA=0.4)
    assert not (run / "checkpoint-5").exists()
    steps, _ = played(ULD_ALPHA=0.4)
    assert steps[0] == "runs/ULD/seed_1/train_results.json"


def test_a_teacher_that_is_ready_is_neither_tuned_nor_measured_twice(played):
    steps, _ = played(TEACHER_READY=1, METHODS="SFT CDM", SEEDS=1)
    assert steps == [
        "sets/held-out/valid.jsonl",
        *(f"references/teacher/{file}" for file in (HELD_OUT, ROUGE)),
        "mappers/em/mapper.safetensors",
        *(f"references/student_untrained/{file}" for file in (HELD_OUT, ROUGE)),
        *of_runs("SFT CDM", *TRAINED, seeds="1"),
    ]


# ---------------------------------------------------------------------------------------------------- the commands


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The words of the commands that DRY_RUN printed."""
    return [shlex.split(line) for line in done.stdout.splitlines() if line and not line.startswith("#")]


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_the_same_tokenizer_takes_all_six_methods(pair, warm, tmp_path):
    output = tmp_path / "none"
    done = compare(pair, output, TEACHER=pair.same, DRY_RUN=1, SEEDS="7", BATCH_SIZE=3, PYTHON=warm)
    assert "left out" not in done.stdout and not output.exists()
    trainings = [words for words in commands(done) if value(words, "--do_train")][1:]
    assert [Path(value(words, "--output_dir")).relative_to(output / "runs") for words in trainings] == [
        Path(f"{method}/seed_7") for method in ("SFT", "FKD", "RKD", "ULD", "MinED", "CDM")
    ]
    assert {(value(w, "--seed"), value(w, "--per_device_train_batch_size")) for w in trainings} == {("7", "3")}
    temperatures = [value(words, "--kd_temperature") for words in trainings]
    assert temperatures == [None, "2.0", "2.0", "1.0", "2.0", "1.0"]
    assert {value(words, "--teacher_path") for words in trainings[1:]} == {str(output / "teacher")}

    # No command has a flag that its script does not know.
    by_script = {words[1]: words for words in commands(done) if words[0] == warm}
    assert len(by_script) == 10
    for script, words in by_script.items():
        described = subprocess.run([warm, script, "--help"], env=environment(), capture_output=True, text=True)
        known = {word.strip("[],") for word in described.stdout.split()}
        given = {word for word in words if word.startswith("--")}
        assert given and given <= known, script


def test_the_small_comparison_needs_no_other_setting(pair, tmp_path):
    none = dict.fromkeys(("TEACHER", "STUDENT", "DATA", "VALIDATION"))
    done = compare(pair, tmp_path / "none", DRY_RUN=1, SMALL=1, **none)
    assert "FKD and RKD left out. The small student has a tokenizer of its own." in done.stdout
    assert not (tmp_path / "none").exists()
    words = commands(done)
    runs = [Path(value(w, "--output_dir")) for w in words if value(w, "--do_train")]
    assert [run.parent.name for run in runs[1:]] == ["SFT", "ULD", "MinED", "CDM"] * 3
    assert "[49/49] CDM, seed 3: ROUGE-L" in done.stdout
    assert words[-1][1].endswith("summarize.py")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TEACHER": None}, "TEACHER is not set"),
        ({"STUDENT": None}, "STUDENT is not set"),
        ({"DATA": "/no/such/file.json"}, "DATA=/no/such/file.json is not a file"),
        ({"VALIDATION": "/"}, "VALIDATION=/ is not a file"),
        ({"METHODS": "SFT GKD"}, 'METHODS="SFT GKD": GKD is none of SFT FKD RKD ULD MinED CDM.'),
        ({"METHODS": " "}, "METHODS is empty"),
        ({"SEEDS": " "}, "SEEDS is empty"),
        ({"SEEDS": "1 two"}, 'SEEDS="1 two": two is no whole number'),
        ({"CHECKPOINTS": "steps"}, "CHECKPOINTS=steps is none of epoch, no."),
        ({"EVAL_SETS": "dolly", "DATA_DIR": "/none"}, "there is no /none/dolly/valid.jsonl. Set DATA_DIR."),
        ({"SMALL": 1}, "SMALL=1 brings TEACHER, STUDENT, DATA and VALIDATION of its own"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_before_anything_is_done(pair, tmp_path, settings, message):
    done = compare(pair, tmp_path / "none", fails=True, **settings)
    assert message in done.stderr and not (tmp_path / "none").exists()


def test_an_interpreter_without_the_project_is_named(pair, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S \"$@\"\n")
    python.chmod(0o755)
    done = compare(pair, tmp_path / "none", fails=True, PYTHON=python)
    message = f"{python} has no module torch, transformers, modeling, get_vocab_mapper. Install requirements.txt for it"
    assert message in done.stderr and not (tmp_path / "none").exists()


def test_a_folder_of_other_things_is_left_alone(pair, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").write_bytes(b"precious")
    done = compare(pair, tmp_path, fails=True)
    assert f"OUTPUT={tmp_path} holds other things than a comparison" in done.stderr
    assert (tmp_path / "teacher/model.safetensors").read_bytes() == b"precious"
