"""From a command line, or one JSON file, to the arguments; what contradicts each other is told in one line."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.utils import httpx
from transformers import HfArgumentParser

from modeling.errors import first_line
from modeling.training.arguments import check
from modeling.training.training_arguments import TrainingArguments

# Arguments of transformers' and its examples' that are no more, and what takes their place; of others, the nearest.
REPLACED = {
    "fsdp_transformer_layer_cls_to_wrap": "Shard with --deepspeed CONFIG",
    "group_by_length": "Give --train_sampling_strategy group_by_length",
    "logging_dir": "Set TENSORBOARD_LOGGING_DIR in the environment; without it, the log is in the output folder",
    "no_cuda": "Give --use_cpu true",
    "overwrite_output_dir": "Leave it out: a run resumes from the checkpoints in its --output_dir, and "
    "--resume_from_checkpoint false starts over",
    "tokenizer_name": "Leave it out, the tokenizer is read from the model's folder",
    "torch_dtype": "Give --dtype for the student, --teacher_dtype for the teacher",
    "warmup_ratio": "Give --warmup_steps a number below 1, the share of all steps",
}


class ArgumentParser(HfArgumentParser):
    """Ends a script with status 2 and one line: no usage of 200 lines, no second spelling of each flag."""

    source = ""  # what the arguments come from, in front of a message

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", message).replace("\n", " ")
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n")

    def unknown(self, flags: list[str]) -> str:
        """What to say of flags that are none."""
        sentences = []
        for flag in flags:
            if instead := REPLACED.get(flag.lstrip("-")):
                sentences.append(f"unknown argument {flag}. {instead}.")
                continue
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            near += [known for known in self._option_string_actions if known.startswith(flag)]
            hint = f"Did you mean {near[0]}?" if near else "--help lists all."
            sentences.append(f"unknown argument {flag}. {hint}")
        return " ".join(sentences)


def parse_arguments(dataclass_types: list[type], description: str, argv: list[str] | None = None) -> tuple:
    """One instance of each dataclass, from flags or from a single JSON file. Exits with a message on bad input."""
    argv = sys.argv[1:] if argv is None else argv
    # Abbreviations would change their meaning with every new flag.
    parser = ArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    # A launcher adds its own flag for the rank; transformers reads the rank from the environment.
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            parser.source = f"{argv[0]}: "
            argv = _flags_of_json(Path(argv[0]), parser)
        # First: a misspelt flag that is required would be called missing.
        names = dict.fromkeys(word.split("=")[0] for word in argv if word.startswith("--") and word != "--")
        if unknown := [name for name in names if name not in parser._option_string_actions]:
            parser.error(parser.unknown(unknown))
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            alone = " A JSON file of arguments stands alone." if rest[0].endswith(".json") else ""
            parser.error(f"unexpected {rest[0]!r}: in front of every value stands its flag.{alone}")
        check_together(*parsed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for note in notes(*parsed):
        print(f"{parser.prog}: warning: {note}", file=sys.stderr)
    return tuple(parsed)


def notes(*groups: object) -> list[str]:
    """What is legal and hardly meant, for the one process that speaks for all."""
    given = {name: value for group in groups for name, value in vars(group).items()}
    training = [group for group in groups if isinstance(group, TrainingArguments)]
    if not all(group.should_log for group in training):
        return []
    told = []
    if given.get("kd_alpha") == 1:
        told.append(
            "--kd_alpha is 1: the teacher teaches nothing, and this is plain SFT. modeling/run_clm_sft.py does the "
            "same without a teacher's memory and time; give a smaller number to distil."
        )
    if any(group.wants_fsdp for group in training):
        told.append(
            "--fsdp: this project is not tested with FSDP. What it shards with, and resumes from, is DeepSpeed: "
            "--deepspeed config/deepspeed_config.json, or config/deepspeed_zero3_config.json."
        )
    return told


def check_together(*groups: object) -> None:
    """Raises ValueError where arguments of different groups contradict each other."""
    given = {name: value for group in groups for name, value in vars(group).items()}
    if not (given["do_train"] or given["do_eval"]):
        raise ValueError("Nothing to do: give --do_train true, --do_eval true, or both.")
    check(
        given["do_eval"] or not given["eval_on_start"],
        "eval_on_start",
        True,
        "give --do_eval true and --validation_file FILE too",
    )
    strategy = getattr(given["eval_strategy"], "value", given["eval_strategy"])
    evaluates = "--do_eval true" if strategy == "no" else f"--eval_strategy {strategy}"
    for wanted, because, file in (
        (given["do_train"], "--do_train true", "train_file"),
        (given["do_eval"], evaluates, "validation_file"),
    ):
        if wanted and not given[file]:
            raise ValueError(f"{because} needs --{file} FILE.")
    for name in ("teacher_path", "same_tokenizer_teacher_path"):
        path = given.get(name)
        check(
            not (path and given["do_train"] and Path(path).resolve() == Path(given["output_dir"]).resolve()),
            "output_dir",
            given["output_dir"],
            f"the trained student would be saved over the teacher, --{name}. Give another folder",
        )
    check(
        not given.get("teacher_zero3") or given["deepspeed"],
        "teacher_zero3",
        True,
        "give --deepspeed CONFIG too; ZeRO-3 is DeepSpeed's",
    )
    check(
        given.get("teacher_device") != "auto" or int(os.environ.get("WORLD_SIZE", "1")) == 1,
        "teacher_device",
        "auto",
        "every rank would spread a copy over the same devices. Start one process, or use --teacher_zero3 true",
    )
    kept, topk = given.get("teacher_cache_topk"), given.get("topk")
    check(
        kept is None or topk is None or kept >= topk,
        "teacher_cache_topk",
        kept,
        f"the loss reads the {topk} most probable tokens (--topk). Give at least as many, or a smaller --topk",
    )
    check(
        not given.get("merge_lora") or given.get("use_lora"),
        "merge_lora",
        True,
        "give --use_lora true too, there is nothing to merge",
    )
    metric, metrics = given["metric_for_best_model"], sorted(n for g in groups for n in getattr(g, "metrics", ()))
    check(
        metric is None or metric.removeprefix("eval_") in metrics,
        *("metric_for_best_model", metric, f"an evaluation gives {', '.join(metrics)}. Give one of them"),
    )
    if given["push_to_hub"] and int(os.environ.get("RANK", "0")) == 0:
        _check_hub(given["hub_token"])


def _check_hub(token: str | None) -> None:
    """Raises ValueError where the hub cannot be reached, or knows no account that this is."""
    try:
        if is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        HfApi().whoami(token=token)
    except (OSError, httpx.HTTPError) as error:
        raise ValueError(
            f"--push_to_hub is True: the hub cannot be written to ({first_line(error)}). Where there is a network, "
            "log in with hf auth login, or give --hub_token; else leave the flag out, and push the trained folder "
            "later: hf upload NAME FOLDER."
        ) from None


def _flags_of_json(path: Path, parser: ArgumentParser) -> list[str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8. Convert the file to UTF-8") from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise ValueError("it must hold one JSON object of argument names and values")
    flags: list[str] = []
    for name, value in values.items():
        action = parser._option_string_actions.get(f"--{name}")
        if isinstance(value, list):
            if action is not None and action.nargs is None:
                raise ValueError(f"--{name} is {value!r}: give one value, not a list")
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
