"""The student as it will be trained: some of it frozen, or low-rank adapters beside its weights."""

from __future__ import annotations

import logging

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling.errors import InputError, first_line, user_input
from modeling.models.language_model import LanguageModel
from modeling.training.arguments import StudentArguments
from modeling.training.resume_settings import target_names

logger = logging.getLogger(__name__)


def load_student(student: LanguageModel, args: StudentArguments) -> PreTrainedModel | PeftModel:
    """The student, with what is not to be trained frozen; with --use_lora true a `PeftModel` around it.

    Of an adapter's folder, --use_lora true trains that adapter on; otherwise it is merged into the model below it.
    """
    if args.use_lora and student.adapter is not None:
        _require_its_settings(student, args)
    model = student.load(args.dtype, merge=not args.use_lora)
    if student.adapter is not None:
        doing = "trained further" if args.use_lora else "merged into it; --use_lora true would train the adapter itself"
        logger.info("%s is an adapter of %s, and is %s.", student, student.below.path, doing)
    if args.freeze_emb:
        model.get_input_embeddings().requires_grad_(False)
    if args.freeze_layers:
        with user_input(f"--freeze_layers {args.freeze_layers}"):
            layers = transformer_layers(model)
        if args.freeze_layers > len(layers):
            raise InputError(f"--freeze_layers is {args.freeze_layers}: {student.path} has {len(layers)} layers.")
        for layer in layers[: args.freeze_layers]:
            layer.requires_grad_(False)
    if args.use_lora:
        model = model if student.adapter is not None else _with_lora(model, args)
        logger.info("LoRA: %d of %d parameters are trained.", *model.get_nb_trainable_parameters())
    return model


def _require_its_settings(student: LanguageModel, args: StudentArguments) -> None:
    """Raises InputError where a flag contradicts the adapter that is to be trained on. Defaults do not."""
    path, adapter = student.path, student.adapter
    if not isinstance(adapter, LoraConfig):
        raise InputError(f"--use_lora true: {path} is an adapter of another kind ({adapter.peft_type.value}).")
    has = {
        "lora_rank": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "lora_target_modules": target_names(adapter.target_modules),
    }
    defaults = StudentArguments(path)
    for name, own in has.items():
        given = getattr(args, name)
        if given != getattr(defaults, name) and (sorted(given) if isinstance(given, list) else given) != own:
            given, own = (" ".join(value) if isinstance(value, list) else value for value in (given, own))
            raise InputError(
                f"--{name} is {given}: the adapter {path} is trained further, and has {own}. Leave the flag out."
            )


def _with_lora(model: PreTrainedModel, args: StudentArguments) -> PeftModel:
    """The model frozen, with low-rank adapters to be trained (LoRA, arXiv 2106.09685)."""
    targets = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    head = model.get_output_embeddings()  # here, since peft changes the model before it refuses it
    linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"--lora_target_modules {' '.join(targets)}: {first_line(error)}. Give some of the model's linear layers: "
            f"{' '.join(sorted({name.rpartition('.')[2] for name in linear}))}."
        ) from error


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: its first list of as many modules as its configuration has hidden layers."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise InputError(f"{type(model).__name__} shows no list of its {n_layers} transformer layers. Leave the flag out.")
