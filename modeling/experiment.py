"""From arguments to a trained folder: models, tokenizers and datasets, and the course of a run.

Everything here is the same for every method.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from modeling.arguments import DataArguments, DistillationArguments, StudentArguments, TrainingArguments
from modeling.checkpoints import (
    STOPPED,
    StopOnSigterm,
    defect,
    last_complete_checkpoint,
    publish,
    require_settings,
    resume_settings,
    saving,
    set_aside,
    target_names,
)
from modeling.distillation_trainer import ResponseTrainer
from modeling.errors import InputError, first_line, user_input
from modeling.examples import Encoder, prepare_example, read_rows, require_json_file
from modeling.pretrained import adapter_config, load_config, load_encoder, load_model, merged
from modeling.teacher_cache import Settings, SignalCache, weights_digest
from modeling.teachers import LiveTeacher, StoredTeacher, Teacher, examples_of, fill

logger = logging.getLogger(__name__)

PREPARATION_VERSION = "4"  # raise it when a row of a file gives other columns of prepare_example


def start(args: TrainingArguments, data_args: DataArguments) -> None:
    """Logging (one process speaks for all) and the seed. Raises InputError where a data file cannot be any."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if args.should_log else logging.ERROR,
        force=True,
    )
    for chatty in ("httpx", "httpx2", "httpcore", "numexpr", "filelock", "fsspec", "numba"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()
    set_seed(args.seed)
    for needed, flag, path in (
        (args.do_train, "train_file", data_args.train_file),
        (args.do_eval or args.eval_strategy != "no", "validation_file", data_args.validation_file),
    ):
        if needed and path is not None:
            with user_input(f"--{flag}"):
                require_json_file(path)


# -------------------------------------------------------------------------------------------------------- the models


@dataclass
class LanguageModel:
    """A model with what turns text into its tokens. `encoder.forms` holds its real tokens, `n_tokens` of them."""

    model: PreTrainedModel | None  # or a PeftModel or DeepSpeed engine around one; None of a teacher to be read
    encoder: Encoder

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    @property
    def n_tokens(self) -> int:
        return len(self.encoder.forms.forms)


def look_at_models(args: StudentArguments, block_size: int, **paths: str | None) -> list[Encoder]:
    """What can be known of models before the minutes that their weights take: their tokenizers, and their context.

    Args:
        args: for what the models' loading takes from it.
        block_size: tokens that an example may have.
        paths: the models, under the names of the flags that gave them; None is passed over.

    Raises InputError where a tokenizer or configuration cannot be read, or an example may be longer than a model reads.
    """
    encoders = []
    for flag, path in paths.items():
        if path is None:
            continue
        longest = longest_input(load_config(path, flag, args))
        encoders.append(load_encoder(path, flag, args))
        if longest is not None and block_size > longest:
            raise InputError(
                f"--block_size is {block_size}: --{flag} {path} reads {longest} tokens at most "
                f"(max_position_embeddings in its config.json). Give --block_size {longest} or less."
            )
    return encoders


def longest_input(config: PretrainedConfig) -> int | None:
    """How many tokens a model was made for; None where its positions have no end (ALiBi, recurrent models).

    Beyond, learned positions fail, and rotary ones, which have seen no such angles, give poor predictions unsaid.
    """
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if longest is not None and "factor" in rope:  # some families count it in, others do not
        longest = max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest)))
    return longest


def load_student(args: StudentArguments) -> LanguageModel:
    """The student, with what is not to be trained frozen; with --use_lora true a `PeftModel` around it.

    Of an adapter's folder, --use_lora true trains that adapter on; otherwise it is merged into the model below it.
    """
    path, flag = args.model_name_or_path, "model_name_or_path"
    adapter = adapter_config(path, flag)
    if args.use_lora and adapter is not None:
        _require_its_settings(args, adapter)
    encoder = load_encoder(path, flag, args)
    model = load_model(path, flag, args.dtype, args, len(encoder.forms.forms), merge=not args.use_lora)
    if adapter is not None:
        doing = "trained further" if args.use_lora else "merged into it; --use_lora true would train the adapter itself"
        logger.info("--%s %s is an adapter of %s, and is %s.", flag, path, adapter.base_model_name_or_path, doing)
    if args.freeze_emb:
        model.get_input_embeddings().requires_grad_(False)
    if args.freeze_layers:
        layers = transformer_layers(model)
        if args.freeze_layers > len(layers):
            raise InputError(f"--freeze_layers is {args.freeze_layers}: {path} has {len(layers)} layers.")
        for layer in layers[: args.freeze_layers]:
            layer.requires_grad_(False)
    if args.use_lora:
        model = model if adapter is not None else _with_lora(model, args)
        logger.info("LoRA: %d of %d parameters are trained.", *model.get_nb_trainable_parameters())
    return LanguageModel(model, encoder)


def _require_its_settings(args: StudentArguments, adapter: PeftConfig) -> None:
    """Raises InputError where a flag contradicts the adapter that is to be trained on. Defaults do not."""
    path = args.model_name_or_path
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
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        adaptable = " ".join(_adaptable_layers(model))
        remedy = f"Give some of those that can be adapted: --lora_target_modules {adaptable}" if adaptable else ""
        raise InputError(f"--lora_target_modules {' '.join(targets)}: {first_line(error)}. {remedy}") from error


def _adaptable_layers(model: PreTrainedModel) -> list[str]:
    """The names of linear layers that peft adapts. It is asked for each of them, on a copy without weights."""

    def bare() -> PreTrainedModel:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))

    empty = bare()
    head = empty.get_output_embeddings()
    linear = [name for name, m in empty.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    adaptable = []
    for name in sorted({name.rpartition(".")[2] for name in linear}):
        with contextlib.suppress(ValueError):
            get_peft_model(bare(), LoraConfig(task_type="CAUSAL_LM", target_modules=[name]))
            adaptable.append(name)
    return adaptable


def load_teacher(
    args: DistillationArguments,
    student_args: StudentArguments,
    training_args: TrainingArguments,
    path: str | None = None,
    flag: str = "teacher_path",
) -> LanguageModel:
    """A teacher, where --teacher_device or --teacher_zero3 wants it: whole on every rank, or sharded over the ranks.

    With --teacher_cache, only its tokenizer: `teacher_signals` loads the model where it has to run.

    Args:
        path: of the teacher; by default --teacher_path.
        flag: the argument that named it, for messages.
    """
    path = path or args.teacher_path
    teacher = LanguageModel(None, load_encoder(path, flag, student_args))
    if args.teacher_cache is None:
        teacher.model = _load_teacher_model(path, flag, args, student_args, training_args, teacher.n_tokens)
    return teacher


def teacher_signals(
    teacher: LanguageModel,
    args: DistillationArguments,
    student_args: StudentArguments,
    training_args: TrainingArguments,
    datasets: Sequence[Dataset | None],
    path: str | None = None,
    flag: str = "teacher_path",
    side: str = "teacher_",
) -> Teacher:
    """The teacher as a trainer asks it: the model; or with --teacher_cache its stored signals.

    What is not stored yet is computed first, by all ranks, and the model is then let go. Where nothing is missing, it
    is not loaded.

    Args:
        teacher: of `load_teacher`, with the same path and flag.
        datasets: whose examples the trainer will see.
        side: whose tokens the teacher is fed: "teacher_", or "" for the student's.

    Raises InputError where the teacher's logits are no known function of its last hidden states, or where a rank does
    not see what others have stored.
    """
    if args.teacher_cache is None:
        return LiveTeacher(teacher.model, teacher.n_tokens, side)
    path = path or args.teacher_path
    directory, name = Path(args.teacher_cache), Path(path).resolve().name if Path(path).is_dir() else path
    dtype = _checkpoint_dtype(path, flag, student_args) if args.teacher_dtype == "auto" else args.teacher_dtype
    with training_args.main_process_first(desc=f"reading {path}"):
        with user_input(f"--teacher_cache {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        weights = weights_digest(path, directory / "digests.json")
    settings = Settings(
        weights=weights,
        dtype=dtype,
        stored_dtype=dtype if args.teacher_cache_dtype == "auto" else args.teacher_cache_dtype,
        topk=args.teacher_cache_topk,
        attn_implementation=student_args.attn_implementation,
        n_tokens=teacher.n_tokens,
    )
    cache = SignalCache(directory, name.replace("/", "--"), settings)
    examples = examples_of(datasets, side)
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
                cache.describe(path)
            model = _load_teacher_model(path, flag, args, student_args, training_args, teacher.n_tokens)
            fill(
                *(cache, LiveTeacher(model, teacher.n_tokens, side), missing, teacher.encoder.pad_id),
                *(training_args.eval_batch_size, training_args.device, rank, ranks),
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
            f"--teacher_cache {directory}: rank {rank} does not see the signals of {lost} examples that other ranks "
            "have stored. Give a folder that all ranks see."
        )
    return StoredTeacher(cache, side)


def _load_teacher_model(
    path: str,
    flag: str,
    args: DistillationArguments,
    student_args: StudentArguments,
    training_args: TrainingArguments,
    n_tokens: int,
) -> PreTrainedModel:
    if args.teacher_zero3:
        return _load_sharded(path, flag, args.teacher_dtype, student_args, training_args, n_tokens)
    device = args.teacher_device or training_args.device
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"--teacher_device {device}: {error}") from error
    with _deepspeed_config(None, training_args):
        return load_model(path, flag, args.teacher_dtype, student_args, n_tokens, merge=False, device_map=device)


def _load_sharded(
    path: str, flag: str, dtype: str, args: StudentArguments, training_args: TrainingArguments, n_tokens: int
):
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
        model = load_model(path, flag, dtype, args, n_tokens, merge=False)
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config)
    except ValueError as error:  # a dtype that DeepSpeed does not run on this device
        raise InputError(f"--teacher_zero3 true with the teacher in {dtype}: {error}") from error
    weights = list(engine.module.parameters())
    logger.info(
        "--%s %s is sharded: this rank holds %d of its %d weights.",
        *(flag, path, sum(w.ds_tensor.numel() + w.numel() for w in weights), sum(w.ds_numel for w in weights)),
    )
    return engine


def _checkpoint_dtype(path: str, flag: str, args: StudentArguments) -> str:
    """ZeRO-3 makes room for the weights before it sees them."""
    dtype = load_config(path, flag, args).dtype
    if dtype is None:
        raise InputError(f"--{flag} {path}: its config.json names no dtype. Give --teacher_dtype.")
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


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: its first list of as many modules as its configuration has hidden layers."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise InputError(f"--freeze_layers: {type(model).__name__} shows no list of its {n_layers} transformer layers.")


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

    Rows that cannot be used are left out, and listed once. Raises InputError naming the flag or the file where none is
    left, or the file cannot be read.
    """
    if path is None:
        raise InputError(f"--{flag} is missing: this run needs it.")
    with training_args.main_process_first(desc=f"preparing {path}"):
        key = _cache_key(path, max_samples, args.block_size, encoders)
        try:
            rows = Dataset.from_generator(
                _first_rows,
                gen_kwargs={"path": path, "limit": max_samples, "key": key},
                features=Features({"row": Value("int64")} | {c: Value("string") for c in ("prefix", "text", "fault")}),
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
            lambda fault: not fault, input_columns="fault", new_fingerprint=f"{key}-usable", desc="Checking"
        )
    _report(path, args.block_size, examples, usable)
    return usable.remove_columns("fault").with_format("numpy")


def _first_rows(path: str, limit: int | None, key: str) -> Iterator[dict]:
    # `key` is there for the cache of `from_generator`, which is named after the arguments.
    rows = islice(read_rows(path), limit)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: it has no rows. Was it written or copied to its end?")
    yield first
    yield from rows


def _features(n_sides: int) -> Features:
    side = {"input_ids": List(Value("int64")), "response_start": Value("int64"), "ends": List(Value("int32"))}
    columns = {"row": Value("int64"), "fault": Value("string"), "cut": Value("bool")}
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
    n, n_usable = len(examples), len(usable)
    faults = ""
    if n_usable < n:
        left_out = examples.filter(bool, input_columns="fault", desc="Listing")
        faults = list_faults(zip(left_out["row"], left_out["fault"]))
    if not n_usable:
        raise InputError(f"{path}: none of its {n} rows can be used. Repair them, or give another file.{faults}")
    logger.info("%s: %d examples, %d of them cut to %d tokens.", path, n_usable, sum(usable["cut"]), block_size)
    if faults:
        logger.warning("%s: %d of its %d rows cannot be used, and are left out.%s", path, n - n_usable, n, faults)


def list_faults(rows: Iterable[tuple[int, str]], kinds: int = 10, numbers: int = 10) -> str:
    """`(row, fault)` as lines of text: how many rows have each fault, the commonest first, and which the first are."""
    found: dict[str, list[int]] = {}
    for row, fault in rows:
        found.setdefault(fault, []).append(row)
    by_count = sorted(found.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{len(which)} row{'s' * (len(which) > 1)}: {fault} (row{'s' * (len(which) > 1)} "
        f"{', '.join(map(str, which[:numbers]))}{', …' * (len(which) > numbers)})"
        for fault, which in by_count[:kinds]
    ]
    if by_count[kinds:]:
        lines.append(f"{sum(len(which) for _, which in by_count[kinds:])} rows: other reasons")
    return "".join(f"\n  {line}" for line in lines)


# ---------------------------------------------------------------------------------------------------------- the run


def run(trainer: ResponseTrainer) -> None:
    """Trains, saves, evaluates, as the arguments say.

    An output folder that already holds a whole checkpoint is gone on from; --resume_from_checkpoint false starts over.
    A LoRA student is saved as its adapter (with the path of the base model), or, with --merge_lora true, merged.
    Evaluation comes last, when all is saved: it may cast the model (--bf16_full_eval). It is of the model as saved.
    After SIGTERM the training saves a checkpoint and exits with status 143: no model is written, nothing evaluated.
    """
    args = trainer.args
    if args.do_train:
        result = _train(trainer)
        trainer.model.config.use_cache = True  # off in training; whoever generates with the saved model wants it
        # Under a name of its own until it is whole: a run may end while it saves.
        target, part = Path(args.output_dir, "adapter" if args.merge_lora else ""), Path(args.output_dir, ".saving")
        with saving(target):
            trainer.save_model(str(part))
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                publish(part, target)
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
            trainer.save_state()
        if args.merge_lora:
            model = merged(trainer.model)  # on every rank: what is evaluated is what is saved
            if args.should_save:
                with saving(args.output_dir):
                    model.save_pretrained(part)
                    trainer.processing_class.save_pretrained(part)
                    publish(part, Path(args.output_dir))
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _train(trainer: ResponseTrainer) -> TrainOutput:
    """The training, from a checkpoint where there is one. Exits the process where SIGTERM ended it."""
    checkpoint = _checkpoint(trainer.args)
    if checkpoint is not None:
        require_settings(Path(checkpoint), resume_settings(trainer.model, trainer.args))
    stop = StopOnSigterm()
    trainer.add_callback(stop)
    with stop.listening():
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopping:
            # A launcher ends all ranks as soon as one has ended.
            trainer.accelerator.wait_for_everyone()
            logger.warning(
                "SIGTERM: stopped after step %d of %d, which is saved. The same command, started again, goes on from "
                "there.",
                *(trainer.state.global_step, trainer.state.max_steps),
            )
            sys.exit(STOPPED)
    if checkpoint is not None and f"{PREFIX_CHECKPOINT_DIR}-{result.global_step}" == Path(checkpoint).name:
        logger.info("All %d steps had been trained before.", result.global_step)
        del result.metrics["train_loss"]  # the mean over no step
    return result


def _checkpoint(args: TrainingArguments) -> str | None:
    wish = args.resume_from_checkpoint
    if wish is not None and wish.lower() in ("false", "no"):
        if args.should_save and (place := set_aside(args.output_dir)) is not None:
            logger.warning("Starting over: the checkpoints of an earlier run in %s are now in %s.", place.parent, place)
        return None
    if wish is not None and wish.lower() not in ("true", "yes"):
        if (what := defect(Path(wish))) is not None:
            raise InputError(f"--resume_from_checkpoint {wish}: {what} Give another checkpoint, or leave the flag out.")
        return wish
    last = last_complete_checkpoint(args.output_dir)
    if wish is not None and last is None:
        raise InputError(f"--resume_from_checkpoint {wish}: {args.output_dir} holds no complete checkpoint.")
    if last is not None:
        logger.info("Going on from %s. To start over, give --resume_from_checkpoint false.", last)
    return last
