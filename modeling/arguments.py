"""The arguments of the training scripts: what each means, its default, its legal range, checked where it enters.

A script takes flags, or one JSON file of the same names. Everything else that a script takes is
`transformers.TrainingArguments`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.utils import httpx
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers import TrainingArguments as HfTrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import is_liger_kernel_available

from modeling.build_locks import clear_stale_locks
from modeling.errors import first_line

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def check(condition: bool, flag: str, value: object, remedy: str) -> None:
    """Raises ValueError `--flag is value: remedy.` unless the condition holds."""
    if not condition:
        raise ValueError(f"--{flag} is {value!r}: {remedy}.")


@dataclass
class StudentArguments:
    """The model that is trained."""

    model_name_or_path: str = field(
        metadata={"help": "The student: a hub name, or a folder with model and tokenizer. Required."}
    )
    dtype: Dtype = field(
        default="float32",
        metadata={
            "help": "The dtype of the student's weights. float32 with --bf16 true is mixed precision; bfloat16 keeps "
            "the weights and the optimizer's state in bfloat16 too (smaller, less exact)."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention kernel of both models: sdpa, eager, flash_attention_2. By default the library's."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a hub model carries. Only for sources you trust."}
    )
    freeze_emb: bool = field(default=False, metadata={"help": "Do not train the student's input embeddings."})
    freeze_layers: int = field(
        default=0, metadata={"help": "How many of the student's first transformer layers are not trained. 0 or more."}
    )
    use_lora: bool = field(
        default=False,
        metadata={
            "help": "Train low-rank adapters (LoRA) beside the student's weights, which stay as they are. Where "
            "--model_name_or_path is an adapter, that one is trained further; otherwise it is merged into its model."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters. 1 or more."})
    lora_alpha: int = field(
        default=32, metadata={"help": "An adapter's output is multiplied by lora_alpha / lora_rank. 1 or more."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs. From 0, and below 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get an adapter; all-linear is every linear layer but the head."},
    )

    def __post_init__(self):
        check(self.freeze_layers >= 0, "freeze_layers", self.freeze_layers, "give 0 or more")
        for name in ("freeze_layers", "freeze_emb"):
            value = getattr(self, name)
            check(
                not (self.use_lora and value),
                *(name, value, "leave it out with --use_lora true, which trains no layer's own weights"),
            )
        check(self.lora_rank >= 1, "lora_rank", self.lora_rank, "give 1 or more")
        check(self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, "give 1 or more")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "give a number from 0, and below 1")
        for name, default in (("rank", 16), ("alpha", 32), ("dropout", 0.0), ("target_modules", ["all-linear"])):
            value = getattr(self, f"lora_{name}")
            check(self.use_lora or value == default, f"lora_{name}", value, "give --use_lora true too")


@dataclass
class DataArguments:
    """The examples."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training examples: a JSON array or one JSON object a line, with prefix and text (or instruction, "
            "input, output, system, history; or prompt, completion; or prompt, output). Needed by --do_train."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out examples in the same form. Needed by --do_eval."}
    )
    block_size: int = field(
        default=512,
        metadata={"help": "The most tokens an example may have, on either side. A longer one is cut. 2 or more."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows to train."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many held-out rows."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the files. By default this one alone."}
    )

    def __post_init__(self):
        check(self.block_size >= 2, "block_size", self.block_size, "a prompt and a response need at least 2 tokens")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "give 1 or more, or leave it out")


@dataclass
class DistillationArguments:
    """The teacher, and how much it counts."""

    metrics: ClassVar[tuple[str, ...]] = ("kd_loss",)  # that an evaluation gives besides those of `TrainingArguments`

    teacher_path: str = field(
        metadata={"help": "The teacher: a hub name, or a folder with model and tokenizer. Required."}
    )
    teacher_dtype: Dtype = field(
        default="auto", metadata={"help": "The dtype of the teacher's weights. auto is that of its checkpoint."}
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher runs: a torch device, TYPE or TYPE:INDEX, or auto, which spreads it over all "
            "devices that the process sees (a single process only). By default the student's device."
        },
    )
    teacher_zero3: bool = field(
        default=False,
        metadata={
            "help": "Shard the teacher over the ranks with DeepSpeed ZeRO-3, whatever the student's stage. Needs "
            "--deepspeed. By default every rank holds the whole teacher."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder that all ranks see: the teacher runs once over all examples (in batches of "
            "--per_device_eval_batch_size), its last hidden states are kept there with its head, and training reads "
            "them. A run that finds all its examples there does not load the teacher. Any number of teachers and runs "
            "share one folder. By default the teacher runs in every step."
        },
    )
    teacher_cache_dtype: Dtype = field(
        default="auto",
        metadata={"help": "The dtype of what --teacher_cache keeps. auto is the teacher's own, which loses nothing."},
    )
    teacher_cache_topk: int | None = field(
        default=None,
        metadata={
            "help": "Keep only so many of a position's largest log-probabilities, and spread the rest of the "
            "probability evenly over all other tokens: smaller, and an approximation. By default everything is kept, "
            "as hidden states."
        },
    )
    kd_alpha: float = field(
        default=0.5,
        metadata={"help": "The share of cross-entropy in the loss: kd_alpha * CE + (1 - kd_alpha) * KD. 0 to 1."},
    )
    kd_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Both sides' logits are divided by it before the softmax, and KD multiplied by its square. Above 0."
        },
    )

    def __post_init__(self):
        check(0 <= self.kd_alpha <= 1, "kd_alpha", self.kd_alpha, "give a number from 0 (only KD) to 1 (only CE)")
        check(0 < self.kd_temperature < math.inf, "kd_temperature", self.kd_temperature, "give a finite number above 0")
        topk = self.teacher_cache_topk
        check(topk is None or topk >= 1, "teacher_cache_topk", topk, "give 1 or more, or leave it out")
        for name, default in (("teacher_cache_dtype", "auto"), ("teacher_cache_topk", None)):
            value = getattr(self, name)
            check(bool(self.teacher_cache) or value == default, name, value, "give --teacher_cache DIR too")
        if self.teacher_device not in (None, "auto"):
            try:
                torch.device(self.teacher_device)
            except RuntimeError as error:
                check(False, "teacher_device", self.teacher_device, f"give auto or a torch device ({error})")
        check(
            not (self.teacher_zero3 and self.teacher_device),
            "teacher_device",
            self.teacher_device,
            "leave it out with --teacher_zero3 true, which puts a part of the teacher on every rank's device",
        )


@dataclass
class SoftDistillationArguments(DistillationArguments):
    """The same, for methods that compare softened predictions by default."""

    kd_temperature: float = field(
        default=2.0, metadata=DistillationArguments.__dataclass_fields__["kd_temperature"].metadata
    )


@dataclass
class TrainingArguments(HfTrainingArguments):
    """transformers' own, with the defaults of this project where they differ."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "ce_loss", "perplexity", "bits_per_byte")  # of every evaluation

    # Not even for logging is a NaN or an infinite loss replaced by another number.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: share of all)."})
    # The collator makes its own columns, which no model's forward names.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the batches hold more than the model reads."}
    )
    logits_chunk: int = field(
        default=0,
        metadata={
            "help": "Compute the logits of so many positions at a time, together with the loss, and once more for its "
            "gradient: a batch's logits never exist as a whole, on either side. The same loss in far less memory and "
            "more time; 128 is a good number. 0 computes all at once."
        },
    )
    merge_lora: bool = field(
        default=False,
        metadata={
            "help": "Save the student with its adapters merged into its weights, and the adapters themselves in the "
            "subfolder adapter. By default the output folder holds the adapters alone."
        },
    )

    def __post_init__(self):
        self._check_numbers()
        check(not self.remove_unused_columns, "remove_unused_columns", True, "leave it out, losses need the columns")
        check(
            self.label_smoothing_factor == 0,
            "label_smoothing_factor",
            self.label_smoothing_factor,
            "leave it out, no loss here smooths its labels",
        )
        check(
            self.average_tokens_across_devices,
            "average_tokens_across_devices",
            False,
            "leave it out, the loss is a mean over the response tokens of all ranks",
        )
        if self.deepspeed and os.environ.get("LOCAL_RANK", "0") == "0":
            clear_stale_locks()
        if self.deepspeed and self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # ZeRO-3 needs a process group as soon as TrainingArguments reads the DeepSpeed configuration.
            import deepspeed

            deepspeed.init_distributed("gloo")
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(("perplexity", "bits_per_byte")):
            self.greater_is_better = False  # transformers knows it of losses only
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
            _check_json(name, getattr(self, name))
        super().__post_init__()
        self._check_packages()
        if self.do_train:
            self._check_schedule()
        self._check_devices()
        for name, remedy in (
            ("logits_chunk", "where no rank holds the student's whole head, or train with ZeRO-2"),
            (
                "merge_lora",
                "where no rank holds the whole student. Train with ZeRO-2, or merge afterwards: "
                "peft.AutoPeftModelForCausalLM.from_pretrained(OUTPUT).merge_and_unload()",
            ),
        ):
            value = getattr(self, name)
            check(
                not (value and self.deepspeed and self.hf_deepspeed_config.is_zero3()),
                *(name, value, f"leave it out under ZeRO-3, {remedy}"),
            )

    def _check_packages(self) -> None:
        """What a flag needs and is not installed, as transformers would say it after the models are loaded."""
        known = sorted(INTEGRATION_TO_CALLBACK)
        for place in self.report_to:
            check(place in known, "report_to", place, f"give none, all, or some of {', '.join(known)}")
            found = {"azure_ml": is_azureml_available(), "flyte": is_flytekit_available()}  # not always in the list
            check(
                found.get(place) or place in get_available_reporting_integrations(),
                *("report_to", place, "it is not installed here. Install it, or give none or tensorboard"),
            )
        check(
            not self.use_liger_kernel or is_liger_kernel_available(),
            *("use_liger_kernel", True, "liger-kernel is not installed. Install it, or leave the flag out"),
        )
        if self.do_train:
            try:
                Trainer.get_optimizer_cls_and_kwargs(self)
            except (ImportError, ValueError) as error:
                # Some optimizers are made for a model, and ask for it.
                if isinstance(error, ImportError) or "pass a" not in str(error):
                    settings = f" --optim_args {self.optim_args}" if self.optim_args else ""
                    raise ValueError(f"--optim {self.optim.value}{settings}: {first_line(error)}.") from None

    def _check_schedule(self) -> None:
        """Makes the schedule of the learning rate on nothing: what is wrong with its settings shows now."""
        kind, settings = self.lr_scheduler_type, self.lr_scheduler_kwargs or {}
        steps = self.max_steps if self.max_steps > 0 else 1000
        parameters = dict(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters)
        for given in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"):
            parameters.pop(given, None)
        takes_any = parameters.pop("kwargs", None) is not None  # it hands them on
        needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        unknown = [] if takes_any else [name for name in settings if name not in parameters]
        missing = [name for name in needed if name not in settings]
        reason = "; ".join([f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown])
        if not reason:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
            try:
                schedule = get_scheduler(kind, optimizer, self.get_warmup_steps(steps), steps, settings)
                for factor in getattr(schedule, "lr_lambdas", []):
                    factor(steps - 1)
            except (TypeError, ValueError, ArithmeticError) as error:
                reason = first_line(error)
        takes = f" The settings of {kind.value}: {', '.join(parameters)}." if parameters else ""
        if reason:
            raise ValueError(
                f"--lr_scheduler_type {kind.value} with --lr_scheduler_kwargs {json.dumps(settings)}: {reason}.{takes}"
            )

    def _check_devices(self) -> None:
        """Raises ValueError where the processes and devices are not what the flags and the launcher seem to mean."""
        on_cpu = self.device.type == "cpu"
        check(
            not self.fp16 or not on_cpu,
            "fp16",
            True,
            "on a CPU it would be ignored, and training run in float32. Give --bf16 true, or leave it out",
        )
        if on_cpu and self.wants_fsdp:
            raise ValueError(
                "--fsdp (or accelerate's FSDP) is not in force on a CPU: every rank would hold the whole student. "
                "Leave it out, or shard with --deepspeed config/deepspeed_zero3_config.json."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != self.world_size:
            raise ValueError(
                f"The launcher started {processes} processes, but they would train as {self.world_size}. "
                "On CPU, add --use_cpu true."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.n_gpu} devices. Start one process a device: deepspeed, torchrun or "
                "accelerate launch (script_train/launch.sh does), or let it see a single device. torchrun "
                "--nproc_per_node 1 is for a teacher on devices of its own."
            )
        if self.deepspeed and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
            raise ValueError("ACCELERATE_USE_CPU makes accelerate ignore --deepspeed. Unset it; use --use_cpu true.")

    @property
    def wants_fsdp(self) -> bool:
        """By a flag of its own, or by accelerate's configuration."""
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")

    def _check_numbers(self) -> None:
        """What torch and transformers find out late, or never (a NaN)."""
        at_least = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_total_limit": 1,
            "learning_rate": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "warmup_steps": 0,
            "dataloader_num_workers": 0,
            "logits_chunk": 0,
            "adam_epsilon": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            check(value is None or least <= value < math.inf, name, value, f"give a finite number, {least} or more")
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, name, value, "give a finite number above 0")
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a number from 0, and below 1")
        steps = self.max_steps
        check(steps == -1 or steps >= 1, "max_steps", steps, "give 1 or more, or leave it out")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 2**32, name, value, "give a number from 0, and below 2**32")


def _check_json(name: str, value: object) -> None:
    """transformers reads a string that begins with a brace, and says nothing of another."""
    if isinstance(value, str):
        try:
            known = isinstance(json.loads(value), dict)
        except json.JSONDecodeError:
            known = False
        check(known, name, value, "give a JSON object, '{\"name\": value}'")


# Arguments of transformers' and its examples' that are no more, or never were here, and what takes their place.
REPLACED = {
    "adafactor": "Give --optim adafactor",
    "config_name": "Leave it out, the configuration is read from the model's folder",
    "evaluation_strategy": "Give --eval_strategy",
    "fp16_backend": "Leave it out, PyTorch's own mixed precision is used",
    "fp16_opt_level": "Leave it out, PyTorch's own mixed precision is used",
    "fsdp_transformer_layer_cls_to_wrap": "Shard with --deepspeed CONFIG",
    "group_by_length": "Give --train_sampling_strategy group_by_length",
    "half_precision_backend": "Leave it out, PyTorch's own mixed precision is used",
    "logging_dir": "Set TENSORBOARD_LOGGING_DIR in the environment; without it, the log is in the output folder",
    "no_cuda": "Give --use_cpu true",
    "overwrite_output_dir": "Leave it out: a run resumes from the checkpoints in its --output_dir, and "
    "--resume_from_checkpoint false starts over",
    "per_gpu_eval_batch_size": "Give --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "Give --per_device_train_batch_size",
    "push_to_hub_model_id": "Give --hub_model_id",
    "push_to_hub_organization": "Give --hub_model_id ORGANIZATION/NAME",
    "push_to_hub_token": "Give --hub_token, or log in with hf auth login",
    "save_safetensors": "Leave it out, models are always saved so",
    "sharded_ddp": "Shard with --deepspeed CONFIG",
    "tokenizer_name": "Leave it out, the tokenizer is read from the model's folder",
    "torch_dtype": "Give --dtype for the student, --teacher_dtype for the teacher",
    "use_fast_tokenizer": "Leave it out, tokenizers are always fast ones",
    "use_mps_device": "Leave it out, the device is found",
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


def _same_folder(path: str, other: str) -> bool:
    return Path(path).is_dir() and Path(path).resolve() == Path(other).resolve()


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
            not (path and given["do_train"] and _same_folder(path, given["output_dir"])),
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
