"""From arguments to a trained folder: models, tokenizers and datasets, and the course of a run.

Everything here is the same for every method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling.arguments import DataArguments, DistillationArguments, StudentArguments, TrainingArguments
from modeling.distillation_trainer import ResponseTrainer
from modeling.examples import Encoder, prepare_example, read_rows

logger = logging.getLogger(__name__)

PREPARATION_VERSION = "1"  # raise it when prepare_example gives other columns for the same row


def start(args: TrainingArguments) -> None:
    """Logging (one process speaks for all) and the seed. Raises ValueError where there is nothing to do."""
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: give --do_train true, --do_eval true, or both.")
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if args.should_log else logging.WARNING,
        force=True,
    )
    for chatty in ("httpx", "httpcore", "numexpr", "filelock", "fsspec", "numba"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()
    set_seed(args.seed)


# -------------------------------------------------------------------------------------------------------- the models


@dataclass
class LanguageModel:
    """A model with what turns text into its tokens. `encoder.forms` holds its real tokens, `n_tokens` of them."""

    model: PreTrainedModel  # or a PeftModel or DeepSpeed engine around one
    encoder: Encoder

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    @property
    def n_tokens(self) -> int:
        return len(self.encoder.forms.forms)


def load_student(args: StudentArguments) -> LanguageModel:
    """The student, with what is not to be trained frozen; with --use_lora true a `PeftModel` around it."""
    student = _load(args.model_name_or_path, "model_name_or_path", args.dtype, args)
    if args.freeze_emb:
        student.model.get_input_embeddings().requires_grad_(False)
    if args.freeze_layers:
        for layer in transformer_layers(student.model)[: args.freeze_layers]:
            layer.requires_grad_(False)
    if args.use_lora:
        student.model = _with_lora(student.model, args)
    return student


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
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora_target_modules {' '.join(targets)}: {error}") from error
    logger.info("LoRA: %d of %d parameters are trained.", *model.get_nb_trainable_parameters())
    return model


def load_teacher(
    args: DistillationArguments,
    student_args: StudentArguments,
    training_args: TrainingArguments,
    path: str | None = None,
    flag: str = "teacher_path",
) -> LanguageModel:
    """A teacher, where --teacher_device or --teacher_zero3 wants it: whole on every rank, or sharded over the ranks.

    Args:
        path: of the teacher; by default --teacher_path.
        flag: the argument that named it, for messages.
    """
    path = path or args.teacher_path
    if args.teacher_zero3:
        return _load_sharded(path, flag, args.teacher_dtype, student_args, training_args)
    device = args.teacher_device or training_args.device
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"--teacher_device {device}: {error}") from error
    with _deepspeed_config(None, training_args):
        return _load(path, flag, args.teacher_dtype, student_args, device_map=device)


def _load_sharded(
    path: str, flag: str, dtype: str, args: StudentArguments, training_args: TrainingArguments
) -> LanguageModel:
    """A model in a ZeRO-3 engine of its own: each rank holds a part of every weight, and gathers a layer to run it.

    Every rank must run it equally often.
    """
    import deepspeed

    dtype = _checkpoint_dtype(path, flag, args) if dtype == "auto" else dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,  # must be given; nothing is trained
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    with _deepspeed_config(config, training_args):
        loaded = _load(path, flag, dtype, args)
    try:
        engine, *_ = deepspeed.initialize(model=loaded.model, config=config)
    except ValueError as error:  # a dtype that DeepSpeed does not run on this device
        raise ValueError(f"--teacher_zero3 true with the teacher in {dtype}: {error}") from error
    weights = list(engine.module.parameters())
    logger.info(
        "--%s %s is sharded: this rank holds %d of its %d weights.",
        *(flag, path, sum(w.ds_tensor.numel() + w.numel() for w in weights), sum(w.ds_numel for w in weights)),
    )
    return LanguageModel(engine, loaded.encoder)


def _checkpoint_dtype(path: str, flag: str, args: StudentArguments) -> str:
    """ZeRO-3 makes room for the weights before it sees them."""
    try:
        dtype = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).dtype
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {path}: {error}") from error
    if dtype is None:
        raise ValueError(f"--{flag} {path}: its config.json names no dtype. Give --teacher_dtype.")
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


def _load(path: str, flag: str, dtype: str, args: StudentArguments, **options) -> LanguageModel:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        encoder = Encoder(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=args.trust_remote_code,
            **({"attn_implementation": args.attn_implementation} if args.attn_implementation else {}),
            **options,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {path}: {error}") from error
    n_tokens, n_embeddings = len(encoder.forms.forms), model.get_input_embeddings().num_embeddings
    if n_tokens > n_embeddings:
        logger.warning(
            "--%s %s: the tokenizer has %d tokens and the model %d embeddings; the model is resized to the tokenizer.",
            *(flag, path, n_tokens, n_embeddings),
        )
        model.resize_token_embeddings(n_tokens)
    return LanguageModel(model, encoder)


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: its first list of as many modules as its configuration has hidden layers."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ValueError(f"--freeze_layers: {type(model).__name__} shows no list of its {n_layers} transformer layers.")


# --------------------------------------------------------------------------------------------------------- the data


def load_data(
    args: DataArguments, training_args: TrainingArguments, encoders: Sequence[Encoder]
) -> tuple[Dataset | None, Dataset | None]:
    """The tokenised `(train, validation)` sets that the run needs, None for one that it does not."""
    return (
        load_examples("train_file", args.train_file, args.max_train_samples, args, training_args, encoders)
        if training_args.do_train
        else None,
        load_examples("validation_file", args.validation_file, args.max_eval_samples, args, training_args, encoders)
        if training_args.do_eval or training_args.eval_strategy != "no"
        else None,
    )


def load_examples(
    flag: str,
    path: str | None,
    max_samples: int | None,
    args: DataArguments,
    training_args: TrainingArguments,
    encoders: Sequence[Encoder],
) -> Dataset:
    """Tokenised rows with the columns of `prepare_example`, memory-mapped; made once and then read from a cache.

    Raises ValueError or FileNotFoundError naming the flag, the file, and the row.
    """
    if path is None:
        raise ValueError(f"--{flag} is missing: this run needs it.")
    with training_args.main_process_first(desc=f"preparing {path}"):
        key = _cache_key(path, max_samples, args.block_size, encoders)
        try:
            rows = Dataset.from_generator(
                _first_rows,
                gen_kwargs={"path": path, "limit": max_samples, "key": key},
                features=Features({"row": Value("int64"), "prefix": Value("string"), "text": Value("string")}),
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        examples = rows.map(
            prepare_example,
            fn_kwargs={"encoders": encoders, "block_size": args.block_size},
            num_proc=args.preprocessing_num_workers,
            remove_columns=rows.column_names,
            features=_features(len(encoders)),
            new_fingerprint=key,
            desc=f"Tokenising {Path(path).name}",
        )
        usable = examples.filter(
            lambda ends: len(ends) > 0, input_columns="ends", new_fingerprint=f"{key}-usable", desc="Checking"
        )
    _report(path, args.block_size, examples, usable)
    return usable.with_format("numpy")


def _first_rows(path: str, limit: int | None, key: str) -> Iterator[dict]:
    # `key` is there for the cache of `from_generator`, which is named after the arguments.
    return islice(read_rows(path), limit)


def _features(n_sides: int) -> Features:
    side = {"input_ids": List(Value("int64")), "response_start": Value("int64"), "ends": List(Value("int32"))}
    columns = {"row": Value("int64"), "cut": Value("bool")}
    for prefix in ("", "teacher_")[:n_sides]:
        columns |= {f"{prefix}{name}": value for name, value in side.items()}
    return Features(columns)


def _cache_key(path: str, max_samples: int | None, block_size: int, encoders: Sequence[Encoder]) -> str:
    """A digest of everything that the tokenised rows depend on: the file's bytes and both tokenizers included."""
    digest = hashlib.sha256()
    if Path(path).is_file():
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    for part in (PREPARATION_VERSION, tokenizers.__version__, max_samples, block_size):
        digest.update(f"{part}\0".encode())
    for encoder in encoders:
        digest.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(f"{encoder.forms.fingerprint}\0{encoder.eos_id}\0".encode())
    return digest.hexdigest()[:40]


def _report(path: str, block_size: int, examples: Dataset, usable: Dataset) -> None:
    left_out = sorted(set(examples["row"]) - set(usable["row"]))
    if not len(usable):
        raise ValueError(
            f"{path}: none of its {len(examples)} rows can be used. A row needs a text that is not empty, and a "
            f"prefix that leaves room for it in --block_size {block_size} tokens."
        )
    logger.info("%s: %d examples, %d of them cut to %d tokens.", path, len(usable), sum(usable["cut"]), block_size)
    if left_out:
        logger.warning(
            "%s: %d rows left out, with an empty text or a prefix that fills --block_size %d: rows %s%s.",
            *(path, len(left_out), block_size, ", ".join(map(str, left_out[:20]))),
            ", …" if len(left_out) > 20 else "",
        )


# ---------------------------------------------------------------------------------------------------------- the run


def run(trainer: ResponseTrainer) -> None:
    """Trains, saves, evaluates, as the arguments say.

    An output folder that already holds a whole checkpoint is gone on from; --resume_from_checkpoint false starts over.
    A LoRA student is saved as its adapter (with the path of the base model), or, with --merge_lora true, merged.
    """
    args = trainer.args
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=_checkpoint(args))
        trainer.model.config.use_cache = True  # off in training; whoever generates with the saved model wants it
        trainer.save_model(str(Path(args.output_dir, "adapter")) if args.merge_lora else None)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_train and args.merge_lora and args.should_save:
        # Last: it takes the trained model apart.
        trainer.model.merge_and_unload().save_pretrained(args.output_dir)
        trainer.processing_class.save_pretrained(args.output_dir)


def _checkpoint(args: TrainingArguments) -> str | None:
    wish = args.resume_from_checkpoint
    if wish is not None and wish.lower() in ("false", "no"):
        return None
    if wish is not None and wish.lower() not in ("true", "yes"):
        return wish
    last = last_complete_checkpoint(args.output_dir)
    if wish is not None and last is None:
        raise ValueError(f"--resume_from_checkpoint {wish}: {args.output_dir} holds no complete checkpoint.")
    if last is not None:
        logger.info("Going on from %s. To start over, give --resume_from_checkpoint false.", last)
    return last


def last_complete_checkpoint(folder: str) -> str | None:
    """The checkpoint of the latest step that was saved to its end. A run may be stopped while it saves one."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = [int(match[1]) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name))]
    for step in sorted(steps, reverse=True):
        checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # the file that is written last
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning("%s is incomplete, and passed over.", checkpoint)
    return None
