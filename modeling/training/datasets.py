"""Tokenised training and validation rows, made once and then read from a cache; rows that cannot be used are listed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from modeling.errors import InputError
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.messages import ChatRows
from modeling.text.rows import read_rows
from modeling.text.sources import hub_name, load_hub
from modeling.training.arguments import DataArguments
from modeling.training.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)

PREPARATION_VERSION = "6"  # raise it when prepare_example gives other columns for the same row


def load_data(
    args: DataArguments, training_args: TrainingArguments, encoders: Sequence[Encoder], chat: ChatRows | None = None
) -> tuple[Dataset | None, Dataset | None]:
    """The tokenised `(train, validation)` sets that the run needs, None for one that it does not."""
    rest = args, training_args, encoders, chat
    return (
        load_examples("train_file", args.train_file, args.max_train_samples, *rest) if training_args.do_train else None,
        load_examples("validation_file", args.validation_file, args.max_eval_samples, *rest)
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
    chat: ChatRows | None = None,
) -> Dataset:
    """Tokenised rows with the columns of `prepare_example`, memory-mapped; made once and then read from a cache.

    Rows that cannot be used are left out, and listed once. With `chat` the rows are chats. Raises InputError naming the
    flag or the file where none is left, or the file cannot be read.
    """
    if path is None:
        raise InputError(f"--{flag} is missing: this run needs it.")
    columns = ("prefix" if chat is None else "messages", "text", "fault")
    with training_args.main_process_first(desc=f"preparing {path}"):
        key = _cache_key(path, max_samples, args.block_size, encoders, chat)
        try:
            rows = Dataset.from_generator(
                _first_rows,
                gen_kwargs={"path": path, "chat": chat, "limit": max_samples, "key": key},
                features=Features({"row": Value("int64")} | dict.fromkeys(columns, Value("string"))),
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
    if chat is not None and any(messages.startswith('[{"role": "system"') for messages in rows["messages"]):
        for encoder in encoders:
            if not encoder.chat.has_system_role:
                logger.warning(
                    "%s: the %s's chat template has no system role: system messages are put in front of the first "
                    "user's message.",
                    *(path, encoder.chat.side),
                )
    return usable.remove_columns("fault").with_format("numpy")


def _first_rows(path: str, chat: ChatRows | None, limit: int | None, key: str) -> Iterator[dict]:
    # `key` is there for the cache of `from_generator`, which is named after the arguments.
    rows = read_rows(path, chat, limit)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: it has no rows. Was it written or copied to its end?")
    yield first
    yield from rows


def _features(n_sides: int) -> Features:
    side = {"input_ids": List(Value("int64")), "response_start": Value("int64")}
    side |= {"byte_ends": List(Value("int32")), "byte_start": Value("int32")}
    columns = {"row": Value("int64"), "fault": Value("string"), "cut": Value("bool")}
    for prefix in ("", "teacher_")[:n_sides]:
        columns |= {f"{prefix}{name}": value for name, value in side.items()}
    return Features(columns)


def _cache_key(
    path: str, max_samples: int | None, block_size: int, encoders: Sequence[Encoder], chat: ChatRows | None
) -> str:
    """A digest of everything that the tokenised rows depend on: the file's bytes, tokenizers and chat templates."""
    digest = hashlib.sha256()
    if not Path(path).exists() and (name := hub_name(path)) is not None:
        digest.update(load_hub(*name)._fingerprint.encode())
    if Path(path).is_file():
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    for part in (PREPARATION_VERSION, tokenizers.__version__, max_samples, block_size, chat):
        digest.update(f"{part}\0".encode())
    for encoder in encoders:
        digest.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(f"{encoder.forms.fingerprint}\0{encoder.eos_id}\0".encode())
        if encoder.chat is not None:
            digest.update(encoder.chat.fingerprint.encode())
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
