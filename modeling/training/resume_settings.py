"""What a checkpoint can only be resumed with, and what else its run was asked for: recorded in it, and compared."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from modeling.errors import InputError, user_input
from modeling.models.output_head import unwrapped

SETTINGS = "resume_settings.json"  # of a checkpoint, written first


def resume_settings(model: nn.Module, args: TrainingArguments) -> dict[str, str]:
    """What weights and optimizer of a checkpoint depend on, under the flags that decide it; all else may change.

    Args:
        model: the student as the Trainer got it, a `PeftModel` with --use_lora true.
    """
    adapter = next(iter(model.peft_config.values())) if isinstance(model, PeftModel) else None
    own = {  # the names that they have without adapters
        re.sub(r"\.(base_layer|original_module)\b", "", name): parameter
        for name, parameter in unwrapped(model).named_parameters()
        if not re.search(r"\.(lora_\w+|modules_to_save)\.", name)
    }
    settings = {
        "model_name_or_path": f"{type(unwrapped(model)).__name__} of {_described(own.items())}",
        "use_lora": str(adapter is not None).lower(),
        "optim": str(getattr(args.optim, "value", args.optim)).removesuffix("_fused"),  # the same states
        "deepspeed": "none",
    }
    if args.deepspeed:
        stage, ranks = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0), args.world_size
        settings["deepspeed"] = f"ZeRO-{stage} on {ranks} rank{'s' * (ranks > 1)}"
    if adapter is not None:
        settings |= {
            "lora_rank": str(adapter.r),
            "lora_alpha": str(adapter.lora_alpha),
            "lora_target_modules": " ".join(target_names(adapter.target_modules)),
        }
    # Last: it follows from some of the others.
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    settings["freeze_emb or --freeze_layers"] = f"training {_described(trained)}"
    return settings


# Where and how fast a run computes, and what it is evaluated on: none of it is in a checkpoint.
NOT_NOTED = (
    *("preprocessing_num_workers", "teacher_device", "teacher_zero3", "teacher_cache", "mapper_dir"),
    *("validation_file", "max_eval_samples"),
)


def noted_settings(*groups: object) -> dict[str, str]:
    """The script and its arguments that may change before a run resumes, and make it another experiment.

    Args:
        groups: dataclasses of arguments, or None. Of `TrainingArguments` a few count.
    """
    noted = {"the script": Path(sys.argv[0]).name}
    for group in filter(None, groups):
        names = ("learning_rate", "weight_decay", "seed") if isinstance(group, TrainingArguments) else vars(group)
        for name in names:
            value = getattr(group, name)
            if name not in NOT_NOTED:
                is_path = isinstance(value, str) and Path(value).exists()
                noted[f"--{name}"] = str(Path(value).resolve() if is_path else value)
    return noted


def changed_settings(checkpoint: Path, noted: dict[str, str]) -> list[str]:
    """How `noted_settings` differ from those that a checkpoint holds, each in words."""
    record = checkpoint / SETTINGS
    saved = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return [
        f"{name} was {saved[name]}, and is {value}" for name, value in noted.items() if saved.get(name, value) != value
    ]


def target_names(targets: str | Iterable[str] | None) -> list[str]:
    """The modules of an adapter, without the layers that they are in (a pattern as it is)."""
    return [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets or []})


def _described(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}  # whole, under ZeRO-3 too
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    return f"{sum(map(math.prod, shapes.values())):,} weights ({digest[:8]})"


def write_settings(checkpoint: Path, settings: dict[str, str]) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def require_settings(checkpoint: Path, settings: dict[str, str]) -> None:
    """Raises InputError, naming the flag, where the checkpoint was saved with other settings. An old one has none."""
    record = checkpoint / SETTINGS
    if not record.exists():
        return
    with user_input(str(record)):
        saved = json.loads(record.read_text(encoding="utf-8"))
    different = [name for name, value in settings.items() if saved.get(name, value) != value]
    if different:
        name = different[0]
        raise InputError(
            f"{checkpoint} cannot be resumed: --{name} was {saved[name]} when it was saved, and is {settings[name]}. "
            "Give the earlier setting; or --resume_from_checkpoint false, which starts over and sets the earlier "
            "checkpoints aside."
        )
