"""Where the teacher's signal comes from: a model that runs in every step, or what it said once, read from disk.

A trainer asks either for the rows that predict the response tokens of one side of a batch, and does not know which it
is:

    teacher.logits(side) -> [R, V]                   logits, over the columns that the tokenizer really has
    teacher.signal(side) -> ([R, D], head)           the same for a loss that goes through it in parts:
                                                     head(rows[i:j]) are the logits of these rows
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling.errors import InputError
from modeling.models.output_head import Head, OutputHead, input_device, last_hidden_states, logits_at, response_rows
from modeling.models.teacher_cache import PartWriter, SignalCache, kept
from modeling.text.batch import Side, example_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen model that runs in every step.

    Args:
        model: on any device, spread over several, or sharded over the ranks; frozen here, in eval mode.
        vocab_size: how many columns of its logits are real, V.
    """

    model: PreTrainedModel
    vocab_size: int

    def __post_init__(self):
        freeze(self.model)

    @torch.no_grad()
    def logits(self, side: Side) -> Tensor:
        """[R, V] in the model's dtype, on the device of the batch."""
        rows = side.predictor_rows
        return logits_at(self.model, rows, self.vocab_size, **self._fed(side)).to(rows.device)

    @torch.no_grad()
    def signal(self, side: Side) -> tuple[Tensor, Head]:
        """Last hidden states [R, H] and the model's head, on the device of the batch. Raises as `OutputHead.of`."""
        head, rows = self.head, side.predictor_rows  # the head before the batch: it runs the model once
        hidden = last_hidden_states(self.model, **self._fed(side))
        return response_rows(hidden, rows.to(hidden.device)).to(rows.device), head.to(rows.device)

    @cached_property
    def head(self) -> OutputHead:
        """The model's head over the real columns. Raises as `OutputHead.of`."""
        return OutputHead.of(self.model).first(self.vocab_size)

    def _fed(self, side: Side) -> dict[str, Tensor]:
        device = input_device(self.model, side.input_ids.device)
        return {"input_ids": side.input_ids.to(device), "attention_mask": side.attention_mask.to(device)}


@dataclass(frozen=True)
class StoredTeacher:
    """Signals that were computed once, read for each batch. No model is there.

    Args:
        cache: with the signals of every example that the trainer will see.
    """

    cache: SignalCache

    def logits(self, side: Side) -> Tensor:
        """[R, V] in the teacher's dtype (float32 where only the top logits are stored), on the device of the batch."""
        rows, head = self.signal(side)
        return head(rows)

    def signal(self, side: Side) -> tuple[Tensor, Head]:
        """[R, D] and what makes logits of them. Raises ValueError for an example that is not stored."""
        return self.cache.rows(side.keys, side.predictor_rows.device)


Teacher = LiveTeacher | StoredTeacher


def as_teacher(teacher: Teacher | PreTrainedModel, vocab_size: int) -> Teacher:
    """A model becomes a `LiveTeacher`."""
    return teacher if isinstance(teacher, Teacher) else LiveTeacher(teacher, vocab_size)


@dataclass(frozen=True)
class Example:
    """A row of a tokenised dataset, for a teacher to run."""

    dataset: Dataset
    place: int
    n_ids: int


def examples_of(datasets: Iterable[Dataset | None], prefix: str = "teacher_") -> dict[bytes, Example]:
    """The examples of all datasets under the keys that they are stored by: equal ones once.

    Args:
        prefix: of the columns of the side whose tokens the teacher is fed: "teacher_", or "" for the student's.
    """
    found = {}
    for dataset in datasets:
        place = 0
        for batch in [] if dataset is None else dataset.iter(batch_size=1000):
            for ids, start in zip(batch[f"{prefix}input_ids"], batch[f"{prefix}response_start"]):
                found.setdefault(example_key(ids, start), Example(dataset, place, len(ids)))
                place += 1
    return found


def fill(
    cache: SignalCache,
    teacher: LiveTeacher,
    examples: dict[bytes, Example],
    pad_id: int,
    batch_size: int,
    device: torch.device,
    prefix: str = "teacher_",
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> None:
    """Computes and writes this rank's share of the signals of some examples, and the head where it is not there.

    Every rank must call, and runs the teacher equally often.

    Args:
        examples: as `examples_of` gives them, the same on all ranks.
        device: where batches are put; the teacher may be on another.
        prefix: as for `examples_of`.
    """
    head = teacher.head
    if rank == 0 and not cache.has_head:
        cache.write_head(head)
    # The longest first: if memory does not suffice, it shows at once.
    order = sorted(examples, key=lambda key: (-examples[key].n_ids, key))
    share = order[rank::ranks]
    writer, start, n_tokens = PartWriter(cache), time.perf_counter(), 0
    with tqdm(total=sum(examples[key].n_ids for key in share), unit=" tokens", disable=not progress) as bar:
        for first in range(0, math.ceil(len(order) / ranks), batch_size):
            keys = share[first : first + batch_size]
            rows = [examples[key].dataset[examples[key].place] for key in keys or order[:1]]
            side = Side.of(rows, prefix, pad_id)
            hidden, head = teacher.signal(side.map(lambda tensor: tensor.to(device)))
            _require_finite(hidden, side.example, rows)
            signals = kept(hidden, head, cache.settings)
            for key, *parts in zip(keys, *(tensor.split(side.lengths) for tensor in signals.values())):
                writer.add(key, dict(zip(signals, parts)))
                n_tokens += examples[key].n_ids
                bar.update(examples[key].n_ids)
        writer.flush()
    seconds = time.perf_counter() - start
    logger.info("Teacher: %d examples, %d tokens, %.0f tokens a second.", len(share), n_tokens, n_tokens / seconds)


def _require_finite(hidden: Tensor, example: Tensor, rows: list[dict]) -> None:
    """Raises InputError, naming the rows of the data file, where one of [R, H] hidden states is NaN or infinite."""
    bad = ~torch.isfinite(hidden).all(-1).cpu()
    if bad.any():
        numbers = ", ".join(str(rows[i]["row"]) for i in example[bad].unique().tolist())
        raise InputError(
            f"The teacher's hidden states are NaN or infinite in row {numbers} of the data, and are not stored. Leave "
            "the row out if there is something odd about it; otherwise give --teacher_dtype float32 or bfloat16."
        )


def freeze(model: nn.Module) -> None:
    """No gradients, no dropout. (Two statements: the methods of a DeepSpeed engine return nothing.)"""
    model.requires_grad_(False)
    model.eval()
