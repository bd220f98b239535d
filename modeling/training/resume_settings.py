"""What a checkpoint can only be resumed with: recorded in it, and compared before a run resumes from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
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
