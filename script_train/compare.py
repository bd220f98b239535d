"""The plan of compare_methods.sh: which models are made and measured, by which commands, and one table of them all.

    python compare.py ARGUMENTS …          # of the students' trainings; all settings come from the environment
    python compare.py rows DATA FILE       # a training file as an evaluation set

The settings have the names that the training scripts read: a method's own reach its script as they are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

NEEDED = ("torch", "transformers", "modeling", "get_vocab_mapper")
if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:  # before what imports them
    print(
        f"error: {os.environ.get('PYTHON', sys.executable)} has no module {', '.join(lacking)}. Install "
        "requirements.txt for it (which installs this project's own too), or unset PYTHON.",
        file=sys.stderr,
    )
    sys.exit(2)

from methods import ROOT, Method, methods  # noqa: E402
from steps import Plan, Step, file_digest, run, start_over  # noqa: E402

sys.path.insert(0, str(ROOT / "script_eval"))
from eval_records import model_fingerprint, write_text  # noqa: E402

SET = os.environ  # the settings
LAUNCH = ["bash", ROOT / "script_train/launch.sh"]
SAMPLES = [ROOT / f"data/{name}.sample.json" for name in ("dolly_train", "code_tuning", "math_tuning")]
PASSED_ON = ("LIMIT", "MAX_LENGTH", "MAX_PROMPT_LENGTH")  # to eval_dolly.sh; and where they are given:
PASSED_ON_IF_GIVEN = ("TEMPERATURE", "TOP_P", "TOP_K", "DSKD_COMPAT", "DTYPE", "ROUGE_TOKENIZER")


def with_settings(settings: dict[str, object], *command: object) -> list[object]:
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *command]


class Comparison:
    """The steps in `plan`, and the folders that the summary reads. `builds_on` is a text of names, as in `Step`."""

    def __init__(self, chosen: list[Method], seeds: list[str], further: list[str]):
        self.further = further
        self.output = Path(SET["OUTPUT"])
        self.plan = Plan(self.output, digests())
        self.cache = [] if SET["TEACHER_CACHE"] == "0" else ["--teacher_cache", self.output / "teacher_cache"]
        self.sets, self.sets_folder = SET["EVAL_SETS"], SET["DATA_DIR"]
        self.teacher, self.teacher_step = SET["TEACHER"], "TEACHER"
        self.references: list[Path] = []
        self.runs: list[Path] = []
        if SET["SMALL"] == "1":
            self.make_small_models()
        if not self.sets:
            self.make_set()
        self.add_teacher()
        for kind in dict.fromkeys(["em", *(method.mapper_kind for method in chosen if method.mapper_kind)]):
            command = with_settings({"MAPPER_KIND": kind, "MAPPER": self.mapper(kind)}, *LAUNCH, "build_mapper")
            self.add(kind, self.mapper(kind), f"Vocabulary mapper: {kind}", command, "TEACHER STUDENT")
        self.add_reference("student_untrained", "The student before training", SET["STUDENT"], "STUDENT", student=True)
        for seed in seeds:
            for method in chosen:
                self.add_student(method, seed)

    def add(self, id: str, result: Path, name: str, command: list[object], builds_on: str, spent: str = "") -> None:
        self.plan.add(Step(id, result, name, [str(word) for word in command], builds_on.split(), spent))

    def mapper(self, kind: str) -> Path:
        return self.output / "mappers" / kind / "mapper.safetensors"

    def make_small_models(self) -> None:
        """The quickstart's rows and models. Each of the steps has the name of the setting that it stands for."""
        models = [SET["PYTHON"], ROOT / "script_train/quickstart_models.py"]
        data, held_out = Path(SET["DATA"]), Path(SET["VALIDATION"])
        command = [*models, "split", "--data", *SAMPLES, "--output", data.parent]
        self.add("DATA", held_out, "Rows: 45 of each sample file to train, 5 held out", command, "SAMPLES")
        self.plan.digests["VALIDATION"] = self.plan.digests["DATA"]
        teacher, downloads = Path(SET["TEACHER"]), self.output / "downloads"
        command = [*models, "teacher", "--output", teacher, "--downloads", downloads, "--held_out", held_out]
        self.add("TEACHER", teacher / "config.json", "Teacher: SmolLM2-135M-Instruct", command, "DATA")
        student = Path(SET["STUDENT"])
        command = [*models, "student", "--output", student, "--train_file", data, "--vocab_size", 2048]
        command += ["--hidden", 256, "--layers", 4, "--heads", 4, "--seed", 42]
        name = "Student: a small Llama, and a tokenizer of its own"
        self.add("STUDENT", student / "config.json", name, command, "DATA")

    def make_set(self) -> None:
        self.sets, self.sets_folder = "held-out", self.output / "sets"
        file = self.sets_folder / "held-out/valid.jsonl"
        command = [SET["PYTHON"], __file__, "rows", SET["VALIDATION"], file]
        self.add("sets", file, "The held-out rows as an evaluation set", command, "VALIDATION")

    def add_teacher(self) -> None:
        if SET["TEACHER_READY"] == "1":
            self.add_reference("teacher", "The teacher", self.teacher, "TEACHER")
            return
        self.add_reference("teacher_untuned", "The teacher as it comes", self.teacher, "TEACHER")
        sft = next(method for method in methods() if method.pair == "none")
        settings = {"STUDENT": self.teacher}
        for name in ("SEED", "EPOCHS", "LEARNING_RATE", "BATCH_SIZE", "ACCUMULATION", "ZERO"):
            settings[name] = SET[f"TEACHER_{name}"]
        self.teacher, self.teacher_step = self.output / "teacher", "tuning"
        name = "The teacher is fine-tuned on the data"
        self.add_training("tuning", name, sft, self.teacher, settings, "TEACHER DATA")
        self.add_reference("teacher_tuned", "The teacher, fine-tuned", self.teacher, "tuning")

    def add_training(
        self, id: str, name: str, method: Method, output: Path, settings: dict, builds_on: str, further: tuple = ()
    ) -> None:
        """One run of a method's shell script, with these settings besides those of the comparison."""
        settings |= {"OUTPUT": output, "VALIDATION": "", "LOGGING_STEPS": 0.05}
        command = with_settings(settings, "bash", method.shell, "--save_total_limit", 1, *further)
        self.add(id, output / "train_results.json", name, command, builds_on, spent="checkpoint-*")

    def add_student(self, method: Method, seed: str) -> None:
        output, name = self.output / f"runs/{method.name}/seed_{seed}", f"{method.name}, seed {seed}"
        settings, builds_on, further = {"SEED": seed}, "STUDENT DATA", self.further
        if method.pair != "none":
            settings["TEACHER"] = self.teacher
            settings["KD_ALPHA"] = SET.get(f"{method.name.upper()}_ALPHA") or SET["KD_ALPHA"]
            settings["KD_TEMPERATURE"] = SET.get(f"{method.name.upper()}_TEMPERATURE", "")  # none: its script's own
            builds_on, further = f"{builds_on} {self.teacher_step}", [*self.cache, *further]
        if method.mapper_kind:
            settings |= {"MAPPER_KIND": method.mapper_kind, "MAPPER": self.mapper(method.mapper_kind)}
            builds_on = f"{builds_on} {method.mapper_kind}"
        id = f"{method.name}_seed_{seed}"
        self.add_training(id, f"{name}: training", method, output, settings, builds_on, further)
        self.measure(id, name, output, output, id, student=True)
        self.runs.append(output)

    def add_reference(self, id: str, name: str, model: object, made_by: str, student: bool = False) -> None:
        self.references.append(self.output / "references" / id)
        self.measure(id, name, model, self.references[-1], made_by, student)

    def measure(self, id: str, name: str, model: object, folder: Path, made_by: str, student: bool) -> None:
        """The two evaluations of a model: on the held-out rows, and ROUGE-L.

        Every student is held against the one teacher by CDM's divergence, however it was trained.
        """
        output, builds_on = folder / "evaluation/held_out", f"{made_by} VALIDATION"
        settings, command = {"OUTPUT": output}, ["evaluate", "run_clm_sft.py", model]
        if student:
            settings |= {"TEACHER": self.teacher, "MAPPER": self.mapper("em"), "KD_TEMPERATURE": SET["CDM_TEMPERATURE"]}
            command, builds_on = ["evaluate_student", model, *self.cache], f"{builds_on} {self.teacher_step} em"
        command = with_settings(settings, *LAUNCH, *command)
        self.add(f"{id}.held_out", output / "eval_results.json", f"{name}: held-out rows", command, builds_on)

        output = folder / "evaluation/instructions"
        settings = {"MODEL": model, "OUTPUT": output, "DATA_DIR": self.sets_folder, "SETS": self.sets}
        settings |= {"SEEDS": SET["EVAL_SEEDS"], "BATCH_SIZE": SET["EVAL_BATCH_SIZE"]}
        settings |= {key: SET[key] for key in PASSED_ON} | {key: SET[key] for key in PASSED_ON_IF_GIVEN if SET.get(key)}
        command = with_settings(settings, "bash", ROOT / "script_eval/eval_dolly.sh")
        self.add(f"{id}.rouge", output / "results.json", f"{name}: ROUGE-L", command, f"{made_by} sets")

    def summary(self) -> list[str]:
        command = [SET["PYTHON"], ROOT / "script_eval/summarize.py", *self.runs, "--output", self.output / "summary"]
        return [str(word) for word in (*command, "--references", *self.references)]


# ----------------------------------------------------------------------------------------------------- what is given


def digests() -> dict[str, str]:
    """A digest of each thing that the plan builds on and does not make."""
    given = {}
    if SET["SMALL"] == "1":
        given["SAMPLES"] = " ".join(map(file_digest, SAMPLES))
    else:
        given |= {name: file_digest(Path(SET[name])) for name in ("DATA", "VALIDATION")}
        for name in ("TEACHER", "STUDENT"):
            tokenizer = Path(SET[name], "tokenizer.json")
            of_tokenizer = file_digest(tokenizer) if tokenizer.is_file() else ""
            given[name] = f"{model_fingerprint(SET[name]) or SET[name]} {of_tokenizer}".strip()
    if SET["EVAL_SETS"]:
        given["sets"] = " ".join(file_digest(set_file(name)) for name in SET["EVAL_SETS"].split())
    return given


def set_file(name: str) -> Path:
    """The rows of an evaluation set, where eval_dolly.sh looks for them. Raises ValueError where there are none."""
    for file in (Path(SET["DATA_DIR"], name, place) for place in ("valid.jsonl", "11_/valid.jsonl")):
        if file.is_file():
            return file
    raise ValueError(f"EVAL_SETS names {name}, but there is no {SET['DATA_DIR']}/{name}/valid.jsonl. Set DATA_DIR.")


def check_models_and_rows() -> None:
    """Raises ValueError for what is not given or cannot be found."""
    for name in ("TEACHER", "STUDENT", "DATA", "VALIDATION"):
        if not SET[name]:
            raise ValueError(f"{name} is not set. It needs TEACHER, STUDENT, DATA and VALIDATION, or SMALL=1 alone.")
        if name in ("DATA", "VALIDATION") and SET["SMALL"] != "1" and not Path(SET[name]).is_file():
            raise ValueError(f"{name}={SET[name]} is not a file. Give a JSON file of training rows.")


def chosen_seeds() -> list[str]:
    seeds = SET["SEEDS"].split()
    if not seeds or not all(seed.isdecimal() and str(int(seed)) == seed for seed in seeds):
        raise ValueError(f'SEEDS="{SET["SEEDS"]}": give one whole number or more, such as SEEDS="1 2 3".')
    return seeds


def chosen_methods() -> tuple[list[Method], str]:
    """Those of METHODS that fit the pair, and a sentence about those that do not. Raises ValueError where none does."""
    every = {method.name: method for method in methods()}
    names = list(every) if SET["METHODS"] == "all" else SET["METHODS"].split()
    if not names or not set(names) <= set(every):
        raise ValueError(f'METHODS="{SET["METHODS"]}": give all, or one or more of {" ".join(every)}.')
    for_one_tokenizer = [name for name in names if every[name].pair == "same"]
    why = tokenizers_differ() if for_one_tokenizer else ""
    fitting = [every[name] for name in names if not (why and name in for_one_tokenizer)]
    left_out = f"{' and '.join(for_one_tokenizer)} left out. {why}" if why else ""
    if not fitting:
        raise ValueError(f'METHODS="{SET["METHODS"]}": {left_out} No method is left.')
    return fitting, left_out


def tokenizers_differ() -> str:
    """Why the teacher's and the student's tokenizer are not the same, in a sentence or more; empty where they are."""
    if SET["SMALL"] == "1":
        return "The small student has a tokenizer of its own."
    from transformers import AutoTokenizer

    from modeling.text.encoder import Encoder, require_same_tokenizer

    student, teacher = (Encoder(AutoTokenizer.from_pretrained(SET[name])) for name in ("STUDENT", "TEACHER"))
    try:
        require_same_tokenizer(student, teacher)
    except ValueError as error:
        return str(error)
    return ""


def write_set(data: Path, file: Path) -> None:
    """The rows of a training file as an evaluation set (`prompt`, `output`). Raises as `read_rows`.

    An empty text, which no response could equal, is left out.
    """
    from modeling.text.rows import read_rows

    rows = [{"prompt": row["prefix"], "output": row["text"]} for row in read_rows(data) if row["text"].strip()]
    if not rows:
        raise ValueError(f"{data}: no row of it has a text.")
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows: {file}")


# -------------------------------------------------------------------------------------------------------------- main


def compare(further: list[str]) -> None:
    began = time.monotonic()
    check_models_and_rows()
    seeds, (chosen, left_out) = chosen_seeds(), chosen_methods()
    dry = SET.get("DRY_RUN") == "1"

    def say(text: str) -> None:
        if text:
            print(f"# {text}" if dry else text, flush=True)

    say(f"Device: {SET['DEVICE']}, precision: {SET['PRECISION']}. Output: {SET['OUTPUT']}")
    say(f"Methods: {' '.join(method.name for method in chosen)}. Seeds: {' '.join(seeds)}.")
    say(left_out)
    comparison = Comparison(chosen, seeds, further)
    if dry:
        for number, step in enumerate(comparison.plan.steps, 1):
            print(f"\n# [{number}/{len(comparison.plan.steps)}] {step.name}\n{step.text}")
        print(f"\n# The summary\n{shlex.join(comparison.summary())}")
        return
    if SET["FRESH"] == "1":
        start_over(comparison.output)
        shutil.rmtree(comparison.output / "teacher_cache", ignore_errors=True)
    comparison.plan.run()
    print(flush=True)
    if status := run(comparison.summary()):
        sys.exit(status)
    say(left_out)
    say(f"{time.monotonic() - began:.0f} s in all. The table and the pictures: {comparison.output / 'summary'}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["rows"]:
            write_set(Path(sys.argv[2]), Path(sys.argv[3]))
        else:
            compare(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
