"""The arguments of the training scripts: what each means, its default, its legal range, checked where it enters.

Everything else that a script takes is `transformers.TrainingArguments` (see `training_arguments`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

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
    student_chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A file with the Jinja chat template that chat rows are rendered with for the student, and that it "
            "is saved with. By default its tokenizer's own."
        },
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
            "help": "Training examples: a file of JSON (an array, or one object a line) or Parquet, or a hub data set, "
            "USER/NAME:SPLIT; with prefix and text (or instruction, input, output, system, history; or prompt, "
            "completion; or prompt, output), or of chats with messages (or conversations; or prompt and completion as "
            "lists of messages). Needed by --do_train."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out examples in the same form. Needed by --do_eval."}
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "Read rows without messages as chats, too: a user's message and its answer. Rows with messages "
            "always are chats."
        },
    )
    train_on: Literal["last", "all"] = field(
        default="last",
        metadata={"help": "Which of the assistant's messages in a chat row are learned: the last, or all of them."},
    )
    system: str | None = field(
        default=None, metadata={"help": "The system message of chats that have none. By default none is put there."}
    )
    template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "What both chat templates are given besides the messages, as a JSON object, for example "
            "'{\"enable_thinking\": false}'."
        },
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
        if self.template_kwargs is not None:
            try:
                legal = isinstance(json.loads(self.template_kwargs), dict)
            except ValueError:
                legal = False
            check(legal, "template_kwargs", self.template_kwargs, "give a JSON object, such as '{\"name\": false}'")
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
    teacher_chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A file with the Jinja chat template that chat rows are rendered with for the teacher. By default "
            "its tokenizer's own."
        },
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
class LikelihoodArguments(DistillationArguments):
    """The same, for methods that read the teacher's probability of tokens which may not be among its likeliest."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.teacher_cache_topk is None,
            *("teacher_cache_topk", self.teacher_cache_topk),
            "leave it out: this method reads the teacher's probability of tokens that the teacher did not choose (the "
            "text's own tokens, or the student's likeliest), and of one that is not among the K largest, only an equal "
            "share of the rest is kept",
        )


@dataclass
class MapperArguments:
    """The vocabulary mapper, of the methods that need one."""

    teacher_to_student_id_mapping: str | None = field(
        default=None,
        metadata={
            "help": "The mapper file of this pair, of the kind that the method reads, made by a script of "
            "get_vocab_mapper/; or a JSON file {teacher id: student id} as the published scripts have it (0 = "
            "unmapped). By default the one in --mapper_dir."
        },
    )
    mapper_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder with the mappers of pairs. The one that is needed is built there, once, where there is "
            "none. By default the folder mappers beside --output_dir."
        },
    )

    def __post_init__(self):
        check(
            not (self.teacher_to_student_id_mapping and self.mapper_dir),
            *("mapper_dir", self.mapper_dir, "leave it out with --teacher_to_student_id_mapping, which names the file"),
        )
