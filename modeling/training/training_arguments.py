"""transformers' own TrainingArguments, with this project's defaults, and what is wrong with them said at the start."""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import Trainer, get_scheduler
from transformers import TrainingArguments as HfTrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import is_liger_kernel_available

from modeling.errors import first_line
from modeling.training.arguments import check


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
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that make batches beside training. By default 2 on an accelerator, 0 on a CPU."},
    )
    logits_chunk: int = field(
        default=0,
        metadata={
            "help": "Compute the logits of so many positions at a time, together with the loss, and once more for its "
            "gradient: a batch's logits never exist as a whole, on either side. The same loss in far less memory and "
            "more time; 128 is a good number. 0 computes all at once."
        },
    )
    loss_memory: float | None = field(
        default=None,
        metadata={
            "help": "GiB that a loss may take beyond both sides' logits and their gradient, in passes over some rows "
            "at a time: more memory, fewer and larger operations. By default 1 on an accelerator; on a CPU, passes "
            "that suit its caches. (--logits_chunk says how many rows by itself.)"
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
        if self.deepspeed and self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # ZeRO-3 needs a process group as soon as TrainingArguments reads the DeepSpeed configuration.
            import deepspeed

            deepspeed.init_distributed("gloo")
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(("perplexity", "bits_per_byte")):
            self.greater_is_better = False  # transformers knows it of losses only
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
            _check_json(name, getattr(self, name))
        workers, self.dataloader_num_workers = self.dataloader_num_workers, self.dataloader_num_workers or 0
        super().__post_init__()
        if workers is None and self.device.type != "cpu":
            self.dataloader_num_workers = 2
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
        # Its layers work with every method: the models are never given labels, so that its fused loss is not used.
        check(
            not self.use_liger_kernel or self.device.type != "cpu",
            *("use_liger_kernel", True, "leave it out on a CPU, its kernels run on accelerators only"),
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
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        try:
            inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).bind_partial(optimizer, **settings)  # some are ignored
            schedule = get_scheduler(kind, optimizer, self.get_warmup_steps(steps), steps, settings)
            for factor in getattr(schedule, "lr_lambdas", []):
                factor(steps - 1)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f"--lr_scheduler_type {kind.value} with --lr_scheduler_kwargs {json.dumps(settings)}: "
                f"{first_line(error)}."
            ) from None

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
        for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "loss_memory"):
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
