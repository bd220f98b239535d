"""The plan of compare_methods.sh: which models are made and measured, by which commands, and one table of them all.

    python compare.py ARGUMENTS …          # of the students' trainings; all settings come from the environment
    python compare.py rows DATA FILE       # a training file as an evaluation set

The settings have the names that the training scripts read: a method's own reach its script as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

NEEDED = ("torch", "transformers", "modeling", "get_vocab_mapper")
if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:  # before what imports them
    print(
        f"error: {os.environ.get('PYTHON', sys.executable)} has no module {', '.join(lacking)}. Install "
        "requirements.txt for it (which installs this project's own too), or unset PYTHON.",
        file=sys.stderr,
    )
    sys.exit(2)

from methods import ROOT, Method, methods  # noqa: E402
from steps import Plan, Step, duration, file_digest, read_json, run, start_over  # noqa: E402

sys.path.insert(0, str(ROOT / "script_eval"))
from eval_records import model_fingerprint, write_text  # noqa: E402

SET = os.environ  # the settings
LAUNCH = ["bash", ROOT / "script_train/launch.sh"]
CHOICE_FOLDER = "choice"  # in the folder of a student: what its α was chosen by
SAMPLES = [ROOT / f"data/{name}.sample.json" for name in ("dolly_train", "code_tuning", "math_tuning")]
OF_ROWS = (  # arguments that change what the models read
    *("--chat", "--system", "--template_kwargs", "--train_on", "--student_chat_template", "--teacher_chat_template"),
)
PASSED_ON = ("LIMIT", "MAX_LENGTH", "MAX_PROMPT_LENGTH")  # to eval_dolly.sh; and where they are given:
PASSED_ON_IF_GIVEN = ("GREEDY", "TEMPERATURE", "TOP_P", "TOP_K", "DSKD_COMPAT", "DTYPE", "ROUGE_TOKENIZER")


def with_settings(settings: dict[str, object], *command: object) -> list[object]:
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *command]


def setting_of(method: Method, name: str) -> str:
    """METHOD_ALPHA and the like."""
    return SET.get(f"{method.name.partition(':')[0].upper()}_{name}", "")


class Trial(NamedTuple):
    start_up: float
    seconds_per_step: float
    steps_in_all: int  # of a whole training


class Comparison:
    """The steps in `plan`, and the folders that the summary reads. `builds_on` is a text of names, as in `Step`.

    It comes in two parts, since the second depends on what the first finds: everything up to the choice of α, then the
    students of the other seeds and all evaluations.
    """

    def __init__(self, chosen: list[Method], seeds: list[str], further: list[str]):
        self.chosen, self.seeds, self.further = chosen, seeds, further
        self.trial_steps = int(SET["TRIAL_STEPS"])
        self.output = Path(SET["OUTPUT"])
        self.plan = Plan(self.output, digests())
        self.cache = [] if SET["TEACHER_CACHE"] == "0" else ["--teacher_cache", self.output / "teacher_cache"]
        self.sets, self.sets_folder, self.chats = SET["EVAL_SETS"], SET["DATA_DIR"], False
        self.teacher, self.teacher_step = SET["TEACHER"], "TEACHER"
        self.references: list[Path] = []
        self.runs: list[Path] = []
        self.like: dict[str, str] = {}  # step → the earlier one that takes as long, or the trial of its training
        if SET["PAIR"] == "transfer":
            self.make_transfer_pair()
        if not self.sets:
            self.make_set()
        self.add_teacher()
        for kind in dict.fromkeys(["em", *(method.mapper_kind for method in chosen if method.mapper_kind)]):
            command = with_settings({"MAPPER_KIND": kind, "MAPPER": self.mapper(kind)}, *LAUNCH, "build_mapper")
            self.add(kind, self.mapper(kind), f"Vocabulary mapper: {kind}", command, "TEACHER STUDENT")
        self.prepared = len(self.plan.steps)
        self.add_reference("student_untrained", "The student before training", SET["STUDENT"], "STUDENT", student=True)
        for method in chosen if self.trial_steps else ():
            self.add_trial(method)
        self.tried = len(self.plan.steps)
        self.alphas = {method.name: self.candidates(method) for method in chosen if method.pair != "none"}
        for method in chosen:
            if self.is_to_choose(method):
                for alpha in self.alphas[method.name]:
                    self.add_candidate(method, alpha)
        self.decided = len(self.plan.steps)

    def add(self, id: str, result: Path, name: str, command: list[object], builds_on: str, spent: str = "") -> None:
        self.plan.add(Step(id, result, name, [str(word) for word in command], builds_on.split(), spent))

    def mapper(self, kind: str) -> Path:
        return self.output / "mappers" / kind / "mapper.safetensors"

    def make_transfer_pair(self) -> None:
        """The student, and what of teacher and rows is not given. A step has the name of the setting it stands for."""
        models = [SET["PYTHON"], ROOT / "script_train/quickstart_models.py"]
        data, held_out, teacher, student = (Path(SET[name]) for name in ("DATA", "VALIDATION", "TEACHER", "STUDENT"))
        if "DATA" not in self.plan.digests:
            command = [*models, "split", "--choice", "--data", *SAMPLES, "--output", data.parent]
            name = "Rows: 40 of each sample file to train, 5 to choose α by, 5 held out"
            self.add("DATA", held_out, name, command, "SAMPLES")
            made = {name for name in ("VALIDATION", "CHOICE") if name not in self.plan.digests}
            self.plan.digests |= dict.fromkeys(made, self.plan.digests["DATA"])
        if "TEACHER" not in self.plan.digests:
            downloads = self.output / "downloads"
            command = [*models, "teacher", "--output", teacher, "--downloads", downloads, "--held_out", held_out]
            self.add("TEACHER", teacher / "config.json", "Teacher: SmolLM2-135M-Instruct", command, "VALIDATION")
        command = [SET["PYTHON"], ROOT / "script_train/make_transfer_pair.py", "--model", teacher, "--output", student]
        command += ["--layers", SET["LAYERS"]] if SET["LAYERS"] else []
        if SET["STUDENT_TOKENIZER"]:
            command, tokenizer = [*command, "--tokenizer", SET["STUDENT_TOKENIZER"]], "STUDENT_TOKENIZER"
        else:
            command += ["--train_tokenizer", data, "--vocab_size", SET["VOCAB_SIZE"]]
            tokenizer = "DATA"
        name = "Student: the teacher, before it is fine-tuned, with another tokenizer"
        self.add("STUDENT", student / "config.json", name, [*command, "--overwrite"], f"TEACHER {tokenizer}")

    def make_set(self) -> None:
        self.sets, self.sets_folder = "held-out", self.output / "sets"
        self.chats = "VALIDATION" not in SET["MADE"].split() and holds_chats(SET["VALIDATION"])
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
        self,
        id: str,
        name: str,
        method: Method,
        output: Path,
        settings: dict,
        builds_on: str,
        further: tuple = (),
        spent: str = "checkpoint-*",
    ) -> None:
        """One run of a method's shell script, with these settings besides those of the comparison."""
        settings |= {"OUTPUT": output, "VALIDATION": "", "LOGGING_STEPS": 0.05}
        command = with_settings(settings, "bash", method.shell, "--save_total_limit", 1, *further)
        self.add(id, output / "train_results.json", name, command, builds_on, spent)

    def add_training_of_student(
        self, id: str, name: str, method: Method, output: Path, seed: str, alpha: str, further: tuple = (), **options
    ) -> None:
        settings, builds_on, further = {"SEED": seed}, "STUDENT DATA", [*self.further, *further]
        if method.pair != "none":
            settings |= {"TEACHER": self.teacher, "KD_ALPHA": alpha}
            settings["KD_TEMPERATURE"] = setting_of(method, "TEMPERATURE")  # none: its script's own
            builds_on, further = f"{builds_on} {self.teacher_step}", [*self.cache, *further]
        if method.mapper_kind:
            settings |= {"MAPPER_KIND": method.mapper_kind, "MAPPER": self.mapper(method.mapper_kind)}
            builds_on = f"{builds_on} {method.mapper_kind}"
        settings |= own_settings(method.name)
        self.add_training(id, name, method, output, settings, builds_on, further, **options)

    def add_trial(self, method: Method) -> None:
        """A few steps of a method: what would fail fails now, and the time of its trainings is known."""
        name, output = f"{method.name}: a trial of {self.trial_steps} steps", self.output / "trials" / method.name
        limits = ("--max_steps", self.trial_steps, "--save_strategy", "no")
        self.add_training_of_student(
            f"{method.name}.trial", name, method, output, "1", "0.5", limits, spent="*.safetensors"
        )

    def candidates(self, method: Method) -> list[str]:
        """The α among which the method's is chosen; one alone where it is given."""
        given = setting_of(method, "ALPHA")
        return [given] if given else SET["ALPHAS"].split() or [SET["KD_ALPHA"]]

    def is_to_choose(self, method: Method) -> bool:
        return len(self.alphas.get(method.name, ())) > 1

    def candidate(self, method: str, alpha: str) -> Path:
        return self.output / "alphas" / alpha / method / f"seed_{self.seeds[0]}"

    def add_candidate(self, method: Method, alpha: str) -> None:
        """The student of the first seed with one α, and its bits per byte on the rows for choosing."""
        output, id = self.candidate(method.name, alpha), f"{method.name}_alpha_{alpha}_seed_{self.seeds[0]}"
        name = f"{method.name}, α {alpha}"
        self.add_training_of_student(id, f"{name}: training", method, output, self.seeds[0], alpha)
        self.like[id] = f"{method.name}.trial"
        folder = output / CHOICE_FOLDER
        settings = {"OUTPUT": folder, "VALIDATION": SET["CHOICE"]}
        command = with_settings(settings, *LAUNCH, "evaluate", "run_clm_sft.py", output)
        result = folder / "eval_results.json"
        self.add(f"{id}.choice", result, f"{name}: rows for choosing", command, f"{id} CHOICE")
        self.like[f"{id}.choice"] = "student_untrained.held_out"

    def choice(self) -> dict[str, dict[str, float]]:
        """Bits per byte on the rows for choosing, `{method: {α: figure}}`, as far as they are there."""
        found: dict[str, dict[str, float]] = {}
        for method, candidates in self.alphas.items():
            for alpha in candidates:
                file = self.candidate(method, alpha) / CHOICE_FOLDER / "eval_results.json"
                if file.is_file():
                    found.setdefault(method, {})[alpha] = read_json(file)["eval_bits_per_byte"]
        return found

    def chosen_alphas(self) -> dict[str, str]:
        """The α of each method with a teacher: the best of the choice, and the first where there is none yet."""
        choice = self.choice()
        return {
            method: min(choice[method], key=choice[method].get) if method in choice else candidates[0]
            for method, candidates in self.alphas.items()
        }

    def add_students(self) -> None:
        """What follows the choice of α. Called again, it replaces what it has added, by what is chosen now."""
        del self.plan.steps[self.decided :], self.runs[:]
        alphas = self.chosen_alphas()
        for seed in self.seeds:
            for method in self.chosen:
                self.add_student(method, seed, alphas.get(method.name, ""))

    def add_student(self, method: Method, seed: str, alpha: str) -> None:
        output, name = self.output / f"runs/{method.name}/seed_{seed}", f"{method.name}, seed {seed}"
        id = f"{method.name}_seed_{seed}"
        if seed == self.seeds[0] and self.is_to_choose(method):  # trained for the choice
            output, id = self.candidate(method.name, alpha), f"{method.name}_alpha_{alpha}_seed_{seed}"
        else:
            self.add_training_of_student(id, f"{name}: training", method, output, seed, alpha)
            self.like[id] = f"{method.name}.trial"
        self.measure(id, name, output, output, id, student=True)
        for kind in ("held_out", "rouge"):
            self.like[f"{id}.{kind}"] = f"student_untrained.{kind}"
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
        settings |= {"CHAT": 1} if self.chats else {}
        command = with_settings(settings, "bash", ROOT / "script_eval/eval_dolly.sh")
        self.add(f"{id}.rouge", output / "results.json", f"{name}: ROUGE-L", command, f"{made_by} sets")

    def expect(self) -> str:
        """Fills in what the steps may take, by the trials and the untrained student's evaluations. Returns a line."""
        records = {step.id: self.plan.record(step) for step in self.plan.steps[: self.tried]}
        took = {id: record["seconds"] for id, record in records.items() if record}
        trials = {id: trial for id in took if id.endswith(".trial") and (trial := self.trial(id, took[id]))}
        if not trials:
            return ""
        start_up = statistics.median(trial.start_up for trial in trials.values())
        for step in self.plan.steps[self.tried :]:
            if trial := trials.get(self.like.get(step.id)):
                step.expected = start_up + trial.seconds_per_step * trial.steps_in_all
            else:
                step.expected = took.get(self.like.get(step.id), 0.0)
        steps = [step for step in self.plan.steps[self.tried :] if not self.plan.is_done(step)]
        if not steps:
            return ""
        pace = ", ".join(f"{id.removesuffix('.trial')} {trial.seconds_per_step:.2g}" for id, trial in trials.items())
        trainings = sum(step.result.name == "train_results.json" for step in steps)
        left = duration(self.plan.seconds_left() / int(SET["JOBS"]))  # the trials shared the device as much
        return (
            f"By the trials, what is left takes about {left}: {trainings} trainings and "
            f"{len(steps) - trainings} evaluations. Seconds a step: {pace}."
        )

    def trial(self, id: str, seconds: float) -> Trial | None:
        """What a trial that took so long tells of a training; None where it was resumed after its last step."""
        found = read_json(self.output / "trials" / id.removesuffix(".trial") / "train_results.json")
        if "train_seconds_per_step" not in found:
            return None
        per_step = found["train_seconds_per_step"]
        steps_in_all = round(float(SET["EPOCHS"]) * self.trial_steps / found["epoch"])
        return Trial(max(0.0, seconds - self.trial_steps * per_step), per_step, steps_in_all)

    def summary(self) -> list[str]:
        command = [SET["PYTHON"], ROOT / "script_eval/summarize.py", *self.runs, "--output", self.output / "summary"]
        command += ["--against", "SFT"] if any(method.name == "SFT" for method in self.chosen) else []
        command += ["--columns", self.output / "summary/alphas.json", "--references", *self.references]
        return [str(word) for word in command]

    def write_alphas(self) -> None:
        """The α of each method, for the summary's table, and how they were chosen."""
        folder, choice, chosen = self.output / "summary", self.choice(), self.chosen_alphas()
        write_text(folder / "alphas.json", json.dumps({"α": chosen}, ensure_ascii=False) + "\n")
        if choice:
            alphas = list(dict.fromkeys(alpha for figures in choice.values() for alpha in figures))
            lines = [f"| bits per byte ↓, rows for choosing, seed {self.seeds[0]} | " + " | ".join(alphas) + " |"]
            lines.append("|---" * (len(alphas) + 1) + "|")
            for method, figures in choice.items():
                cells = [f"{figures[alpha]:.3f}" if alpha in figures else "–" for alpha in alphas]
                marked = [f"**{c}**" if alpha == chosen[method] else c for alpha, c in zip(alphas, cells)]
                lines.append(f"| {method} | " + " | ".join(marked) + " |")
            text = "\n".join(lines) + "\n"
            write_text(folder / "choice.md", text)
            print(f"\n{text}")


# ----------------------------------------------------------------------------------------------------- what is given


def digests() -> dict[str, str]:
    """A digest of each thing that the plan builds on and does not make."""
    made = set(SET["MADE"].split())
    given = {"SAMPLES": " ".join(map(file_digest, SAMPLES))} if "DATA" in made else {}
    given |= {name: file_digest(Path(SET[name])) for name in ("DATA", "VALIDATION", "CHOICE") if name not in made}
    for name in ("TEACHER", "STUDENT", "STUDENT_TOKENIZER"):
        if name not in made:
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


def check_settings(further: list[str]) -> None:
    """Raises ValueError for what is not given, cannot be found, or cannot be."""
    made = SET["MADE"].split()
    for name in ("TEACHER", "STUDENT", "DATA", "VALIDATION", "CHOICE"):
        if not SET[name]:
            raise ValueError(f"{name} is not set. It needs TEACHER, STUDENT, DATA and VALIDATION, or SMALL=1 alone.")
        if name in ("DATA", "VALIDATION", "CHOICE") and name not in made and not Path(SET[name]).is_file():
            raise ValueError(f"{name}={SET[name]} is not a file. Give a JSON file of training rows.")
    if given := [word for word in further if word.partition("=")[0] in OF_ROWS]:
        raise ValueError(
            f"{given[0]}: what stands behind the command reaches the students' trainings alone, not the teacher's and "
            "not the evaluations. Give rows with messages, and models with chat templates, instead."
        )
    for alpha in SET["ALPHAS"].split():
        try:
            within = 0 <= float(alpha) <= 1
        except ValueError:
            within = False
        if not within:
            raise ValueError(f'ALPHAS="{SET["ALPHAS"]}": give numbers from 0 to 1, such as ALPHAS="0.5 0.8 0.9".')
    if not SET["JOBS"].isdecimal() or int(SET["JOBS"]) < 1:
        raise ValueError(f"JOBS={SET['JOBS']} is not a number of runs, 1 or more.")
    if not SET["TRIAL_STEPS"].isdecimal():
        raise ValueError(f"TRIAL_STEPS={SET['TRIAL_STEPS']} is not a number of steps. 0 leaves the trials out.")


def chosen_seeds() -> list[str]:
    seeds = SET["SEEDS"].split()
    if not seeds or not all(seed.isdecimal() and str(int(seed)) == seed for seed in seeds):
        raise ValueError(f'SEEDS="{SET["SEEDS"]}": give one whole number or more, such as SEEDS="1 2 3".')
    return seeds


def chosen_methods() -> tuple[list[Method], str]:
    """Those of METHODS that fit the pair, and a sentence about those that do not. Raises ValueError where none does."""
    every = {method.name: method for method in methods()}
    names = dict.fromkeys(n for name in SET["METHODS"].split() for n in (every if name == "all" else [name]))
    chosen = [with_own_settings(every[base], name) for name in names if (base := name.partition(":")[0]) in every]
    if not names or len(chosen) < len(names):
        raise ValueError(
            f'METHODS="{SET["METHODS"]}": give all, or one or more of {" ".join(every)}; with a setting of its own as '
            "in CDM:ALIGNMENT=byte."
        )
    for_one_tokenizer = [method.name for method in chosen if method.pair == "same"]
    why = tokenizers_differ() if for_one_tokenizer else ""
    fitting = [method for method in chosen if not (why and method.name in for_one_tokenizer)]
    left_out = f"{' and '.join(for_one_tokenizer)} left out. {why}" if why else ""
    if not fitting:
        raise ValueError(f'METHODS="{SET["METHODS"]}": {left_out} No method is left.')
    return fitting, left_out


def own_settings(name: str) -> dict[str, str]:
    """`CDM:ALIGNMENT=byte,TOPK=20` → `{"ALIGNMENT": "byte", "TOPK": "20"}`. Raises ValueError."""
    pairs = [pair.partition("=") for pair in name.partition(":")[2].split(",") if pair]
    if not all(re.fullmatch(r"[A-Z_]+", key) and is_set for key, is_set, _ in pairs):
        raise ValueError(f"METHODS: {name} has not the form METHOD:SETTING=VALUE,SETTING=VALUE.")
    return {key: value for key, _, value in pairs}


def with_own_settings(method: Method, name: str) -> Method:
    """The method under a name that holds settings. Raises ValueError where its shell script has not such a one."""
    for key in (own := own_settings(name)):
        if f"\n{key}=${{{key}:-" not in method.shell.read_text(encoding="utf-8"):
            raise ValueError(f"METHODS: {name}: {method.shell} has no setting {key}.")
    return dataclasses.replace(method, name=name, mapper_kind=own.get("MAPPER_KIND", method.mapper_kind))


def tokenizers_differ() -> str:
    """Why the teacher's and the student's tokenizer are not the same, in a sentence or more; empty where they are."""
    if SET["PAIR"] == "transfer":
        return "The student gets a tokenizer of its own."
    from transformers import AutoTokenizer

    from modeling.text.encoder import Encoder, require_same_tokenizer

    student, teacher = (Encoder(AutoTokenizer.from_pretrained(SET[name])) for name in ("STUDENT", "TEACHER"))
    try:
        require_same_tokenizer(student, teacher)
    except ValueError as error:
        return str(error)
    return ""


def holds_chats(data: str) -> bool:
    from modeling.text.rows import are_chat_rows

    return are_chat_rows(data)


def write_set(data: Path, file: Path) -> None:
    """The rows of a training file as an evaluation set: `prompt` (of chats, messages) and `output`.

    What a training would pass over, it leaves out too. Raises ValueError where nothing is left, and as `read_rows`.
    """
    from modeling.text.messages import ChatRows
    from modeling.text.rows import read_rows

    chat = ChatRows() if holds_chats(data) else None
    found = list(read_rows(data, chat))
    rows = [
        {"prompt": json.loads(row["messages"]) if chat else row["prefix"], "output": row["text"]}
        for row in found
        if not row["fault"]
    ]
    if not rows:
        raise ValueError(f"{data}: no row of it can be asked" + (f" ({found[0]['fault']})." if found else "."))
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows: {file}")


# -------------------------------------------------------------------------------------------------------------- main


def compare(further: list[str]) -> None:
    began = time.monotonic()
    check_settings(further)
    seeds, (chosen, left_out) = chosen_seeds(), chosen_methods()
    dry = SET.get("DRY_RUN") == "1"

    def say(text: str) -> None:
        if text:
            print(f"# {text}" if dry else text, flush=True)

    say(f"Device: {SET['DEVICE']}, precision: {SET['PRECISION']}. Output: {SET['OUTPUT']}")
    say(f"Methods: {' '.join(method.name for method in chosen)}. Seeds: {' '.join(seeds)}.")
    say(left_out)
    comparison = Comparison(chosen, seeds, further)
    comparison.add_students()
    plan = comparison.plan
    if dry:
        for number, step in enumerate(plan.steps, 1):
            print(f"\n# [{number}/{len(plan.steps)}] {step.name}\n{step.text}")
        print(f"\n# The summary\n{shlex.join(comparison.summary())}")
        return
    if SET["FRESH"] == "1":
        start_over(comparison.output)
        shutil.rmtree(comparison.output / "teacher_cache", ignore_errors=True)
        comparison.add_students()
    if all(plan.is_done(step) for step in plan.steps[: comparison.decided]):
        plan.require_same()  # before anything is run
    jobs = int(SET["JOBS"])
    plan.run(last=comparison.prepared)
    plan.run(comparison.prepared, comparison.tried, jobs)  # side by side like what they are to tell the time of
    say(f"\n{comparison.expect()}".rstrip())
    plan.run(comparison.tried, comparison.decided, jobs)
    comparison.add_students()  # with the α that are chosen now
    comparison.expect()
    plan.run(comparison.decided, jobs=jobs)
    comparison.write_alphas()
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
