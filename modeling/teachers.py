"""Where the teacher's signal comes from: a model that runs in every step, or what it said once, read from disk.

A trainer asks either for the rows of a batch that predict the teacher's response tokens, and does not know which it is:

    teacher.logits(inputs) -> [R, V]                 logits, over the columns that the tokenizer really has
    teacher.signal(inputs) -> ([R, D], head)         the same for a loss that goes through it in parts:
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
from modeling.examples import ResponseCollator, example_key
from modeling.output_head import Head, OutputHead, input_device, last_hidden_states, logits_at
from modeling.teacher_cache import PartWriter, SignalCache, kept

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen model that runs in every step.

    Args:
        model: on any device, spread over several, or sharded over the ranks; frozen here, in eval mode.
        n_tokens: how many columns of its logits are real, V.
        side: whose tokens it is fed: "teacher_", or "" for the student's.
    """

    model: PreTrainedModel
    n_tokens: int
    side: str = "teacher_"

    def __post_init__(self):
        freeze(self.model)

    @torch.no_grad()
    def logits(self, inputs: dict) -> Tensor:
        """[R, V] in the model's dtype, on the device of the batch."""
        positions = inputs[f"{self.side}positions"]
        return logits_at(self.model, positions, self.n_tokens, **self._fed(inputs)).to(positions.device)

    @torch.no_grad()
    def signal(self, inputs: dict) -> tuple[Tensor, Head]:
        """Last hidden states [R, H] and the model's head, on the device of the batch. Raises as `OutputHead.of`."""
        head = self.head  # before the batch: it runs the model once
        hidden = last_hidden_states(self.model, **self._fed(inputs))
        positions = inputs[f"{self.side}positions"]
        rows = response_rows(hidden, positions.to(hidden.device)).to(positions.device)
        return rows, head.to(positions.device)

    @cached_property
    def head(self) -> OutputHead:
        """The model's head over the real columns. Raises as `OutputHead.of`."""
        return OutputHead.of(self.model).first(self.n_tokens)

    def _fed(self, inputs: dict) -> dict[str, Tensor]:
        ids, mask = inputs[f"{self.side}input_ids"], inputs[f"{self.side}attention_mask"]
        device = input_device(self.model, ids.device)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@dataclass(frozen=True)
class StoredTeacher:
    """Signals that were computed once, read for each batch. No model is there.

    Args:
        cache: with the signals of every example that the trainer will see.
        side: as for `LiveTeacher`.
    """

    cache: SignalCache
    side: str = "teacher_"

    def logits(self, inputs: dict) -> Tensor:
        """[R, V] in the teacher's dtype (float32 where only the top logits are stored), on the device of the batch."""
        rows, head = self.signal(inputs)
        return head(rows)

    def signal(self, inputs: dict) -> tuple[Tensor, Head]:
        """[R, D] and what makes logits of them. Raises ValueError for an example that is not stored."""
        responses = [r for r in inputs["responses"] if len(getattr(r, f"{self.side}ends"))]
        device = inputs[f"{self.side}positions"].device
        return self.cache.rows([(getattr(r, f"{self.side}key"), r.row) for r in responses], device)


Teacher = LiveTeacher | StoredTeacher


def as_teacher(teacher: Teacher | PreTrainedModel, n_tokens: int, side: str = "teacher_") -> Teacher:
    """A model becomes a `LiveTeacher`."""
    return teacher if isinstance(teacher, Teacher) else LiveTeacher(teacher, n_tokens, side)


@dataclass(frozen=True)
class Example:
    """A row of a tokenised dataset, for a teacher to run."""

    dataset: Dataset
    place: int
    n_ids: int


def examples_of(datasets: Iterable[Dataset | None], side: str = "teacher_") -> dict[bytes, Example]:
    """The examples of all datasets under the keys that they are stored by: equal ones once."""
    found = {}
    for dataset in datasets:
        place = 0
        for batch in [] if dataset is None else dataset.iter(batch_size=1000):
            for ids, start in zip(batch[f"{side}input_ids"], batch[f"{side}response_start"]):
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
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> None:
    """Computes and writes this rank's share of the signals of some examples, and the head where it is not there.

    Every rank must call, and runs the teacher equally often.

    Args:
        examples: as `examples_of` gives them, the same on all ranks.
        device: where batches are put; the teacher may be on another.
    """
    head = teacher.head
    if rank == 0 and not cache.has_head:
        cache.write_head(head)
    # The longest first: if memory does not suffice, it shows at once.
    order = sorted(examples, key=lambda key: (-examples[key].n_ids, key))
    share = order[rank::ranks]
    writer, start, n_tokens = PartWriter(cache, rank), time.perf_counter(), 0
    with tqdm(total=sum(examples[key].n_ids for key in share), unit=" tokens", disable=not progress) as bar:
        for first in range(0, math.ceil(len(order) / ranks), batch_size):
            keys = share[first : first + batch_size]
            rows = [examples[key].dataset[examples[key].place] for key in keys or order[:1]]
            inputs = ResponseCollator.pad(rows, teacher.side, pad_id)
            hidden, head = teacher.signal({name: tensor.to(device) for name, tensor in inputs.items()})
            _require_finite(hidden, inputs[f"{teacher.side}example"], rows)
            signals = kept(hidden, head, cache.settings)
            lengths = [len(row[f"{teacher.side}ends"]) for row in rows]
            for key, *parts in zip(keys, *(tensor.split(lengths) for tensor in signals.values())):
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


def response_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """[R, H]: the given rows of flattened [B, L, H] hidden states."""
    return hidden.flatten(0, 1).index_select(0, positions)
