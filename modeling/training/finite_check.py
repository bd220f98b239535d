"""Stops a run at the first number that is NaN or infinite and must not be, and names the row of the data file.

Nothing is ever replaced by another number, and no checkpoint is saved after it. Whether a number is finite is worked
out where the number is; looking at the answer makes the host wait for the device. On a CPU there is nothing to wait
for, and the run stops in the very micro-batch, before its backward pass. On an accelerator the answers stay on the
device until the run waits for it anyway: when it logs, evaluates, saves and ends. There all ranks look together, so
that no rank saves a model which another rank's batch has spoilt.

A logit of −∞ is no fault: it is a token that a model rules out. A loss of ∞ is one: no gradient comes of it. Gradients
that overflow under fp16 loss scaling are none: the scaler skips that step, and the losses themselves are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from modeling.errors import InputError
from modeling.losses.logits import ChunkedLogits
from modeling.models.output_head import OutputHead

MOST_PENDING = 1000  # answers that may wait on the device: a run that never logs or saves must not pile them up

# What is looked at: how a message calls it, and what to do.
TEACHER, STUDENT, LOSS, GRADIENT = "teacher", "student", "loss", "gradient"
MESSAGES = {
    TEACHER: (
        "the teacher's logits hold a NaN or +inf",
        "Leave the row out if there is something odd about it. Otherwise the teacher overflows: give --teacher_dtype "
        "float32 or bfloat16",
    ),
    STUDENT: (
        "the student's cross-entropy is NaN or infinite",
        "If the loss was rising before, lower --learning_rate or give --warmup_steps; with --fp16 or --dtype float16, "
        "take bfloat16, which does not overflow",
    ),
    LOSS: (
        "the loss, or what is logged with it, is NaN or infinite, though both sides' logits look sound",
        "One side gives a token no probability at all (a logit of -inf) that the other expects there",
    ),
    GRADIENT: (
        "the gradient is NaN or infinite, though the loss is finite",
        "Lower --learning_rate, give --warmup_steps, or train in bfloat16 or float32",
    ),
}


class NotFiniteError(InputError):
    """A number is NaN or infinite that training or evaluation must not go on with."""


def largest(logits: Tensor | ChunkedLogits) -> Tensor:
    """`[R]`, the largest logit of every row: NaN where one is NaN, −inf where all are. (A loss may read only a few.)

    Of logits that never exist as a whole, the same of what they are made of; hidden states may not be −inf either.
    """
    if isinstance(logits, Tensor):
        return logits.amax(-1)
    return (logits.hidden.abs() if isinstance(logits.head, OutputHead) else logits.hidden).amax(-1)


@dataclass
class Finding:
    what: str
    step: int  # the optimizer step that it belongs to, from 1
    training: bool
    rows: list[int]  # of the data file
    bad: Tensor  # bool [len(rows)], or [1] where it cannot be told which of the rows it is


class Cause(NamedTuple):
    step: int
    is_gradient: bool
    message: str


class FiniteCheck:
    """One rank's findings.

    Attributes:
        deferred: whether findings wait for `look_together`. Not on a CPU.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.deferred = accelerator.device.type != "cpu"
        self.pending: list[Finding] = []

    def add(self, what: str, step: int, training: bool, rows: list[int], bad: Tensor) -> None:
        """Takes an answer, and looks at it where looking costs nothing. Raises `NotFiniteError`."""
        self.pending.append(Finding(what, step, training, rows, bad.to(self.accelerator.device)))
        look = not self.deferred or len(self.pending) >= MOST_PENDING
        if look and (first := self._first()) is not None:
            raise NotFiniteError(first.message)

    def look_together(self) -> None:
        """Raises `NotFiniteError` on every rank if any rank found something. Every rank must call."""
        first = self._first()
        found = torch.tensor(int(first is not None), device=self.accelerator.device)
        if self.accelerator.reduce(found, reduction="sum").item():
            # The cause, not what came of it: a spoilt gradient reaches all ranks, and with it all later losses.
            causes = [cause for cause in gather_object([first]) if cause is not None]
            raise NotFiniteError(min(causes, key=lambda cause: (cause.step, cause.is_gradient)).message)

    def _first(self) -> Cause | None:
        """What is wrong first on this rank; the answers are taken off the device in one transfer."""
        if not self.pending:
            return None
        findings, self.pending = self.pending, []
        bad = torch.cat([finding.bad for finding in findings]).cpu().split([len(f.bad) for f in findings])
        for finding, flags in zip(findings, bad):
            if flags.any():
                return Cause(finding.step, finding.what == GRADIENT, self._describe(finding, flags.tolist()))
        return None

    def _describe(self, finding: Finding, flags: list[bool]) -> str:
        rows = finding.rows
        if len(flags) == len(rows):
            rows = [row for row, flag in zip(rows, flags) if flag]
        if not rows:
            place = ""
        else:
            name = "row" if len(rows) == 1 else "rows" if len(flags) == len(finding.rows) else "one of the rows"
            file = "train_file" if finding.training else "validation_file"
            place = f", {name} {', '.join(map(str, rows))} of --{file}"
        when = f"step {finding.step}" if finding.training else f"evaluation after step {finding.step - 1}"
        what, remedy = MESSAGES[finding.what]
        resume = " Checkpoints from before are sound: the same command resumes from one." if finding.training else ""
        return f"In {when}, rank {self.accelerator.process_index}{place}: {what}. {remedy}.{resume}"
