"""A teacher as a trainer asks it: loaded where the arguments want it, or its signals, computed once and stored."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from modeling.errors import InputError, user_input
from modeling.models.language_model import LanguageModel
from modeling.models.teacher_cache import Settings, SignalCache, weights_digest
from modeling.models.teachers import LiveTeacher, StoredTeacher, Teacher, examples_of, fill
from modeling.training.arguments import DistillationArguments
from modeling.training.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)


def load_teacher(
    teacher: LanguageModel,
    args: DistillationArguments,
    training_args: TrainingArguments,
    datasets: Sequence[Dataset | None],
    prefix: str = "teacher_",
) -> Teacher:
    """A teacher, where --teacher_device or --teacher_zero3 wants it; with --teacher_cache, its stored signals.

    Args:
        datasets: whose examples the trainer will see. What is not stored yet is computed first, by all ranks, and the
            model is then let go; where nothing is missing, it is not loaded.
        prefix: of the columns of the side whose tokens the teacher is fed: "teacher_", or "" for the student's.

    Raises InputError where the teacher's logits are no known function of its last hidden states, or where a rank does
    not see what others have stored.
    """
    if args.teacher_cache is None:
        return LiveTeacher(_load_model(teacher, args, training_args), teacher.vocab_size)
    cache = _cache(teacher, args, training_args)
    examples = examples_of(datasets, prefix)
    rank, ranks = training_args.process_index, training_args.world_size
    wait = PartialState().wait_for_everyone
    with cache.locked(rank):
        wait()
        cache.verify(rank, ranks)
        wait()
        cache.open()
        missing = {key: example for key, example in examples.items() if key not in cache.index}
        wait()
        logger.info(
            "--teacher_cache: %s holds %d of the %d examples; %d are computed.",
            *(cache.folder, len(examples) - len(missing), len(examples), len(missing)),
        )
        if missing or not cache.has_head:
            if rank == 0:
                cache.describe(teacher.path)
            model = _load_model(teacher, args, training_args)
            fill(
                *(cache, LiveTeacher(model, teacher.vocab_size), missing, teacher.encoder.pad_id),
                *(training_args.eval_batch_size, training_args.device, prefix, rank, ranks),
                progress=training_args.should_log and not training_args.disable_tqdm,
            )
            if args.teacher_zero3:
                model.destroy()
            del model
            clear_device_cache(garbage_collection=True)
            wait()
            cache.open()
    lost = sum(key not in cache.index for key in examples)
    if lost:
        raise InputError(
            f"--teacher_cache {args.teacher_cache}: rank {rank} does not see the signals of {lost} examples that other "
            "ranks have stored. Give a folder that all ranks see."
        )
    return StoredTeacher(cache)


def _cache(teacher: LanguageModel, args: DistillationArguments, training_args: TrainingArguments) -> SignalCache:
    directory = Path(args.teacher_cache)
    name = Path(teacher.path).resolve().name if Path(teacher.path).is_dir() else teacher.path
    with training_args.main_process_first(desc=f"reading {teacher.path}"):
        with user_input(f"--teacher_cache {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        weights = weights_digest(teacher.path, directory / "digests.json")
    dtype = _checkpoint_dtype(teacher) if args.teacher_dtype == "auto" else args.teacher_dtype
    settings = Settings(
        weights=weights,
        dtype=dtype,
        stored_dtype=dtype if args.teacher_cache_dtype == "auto" else args.teacher_cache_dtype,
        topk=args.teacher_cache_topk,
        attn_implementation=teacher.attn_implementation,
        n_tokens=teacher.vocab_size,
    )
    return SignalCache(directory, name.replace("/", "--"), settings)


def _load_model(
    teacher: LanguageModel, args: DistillationArguments, training_args: TrainingArguments
) -> PreTrainedModel:
    if args.teacher_zero3:
        return _load_sharded(teacher, args.teacher_dtype, training_args)
    device = args.teacher_device or training_args.device
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"--teacher_device {device}: {error}") from error
    with _deepspeed_config(None, training_args):
        return teacher.load(args.teacher_dtype, merge=False, device_map=device)


def _load_sharded(teacher: LanguageModel, dtype: str, training_args: TrainingArguments):
    """A model in a ZeRO-3 engine of its own: each rank holds a part of every weight, and gathers a layer to run it.

    Every rank must run it equally often.
    """
    import deepspeed

    dtype = _checkpoint_dtype(teacher) if dtype == "auto" else dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,  # must be given; nothing is trained
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    with _deepspeed_config(config, training_args):
        model = teacher.load(dtype, merge=False)
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config)
    except ValueError as error:  # a dtype that DeepSpeed does not run on this device
        raise InputError(f"--teacher_zero3 true with the teacher in {dtype}: {error}") from error
    weights = list(engine.module.parameters())
    logger.info(
        "%s is sharded: this rank holds %d of its %d weights.",
        *(teacher, sum(w.ds_tensor.numel() + w.numel() for w in weights), sum(w.ds_numel for w in weights)),
    )
    return engine


def _checkpoint_dtype(teacher: LanguageModel) -> str:
    """ZeRO-3 makes room for the weights before it sees them."""
    dtype = teacher.config.dtype
    if dtype is None:
        raise InputError(f"{teacher}: its config.json names no dtype. Give --teacher_dtype.")
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _deepspeed_config(config: dict | None, args: TrainingArguments) -> Iterator[None]:
    """What `from_pretrained` loads here is sharded as this configuration says (None: not at all), not as the student's.

    The student's own is in force again afterwards.
    """
    students = getattr(args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    # transformers refers to it weakly, so that it lasts no longer than this variable.
    loading = HfDeepSpeedConfig(config) if config is not None else None
    try:
        yield
    finally:
        del loading
        unset_hf_deepspeed_config()
        if students is not None:
            set_hf_deepspeed_config(students)
