"""script_train/compare_methods.sh: for real with tiny models, interrupted twice, and with a method that was added; and
which steps run, and when. The same of quickstart.sh.

For the latter the Python that they call is played by a script that only leaves behind what each command would.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from script_train.methods import methods
from tests.end_to_end.rig import ROOT, environment, tiny_llama
from tests.unit.chat_templates import CHATML
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe


@pytest.fixture(scope="module")
def pair(small_pair, tmp_path_factory):
    """The small pair, and two files of rows."""
    folder = tmp_path_factory.mktemp("a comparison's")
    rows = [{"prefix": text[:20], "text": text[20:]} for text in SAMPLE_TEXTS]
    data, validation = folder / "train.json", folder / "held out.jsonl"
    data.write_text(json.dumps(rows[:4]))
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    return SimpleNamespace(**vars(small_pair), data=data, validation=validation)


def settings_of(pair: SimpleNamespace, output: Path, **settings: object) -> dict[str, str]:
    given = {
        **{"PYTHON": sys.executable, "DEVICE": "cpu", "PRECISION": "fp32", "OUTPUT": output},
        **{name.upper(): getattr(pair, name) for name in ("teacher", "student", "data", "validation")},
        **settings,
    }
    return environment(**{name: str(value) for name, value in given.items() if value is not None})


def compare(
    pair: SimpleNamespace, output: Path, *further: str, fails: bool = False, root: Path = ROOT, **settings: object
) -> subprocess.CompletedProcess:
    """Runs it on the CPU, with `further` arguments; with `fails`, it must end otherwise than well."""
    command = ["bash", str(root / "script_train/compare_methods.sh"), *further]
    env = settings_of(pair, output, **settings)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ all of it

TINY = {
    **{"EPOCHS": 2, "LEARNING_RATE": 1e-3, "BATCH_SIZE": 2, "ACCUMULATION": 1, "TOPK": 20, "BLOCK_SIZE": 128},
    **{"TEACHER_EPOCHS": 1, "TEACHER_BATCH_SIZE": 2, "TEACHER_ACCUMULATION": 1, "WORKERS": 1},
    **{"LIMIT": 2, "EVAL_SEEDS": 10, "MAX_LENGTH": 48},
}


def test_a_comparison_that_is_interrupted_twice(pair, warm, tmp_path):
    output, runs = tmp_path / "the comparison's", tmp_path / "the comparison's/runs"
    settings = {**TINY, "PYTHON": warm, "METHODS": "SFT FKD ULD", "SEEDS": "1 2"}
    # Killed when the first student's training has ended, before anything has taken note of it.
    first = compare(pair, output, fails=True, **settings, STOP_AFTER="runs/SFT/seed_1")
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
    assert f"{runs}/ULD/seed_1/checkpoint-2" in third.stderr
    fourth = compare(pair, output, **settings)

    assert {path: Path(path).stat().st_mtime_ns for path in before} == before
    assert not list(output.rglob("checkpoint-*"))
    assert read(runs / "ULD/seed_1/trainer_state.json")["global_step"] == 4
    assert fourth.stdout.count("done before") == 23
    assert "By the trials, what is left takes about 1 min: 4 trainings and 8 evaluations." in first.stdout
    costs = read(runs / "ULD/seed_2/train_results.json")
    assert 0 < costs["train_seconds_per_step"] < 20 and 0.1 < costs["train_peak_memory_gib"] < 20
    assert "FKD left out" in fourth.stdout.split("table.md")[-1]

    # The table's figures are those of the files.
    table = (output / "summary/table.md").read_text()
    for method in ("SFT", "ULD"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        for file, figure, digits in (
            ("instructions/results.json", lambda found: found["scores"]["held-out"]["rouge_l"]["mean"], 2),
            ("held_out/eval_results.json", lambda found: found["eval_bits_per_byte"], 3),
            ("held_out/eval_results.json", lambda found: found["eval_kd_loss"], 3),
        ):
            values = [figure(read(runs / f"{method}/seed_{seed}/evaluation" / file)) for seed in (1, 2)]
            assert f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" in row
    assert "| runs | α | held-out ROUGE-L ↑ | bits per byte ↓ | KD ↓ | s/step ↓ | GiB ↓ |" in table
    assert "\n- " not in table and "| minus SFT | pairs |" in table
    assert "| SFT | 2 | – |" in table and "| ULD | 2 | 0.5 |" in table

    # What they are held against.
    places = []
    for name in ("teacher_untuned", "teacher_tuned", "student_untrained"):
        figure = read(output / f"references/{name}/evaluation/held_out/eval_results.json")["eval_bits_per_byte"]
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} | 1 |"))
        assert f"| {figure:.3f} |" in row and row.endswith("| – | – | – |") == name.startswith("teacher")
        places.append(table.index(row))
    assert places == sorted(places)
    for picture in ("curves.png", "scores.png"):
        assert (output / "summary" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_method_costs_one_python_and_one_shell_file(pair, warm, tmp_path):
    root = tmp_path / "the project's copy"
    for folder in ("config", "data", "get_vocab_mapper", "modeling", "script_eval", "script_train"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    uld = next(method for method in methods(root) if method.name == "ULD")
    uld.script.with_name("run_clm_toy.py").write_text(uld.script.read_text())
    shell = uld.shell.read_text().replace("METHOD=ULD SCRIPT=run_clm_uld.py PAIR=any ORDER=4", "# here")
    assert "# here" in shell
    uld.shell.with_name("train_toy.sh").write_text(shell.replace("# here", "METHOD=Toy SCRIPT=run_clm_toy.py PAIR=any"))

    listed = subprocess.run([sys.executable, root / "script_train/methods.py"], capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*(m.name for m in methods()), "Toy"]
    settings = {**TINY, "PYTHON": warm, "SEEDS": 1, "TEACHER_READY": 1, "TOY_TEMPERATURE": 3.0}
    planned = compare(pair, tmp_path / "none", root=root, DRY_RUN=1, **settings)
    trial, training = [words for words in commands(planned) if words[1].endswith("run_clm_toy.py")]
    assert value(trial, "--kd_temperature") == value(training, "--kd_temperature") == "3.0"
    compare(pair, tmp_path / "out", root=root, METHODS="Toy", **settings)
    assert read(tmp_path / "out/runs/Toy/seed_1/trainer_state.json")["global_step"] == 4
    assert "| Toy | 1 |" in (tmp_path / "out/summary/table.md").read_text()


def test_chats_with_adapters_and_chunks_side_by_side(warm, tmp_path):
    """The rows hold messages: training, the held-out rows and the prompts of ROUGE-L all go through the templates."""
    chats = [
        [("system", "Be brief."), ("user", "Say it."), ("assistant", text[:20]), ("user", "More"), ("assistant", text)]
        for text in SAMPLE_TEXTS
    ]
    rows = [{"messages": [{"role": role, "content": text.strip()} for role, text in chat]} for chat in chats]
    files = [tmp_path / "train.json", tmp_path / "held out.json"]
    for file, part in zip(files, (rows[:4], rows[4:])):
        file.write_text(json.dumps(part))
    models = {}
    for side, tokenizer in (("student", byte_level_bpe()), ("teacher", sentencepiece_bpe())):
        tokenizer.add_tokens(["<|im_end|>", "<|im_start|>"], special_tokens=True)
        tokenizer.chat_template = CHATML
        models[side] = tiny_llama(tmp_path / side, tokenizer, len(tokenizer), layers=1)
    settings = {
        **{**TINY, "PYTHON": warm, "METHODS": "SFT CDM", "SEEDS": 1, "TEACHER_READY": 1, "TRIAL_STEPS": 0},
        **{"JOBS": 2, "GREEDY": 1, "MAX_LENGTH": 160, "MAX_PROMPT_LENGTH": 140},
    }
    pair, output = SimpleNamespace(**models, data=files[0], validation=files[1]), tmp_path / "out"
    compare(pair, output, "--use_lora", "true", "--logits_chunk", "7", **settings)

    asked = [json.loads(line) for line in (output / "sets/held-out/valid.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in asked] == [row["messages"][:-1] for row in rows[4:]]
    for method in ("SFT", "CDM"):
        run = output / f"runs/{method}/seed_1"
        assert (run / "adapter_model.safetensors").is_file() and not (run / "model.safetensors").exists()
        assert read(run / "evaluation/instructions/held-out/10.settings.json")["chat"] is True
        assert f"| {method} | 1 |" in (output / "summary/table.md").read_text()
    kd = [read(output / f"runs/{name}/seed_1/evaluation/held_out/eval_results.json") for name in ("SFT", "CDM")]
    assert all(0 < found["eval_kd_loss"] < 20 for found in kd)


# ----------------------------------------------------------------------------------------------- which steps are run

# Takes note of what it is asked for, and leaves an empty file where the command would leave its last one.
PLAYED = f"""#!/bin/bash
declare -A given
name=$1
for word; do
    if [[ $word == --* ]]; then name=$word; else given[$name]=$word; fi
done
case "${{1##*/}} ${{2:-}}" in
    "compare.py rows") last=$4 ;;
    compare.py* | steps.py*) exec '{sys.executable}' "$@" ;;
    "quickstart_models.py split") last=${{given[--output]}}/held_out.json ;;
    "quickstart_models.py answers") last=${{given[--output]}}/answers.md ;;
    quickstart_models.py* | make_transfer_pair.py*) last=${{given[--output]}}/config.json ;;
    get_*_mapper.py*) last=${{given[--output]}} ;;
    run_clm_*)
        last=${{given[--output_dir]}}/eval_results.json
        [[ -n ${{given[--do_eval]:-}} ]] || last=${{given[--output_dir]}}/train_results.json
        ;;
    collect_results.py*) last=${{given[--folder]}}/results.json ;;
    *) exit ;;
esac
printf '%s\\n' "${{last#"$OUTPUT_IN_NOTES"/}}" >>"$NOTES"
if [[ -n ${{WAIT_AT:-}} && $last == *$WAIT_AT* ]]; then
    trap 'echo stopped >>"$NOTES"; exit 143' TERM INT
    for _ in {{1..600}}; do sleep 0.1; done
fi
[[ -z ${{FAIL_AT:-}} || $last != *$FAIL_AT* ]] || exit 3
mkdir -p "${{last%/*}}"
bits=2
[[ $last != */${{BEST_ALPHA:-none}}/* ]] || bits=1
case $last in
    */train_results.json) printf '{{"train_seconds_per_step": 20, "epoch": 0.5}}' ;;
    */eval_results.json) printf '{{"eval_bits_per_byte": %s}}' "$bits" ;;
    *) : ;;
esac >"$last"
"""


@pytest.fixture
def played(pair, tmp_path):
    """`(**settings) -> (the last files of the steps that were run, the finished process)`, always in one folder."""
    python, notes, output = tmp_path / "python", tmp_path / "notes", tmp_path / "out put"
    python.write_text(PLAYED)
    python.chmod(0o755)
    usual = {"PYTHON": python, "NOTES": notes, "OUTPUT_IN_NOTES": output, "SEEDS": "1 2", "METHODS": EVERY}

    def run(fails: bool = False, **settings: object) -> tuple[list[str], subprocess.CompletedProcess]:
        notes.write_text("")
        done = compare(pair, output, fails=fails, **{**usual, **settings})
        return notes.read_text().splitlines(), done

    run.output, run.notes, run.settings = output, notes, settings_of(pair, output, **usual)
    return run


HELD_OUT, ROUGE = "evaluation/held_out/eval_results.json", "evaluation/instructions/results.json"
TRAINED = ("train_results.json", HELD_OUT, ROUGE)
EVERY = "SFT ULD MinED CDM"


def of_runs(methods: str, *files: str, seeds: str = "1 2") -> list[str]:
    """These files of the runs, or the runs' folders."""
    runs = [f"runs/{method}/seed_{seed}" for seed in seeds.split() for method in methods.split()]
    return [f"{run}/{file}" for run in runs for file in files] if files else runs


def trials(methods: str) -> list[str]:
    return [f"trials/{method}/train_results.json" for method in methods.split()]


def test_everything_is_done_once_and_in_order(played):
    steps, done = played()
    assert steps == [
        "sets/held-out/valid.jsonl",
        *(f"references/teacher_untuned/{file}" for file in (HELD_OUT, ROUGE)),
        "teacher/train_results.json",
        *(f"references/teacher_tuned/{file}" for file in (HELD_OUT, ROUGE)),
        *("mappers/em/mapper.safetensors", "mappers/MinED/mapper.safetensors"),
        *(f"references/student_untrained/{file}" for file in (HELD_OUT, ROUGE)),
        *trials(EVERY),
        *of_runs(EVERY, *TRAINED),
    ]
    assert f"[{len(steps)}/{len(steps)}] CDM, seed 2: ROUGE-L" in done.stdout
    # 3 epochs of 8 steps of 20 seconds each.
    assert "what is left takes about 64 min: 8 trainings and 16 evaluations. Seconds a step: SFT 20, ULD" in done.stdout
    assert "SFT, seed 2: training (in all about 32 min left)" in done.stdout
    assert played()[0] == []
    record = read(played.output / "records/ULD_seed_2.json")
    assert record["made_with"]["--seed"] == "2" and "run_clm_uld.py" in record["command"] and record["seconds"] >= 0
    moved = played.output.rename(played.output.with_name("moved"))
    assert played(OUTPUT=moved)[0] == []
    moved.rename(played.output)

    ready, _ = played(TEACHER_READY=1, METHODS="SFT CDM", SEEDS=1, OUTPUT=played.output / "ready")
    assert [step.removeprefix("ready/") for step in ready] == [
        "sets/held-out/valid.jsonl",
        *(f"references/teacher/{file}" for file in (HELD_OUT, ROUGE)),
        "mappers/em/mapper.safetensors",
        *(f"references/student_untrained/{file}" for file in (HELD_OUT, ROUGE)),
        *trials("SFT CDM"),
        *of_runs("SFT CDM", *TRAINED, seeds="1"),
    ]


def test_each_method_takes_the_best_alpha_of_its_first_seed(played):
    """By other rows than those of the table; its student of that seed is not trained again."""
    settings = {"METHODS": "SFT ULD CDM", "ALPHAS": "0.5 0.8 0.9", "CDM_ALPHA": "0.7", "BEST_ALPHA": "0.8"}
    steps, done = played(**settings, TRIAL_STEPS=0)
    candidates = [f"alphas/{alpha}/ULD/seed_1" for alpha in ("0.5", "0.8", "0.9")]
    assert steps[9:] == [
        *(f"{run}/{file}" for run in candidates for file in ("train_results.json", "choice/eval_results.json")),
        *of_runs("SFT", *TRAINED, seeds="1"),
        *(f"alphas/0.8/ULD/seed_1/{file}" for file in (HELD_OUT, ROUGE)),
        *of_runs("CDM", *TRAINED, seeds="1"),
        *of_runs("SFT ULD CDM", *TRAINED, seeds="2"),
    ]
    assert "| ULD | 2.000 | **1.000** | 2.000 |" in (played.output / "summary/choice.md").read_text() in done.stdout
    assert read(played.output / "summary/alphas.json") == {"α": {"ULD": "0.8", "CDM": "0.7"}}
    assert read(played.output / "records/ULD_seed_2.json")["made_with"]["--kd_alpha"] == "0.8"
    assert "--validation_file" in read(played.output / "records/ULD_alpha_0.8_seed_1.choice.json")["made_with"]
    assert played(**settings, TRIAL_STEPS=0)[0] == []
    _, done = played(fails=True, **settings, TRIAL_STEPS=0, ZERO=3, EPOCHS=9)  # the second part too is looked at first
    assert "runs/ULD/seed_2" in done.stderr
    # Stopped in the middle of the choice, it resumes there, and takes what is the best then.
    shutil.rmtree(played.output / "alphas/0.9")
    assert played(**settings, TRIAL_STEPS=0)[0] == [
        f"{candidates[2]}/{file}" for file in ("train_results.json", "choice/eval_results.json")
    ]


def test_other_settings_are_named_and_nothing_is_run(played, pair, tmp_path):
    """Nor is anything deleted; what does not concern what is there is taken."""
    data, student = tmp_path / "data.json", tmp_path / "student"
    data.write_text("[]")
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"1")
    given = {"DATA": data, "STUDENT": student}
    played(**given)
    before = files_of(played.output)

    def refused(**settings: object) -> str:
        steps, done = played(fails=True, **{**given, **settings})
        assert done.returncode == 2 and steps == [] and files_of(played.output) == before
        return done.stderr

    for setting, flag, then, now, made_anew in (
        ("EPOCHS", "--num_train_epochs", "3", "4", of_runs(EVERY)),
        ("ULD_TEMPERATURE", "--kd_temperature", "1.0", "3.0", of_runs("ULD")),
        ("TOPK", "--topk", "100", "7", ["runs/SFT/seed_1/evaluation/held_out", *of_runs("CDM")]),
        ("LIMIT", "LIMIT", "", "1", ["runs/SFT/seed_1/evaluation/instructions"]),
        ("TOP_P", "TOP_P", None, "0.9", ["runs/SFT/seed_1/evaluation/instructions"]),
        ("TEACHER_EPOCHS", "--num_train_epochs", "3", "9", ["teacher", *of_runs("ULD")]),
    ):
        message = refused(**{setting: now})
        (named,) = [line for line in message.splitlines() if line.startswith("  ")]
        assert f" {flag}: {then!r} then, {now!r} now" in named
        assert "OUTPUT" in message and "FRESH=1" in message and set(made_anew) <= set(message.split())
    data.write_text("[ ]")
    assert "  DATA: " in refused()
    data.write_text("[]")
    (student / "model.safetensors").write_bytes(b"2")
    assert "  STUDENT: " in refused()
    (student / "model.safetensors").write_bytes(b"1")

    elsewhere = {"WORKERS": 2, "TEACHER_CACHE": 0, "REPORT_TO": "tensorboard"}
    for same in ({"SEEDS": "2"}, {"METHODS": "CDM SFT"}, elsewhere):
        assert played(**given, **same)[0] == []
    assert played(**given, SEEDS="1 2 3")[0] == of_runs(EVERY, *TRAINED, seeds="3")


def test_what_was_deleted_is_made_anew_and_fresh_makes_all_anew(played):
    everything, _ = played()
    (played.output / "runs/ULD/seed_2" / HELD_OUT).unlink()
    assert played()[0] == of_runs("ULD", HELD_OUT, seeds="2")
    shutil.rmtree(played.output / "runs/ULD")
    assert played(ULD_ALPHA=0.4)[0] == of_runs("ULD", *TRAINED)
    mine = played.output / "notes of mine"
    mine.write_text("precious")
    assert played(FRESH=1, EPOCHS=7)[0] == everything
    assert mine.read_text() == "precious"


def test_an_interrupted_step_resumes_in_its_folder_with_the_same_settings_only(played):
    checkpoint = played.output / "runs/ULD/seed_1/checkpoint-5"
    _, done = played(fails=True, FAIL_AT="runs/ULD/seed_1/train")
    assert done.returncode == 3 and "ULD, seed 1: training" in done.stderr.splitlines()[-1]
    checkpoint.mkdir(parents=True)
    steps, _ = played(fails=True, FAIL_AT="runs/ULD/seed_1/train")
    assert steps == ["runs/ULD/seed_1/train_results.json"] and checkpoint.is_dir()
    _, done = played(fails=True, ULD_ALPHA=0.4)
    assert "--kd_alpha" in done.stderr and checkpoint.is_dir()
    assert played()[0][0] == "runs/ULD/seed_1/train_results.json" and not checkpoint.exists()


def test_the_expected_time_is_that_of_several_at_a_time(played):
    settings = {"METHODS": "SFT ULD", "EPOCHS": 60, "FAIL_AT": "runs/SFT/seed_1/train"}
    said = [played(fails=True, JOBS=jobs, **settings)[1].stdout for jobs in (1, 2)]
    hours = [float(re.search(r"what is left takes about ([\d.]+) hours: 4 trainings", text)[1]) for text in said]
    assert hours[0] > 3 and hours[1] == pytest.approx(hours[0] / 2, abs=0.1)


def test_several_steps_at_the_same_time(played):
    """Each behind what it builds on; where one fails, the others are stopped, and the next call resumes."""
    settings = {"METHODS": "SFT ULD", "TRIAL_STEPS": 0, "JOBS": 2}
    steps, done = played(fails=True, **settings, WAIT_AT="runs/SFT/seed_1/train", FAIL_AT="runs/ULD/seed_1/train")
    assert done.returncode == 3 and "ULD, seed 1: training: exit status 3" in done.stderr
    assert sorted(steps[-3:]) == ["runs/SFT/seed_1/train_results.json", "runs/ULD/seed_1/train_results.json", "stopped"]
    steps, done = played(**settings)
    assert sorted(steps) == sorted(of_runs("SFT ULD", *TRAINED))
    for run in of_runs("SFT ULD"):
        assert steps.index(f"{run}/train_results.json") < min(
            steps.index(f"{run}/{file}") for file in (HELD_OUT, ROUGE)
        )
    assert "ULD, seed 2: ROUGE-L: " in done.stdout and (played.output / "records/ULD_seed_2.rouge.log").exists()
    assert played(**settings)[0] == played(**{**settings, "JOBS": 1})[0] == []


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("number", "wait_at"),
    [(signal.SIGTERM, "runs/SFT/seed_1/train"), (signal.SIGTERM, HELD_OUT), (signal.SIGINT, "runs/SFT/seed_1/train")],
)
def test_a_signal_reaches_what_is_running(played, number, wait_at, jobs):
    command = ["bash", str(ROOT / "script_train/compare_methods.sh")]
    settings = {**played.settings, "WAIT_AT": wait_at, "JOBS": str(jobs)}
    with open(played.notes.with_name("said"), "w") as said:
        running = subprocess.Popen(command, env=settings, stdout=said, stderr=said)
    deadline = time.monotonic() + 60
    while not (played.notes.exists() and wait_at in played.notes.read_text()):
        assert running.poll() is None and time.monotonic() < deadline, played.notes.with_name("said").read_text()
        time.sleep(0.05)
    time.sleep(0.2)
    running.send_signal(number)
    assert running.wait(timeout=30) == 128 + number
    assert "stopped" in played.notes.read_text().splitlines()[-jobs:]


def test_the_quickstarts_steps(played):
    """In a folder of its own: all eleven, then none, then those that another setting concerns."""
    settings = {**played.settings, "OUTPUT": f"{played.output}/quick start", "TEACHER": "", "NOTES": str(played.notes)}

    def quickstart(**changes: str) -> tuple[list[str], subprocess.CompletedProcess]:
        played.notes.write_text("")
        command = ["bash", str(ROOT / "script_train/quickstart.sh")]
        done = subprocess.run(command, env={**settings, **changes}, capture_output=True, text=True, timeout=120)
        steps = [step.removeprefix("quick start/") for step in played.notes.read_text().splitlines()]
        return steps, done

    steps, done = quickstart()
    assert done.returncode == 0, done.stderr
    assert steps == [
        *("data/held_out.json", "teacher_base/config.json", "references/teacher_untuned/eval_results.json"),
        *("teacher/eval_results.json", "student/config.json", "em_mapper.safetensors"),
        *("references/student_untrained/eval_results.json", "sft/eval_results.json"),
        *("sft/evaluation/eval_results.json", "cdm/eval_results.json", "answers/answers.md"),
    ]
    assert "[11/11] Three held-out prompts" in done.stdout
    assert quickstart()[0] == []
    again, done = quickstart(EPOCHS="9")
    assert done.returncode == 2 and again == []
    assert "--num_train_epochs: '1' then, '9' now" in done.stderr and "FRESH=1" in done.stderr
    assert quickstart(EPOCHS="9", FRESH="1")[0] == steps


# ---------------------------------------------------------------------------------------------------- the commands


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The words of the commands that DRY_RUN printed."""
    return [shlex.split(line) for line in done.stdout.splitlines() if line and not line.startswith("#")]


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_the_same_tokenizer_takes_all_methods(pair, warm, tmp_path):
    output = tmp_path / "none"
    done = compare(pair, output, TEACHER=pair.same, DRY_RUN=1, SEEDS="7", BATCH_SIZE=3, PYTHON=warm)
    assert "left out" not in done.stdout and not output.exists()
    trainings = [w for w in commands(done) if value(w, "--do_train") and not value(w, "--max_steps")][1:]
    assert [Path(value(words, "--output_dir")).relative_to(output / "runs") for words in trainings] == [
        Path(f"{method.name}/seed_7") for method in methods()
    ]
    assert {(value(w, "--seed"), value(w, "--per_device_train_batch_size")) for w in trainings} == {("7", "3")}
    temperatures = [value(words, "--kd_temperature") for words in trainings]
    assert temperatures == [None, "2.0", "2.0", "1.0", "2.0", *["1.0"] * 6]
    assert {value(words, "--kd_alpha") for words in trainings[1:]} == {"0.5"}
    assert {value(words, "--teacher_path") for words in trainings[1:]} == {str(output / "teacher")}


NOTHING = dict.fromkeys(("TEACHER", "STUDENT", "DATA", "VALIDATION"))


def test_the_small_comparison_needs_no_other_setting(pair, tmp_path):
    done = compare(pair, tmp_path / "none", DRY_RUN=1, SMALL=1, **NOTHING)
    assert "FKD and RKD left out. The student gets a tokenizer of its own." in done.stdout
    assert not (tmp_path / "none").exists()
    words = commands(done)
    trainings = [w for w in words if value(w, "--do_train")]
    runs = [str(Path(value(w, "--output_dir")).relative_to(tmp_path / "none")) for w in trainings]
    fitting = [method.name for method in methods() if method.pair != "same"]
    assert len(fitting) == 9
    assert runs == ["teacher", *(f"trials/{name}" for name in fitting), *of_runs(" ".join(fitting))]
    assert "ALM, seed 2: ROUGE-L" in done.stdout
    assert words[-1][1].endswith("summarize.py") and value(words[-1], "--against") == "SFT"


def test_a_pair_of_one_model_and_two_tokenizers(pair, tmp_path):
    """What is given is taken; of the rest, the sample rows and the quickstart's model."""
    own = {"PAIR": "transfer", "DRY_RUN": 1, "METHODS": "SFT ULD", "STUDENT": None}
    done = compare(pair, tmp_path / "none", **own, STUDENT_TOKENIZER=pair.student, LAYERS=1)
    (made,) = [w for w in commands(done) if w[1].endswith("make_transfer_pair.py")]
    assert value(made, "--model") == str(pair.teacher) and value(made, "--layers") == "1"
    assert value(made, "--tokenizer") == str(pair.student) and "--train_tokenizer" not in made
    assert "quickstart_models.py" not in done.stdout
    assert all(f"ULD, α {alpha}: rows for choosing" in done.stdout for alpha in ("0.5", "0.8", "0.9"))
    done = compare(pair, tmp_path / "none", **{**own, "TEACHER": None})
    (made,) = [w for w in commands(done) if w[1].endswith("make_transfer_pair.py")]
    assert value(made, "--train_tokenizer") == str(pair.data) and "--layers" not in made
    assert "quickstart_models.py teacher" in done.stdout and "quickstart_models.py split" not in done.stdout

    done = compare(pair, tmp_path / "none", **own, STUDENT_TOKENIZER=pair.student, KD_ALPHA=0.7)
    assert "rows for choosing" not in done.stdout and "--kd_alpha 0.7" in done.stdout


def test_each_method_keeps_its_own_k(pair, tmp_path):
    settings = {"DRY_RUN": 1, "METHODS": "CDM Strict", "SEEDS": 1, "TEACHER_READY": 1, "TRIAL_STEPS": 0}
    for given, expected in (({}, ["100", "16"]), ({"TOPK": 20}, ["20", "20"])):
        done = compare(pair, tmp_path / "none", **settings, **given)
        words = commands(done)
        assert [value(w, "--topk") for w in words if value(w, "--do_train")] == expected
        assert {value(w, "--topk") for w in words if value(w, "--do_eval") and value(w, "--topk")} == {expected[0]}


def test_what_changes_the_rows_is_not_for_the_students_alone(pair, tmp_path):
    done = compare(pair, tmp_path / "none", "--chat", "true", fails=True, METHODS="SFT")
    assert done.returncode == 2 and "error: --chat: what stands behind the command" in done.stderr


def test_a_method_with_settings_of_its_own_is_another_method(pair, tmp_path):
    chosen = "CDM CDM:ALIGNMENT=byte,TOPK=7 CDM:MAPPER_KIND=prefixEM"
    done = compare(pair, tmp_path / "none", DRY_RUN=1, METHODS=chosen, TRIAL_STEPS=0, SEEDS=1, TEACHER_READY=1)
    words = [w for w in commands(done) if value(w, "--do_train")]
    runs = [value(w, "--output_dir").removeprefix(f"{tmp_path}/none/runs/") for w in words]
    assert runs == [f"{name}/seed_1" for name in chosen.split()]
    assert [(value(w, "--alignment"), value(w, "--topk")) for w in words] == [
        ("dtw", "100"),
        ("byte", "7"),
        ("dtw", "100"),
    ]
    mappers = [Path(value(w, "--teacher_to_student_id_mapping")).parent.name for w in words]
    assert mappers == ["em", "em", "prefixEM"] and "get_prefixEM_mapper.py" in done.stdout


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"TEACHER": None}, "TEACHER is not set"),
        ({"DATA": "/no/such/file.json"}, "DATA=/no/such/file.json"),
        ({"VALIDATION": "/"}, "VALIDATION=/ is not a file"),
        ({"METHODS": "SFT GKD"}, 'METHODS="SFT GKD"'),
        ({"METHODS": " "}, 'METHODS=" "'),
        ({"METHODS": "FKD"}, "FKD left out"),
        ({"SEEDS": " "}, 'SEEDS=" "'),
        ({"SEEDS": "1 two"}, 'SEEDS="1 two"'),
        ({"PRECISION": "fp8"}, "PRECISION=fp8"),
        ({"EVAL_SETS": "dolly", "DATA_DIR": "/none"}, "/none/dolly/valid.jsonl"),
        ({"PAIR": "transfer"}, "PAIR=transfer makes the student"),
        ({"PAIR": "other"}, "PAIR=other"),
        ({"LAYERS": 3}, "are of PAIR=transfer"),
        ({"ALPHAS": "0.5 2"}, 'ALPHAS="0.5 2"'),
        ({"ALPHAS": "half"}, 'ALPHAS="half"'),
        ({"CHOICE": "/no/such/file.json"}, "CHOICE=/no/such/file.json"),
        ({"TRIAL_STEPS": "-1"}, "TRIAL_STEPS=-1"),
        ({"JOBS": "0"}, "JOBS=0"),
        ({"METHODS": "CDM:ALIGN=byte"}, "has no setting ALIGN"),
        ({"METHODS": "CDM:byte"}, "has not the form"),
        ({"PYTHON": "isolated"}, "has no module torch, transformers, modeling, get_vocab_mapper"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_before_anything_is_done(pair, tmp_path, settings, words):
    python = tmp_path / "isolated"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -E -S \"$@\"\n")
    python.chmod(0o755)
    if "PYTHON" in settings:
        settings = {"PYTHON": python}
    done = compare(pair, tmp_path / "none", fails=True, **{"METHODS": EVERY, **settings})
    assert words in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "none").exists()


def test_a_folder_of_other_things_is_left_alone(pair, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").write_bytes(b"precious")
    for fresh in (0, 1):
        done = compare(pair, tmp_path, fails=True, METHODS=EVERY, FRESH=fresh)
        assert f"{tmp_path}/teacher" in done.stderr
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.safetensors"]
