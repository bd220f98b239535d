"""The arguments of the training scripts: what each means, its default, its legal range, checked where it enters.

A script takes flags, or one JSON file of the same names. Everything else that a script takes is
`transformers.TrainingArguments`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser
from transformers import TrainingArguments as HfTrainingArguments

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
        metadata={"help": "Train low-rank adapters (LoRA) beside the student's weights, which stay as they are."},
    )
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters. 1 or more."})
    lora_alpha: int = field(
        default=32, metadata={"help": "An adapter's output is multiplied by lora_alpha / lora_rank. 1 or more."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapters' inputs. From 0, and below 1."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get an adapter; all-linear is every linear layer but the head."},
    )

    def __post_init__(self):
        check(self.freeze_layers >= 0, "freeze_layers", self.freeze_layers, "give 0 or more")
        check(
            not (self.use_lora and self.freeze_layers),
            "freeze_layers",
            self.freeze_layers,
            "leave it out with --use_lora true, which trains no layer's own weights",
        )
        check(self.lora_rank >= 1, "lora_rank", self.lora_rank, "give 1 or more")
        check(self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, "give 1 or more")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "give a number from 0, and below 1")


@dataclass
class DataArguments:
    """The examples."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training examples: a JSON array or one JSON object a line, with prefix and text (or instruction, "
            "input, output; or prompt, completion; or prompt, output). Needed by --do_train."
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
        check(self.kd_temperature > 0, "kd_temperature", self.kd_temperature, "give a number above 0")
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

    # Not even for logging is a NaN or an infinite loss replaced by another number.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: share of all)."})
    # The collator makes its own columns, which no model's forward names.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the batches hold more than the model reads."}
    )
    merge_lora: bool = field(
        default=False,
        metadata={
            "help": "Save the student with its adapters merged into its weights, and the adapters themselves in the "
            "subfolder adapter. By default the output folder holds the adapters alone."
        },
    )

    def __post_init__(self):
        check(not self.remove_unused_columns, "remove_unused_columns", True, "leave it out, losses need the columns")
        check(
            self.average_tokens_across_devices,
            "average_tokens_across_devices",
            False,
            "leave it out, the loss is a mean over the response tokens of all ranks",
        )
        if self.deepspeed and self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # ZeRO-3 needs a process group as soon as TrainingArguments reads the DeepSpeed configuration.
            import deepspeed

            deepspeed.init_distributed("gloo")
        super().__post_init__()
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
        check(
            not (self.merge_lora and self.deepspeed and self.hf_deepspeed_config.is_zero3()),
            "merge_lora",
            True,
            "leave it out under ZeRO-3, where no rank holds the whole student. Train with ZeRO-2, or merge afterwards: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(OUTPUT).merge_and_unload()",
        )


def parse_arguments(dataclass_types: list[type], description: str, argv: list[str] | None = None) -> tuple:
    """One instance of each dataclass, from flags or from a single JSON file. Exits with a message on bad input."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(dataclass_types, description=description)
    # A launcher adds its own flag for the rank; transformers reads the rank from the environment.
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            argv = _flags_of_json(Path(argv[0]))
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        check_together(*parsed)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if unknown:
        flag = next((a for a in unknown if a.startswith("-")), unknown[0])
        near = difflib.get_close_matches(flag.split("=")[0], parser._option_string_actions, n=1)
        hint = f" Did you mean {near[0]}?" if near else " --help lists all."
        parser.exit(2, f"{parser.prog}: error: unknown argument {flag}.{hint}\n")
    return tuple(parsed)


def check_together(*groups: object) -> None:
    """Raises ValueError where arguments of different groups contradict each other."""
    given = {name: value for group in groups for name, value in vars(group).items()}
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
    check(
        not given.get("merge_lora") or given.get("use_lora"),
        "merge_lora",
        True,
        "give --use_lora true too, there is nothing to merge",
    )


def _flags_of_json(path: Path) -> list[str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it must hold one JSON object of argument names and values")
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, list):
            flags.extend(map(str, value))
        else:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags
