"""Logits as losses take them: whole, or computed when they are read; and passes over a few rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from modeling.text.ends import fold_ends

LEAST_LOGIT = -1e3  # below the largest; e to its power is 0 even in float64, and 0 times it is not NaN
CPU_CHUNKS, CPU_ROWS = 64, 8
GIB = 1 << 30
ROW_COPIES = 6  # of a row that a walk is sized for. It takes one or two itself: so the rest of the budget stays free
_budget: list[float | None] = [None]  # GiB, of `loss_memory`; the last one is in force


@contextlib.contextmanager
def loss_memory(gib: float | None) -> Iterator[None]:
    """Bounds what a pass over logits takes beyond them and their gradient, in GiB, within this process.

    None, the default, means 1 GiB on an accelerator, and on a CPU chunks that suit its caches. A single row is always
    worked on, whatever it takes.
    """
    _budget.append(gib)
    try:
        yield
    finally:
        _budget.pop()


def chunk_rows(n_rows: int, floats: int, device: torch.device) -> int:
    """How many of n rows to work on at a time, where each takes so many float32 numbers.

    On a CPU a 64th of them (at least 8), which suits its caches. On an accelerator, where many small kernels cost more
    than large ones, as many as `loss_memory` holds, in equal parts.
    """
    if device.type == "cpu" and _budget[-1] is None:
        return max(CPU_ROWS, -(-n_rows // CPU_CHUNKS))
    most = max(1, int((_budget[-1] or 1.0) * GIB) // (4 * floats))
    return -(-n_rows // -(-n_rows // most)) if n_rows else 1


@dataclass(frozen=True)
class ChunkedLogits:
    """Logits that never exist as a whole: `logits[rows]` is computed when it is read.

    Attributes:
        hidden: `[R, H]`, last hidden states, or whatever the head makes logits of.
        head: `head(hidden [r, H]) -> logits [r, W]`. Where gradients are wanted it must be an `OutputHead`.
        vocab_size: V ≤ W, how many of the columns are tokens.
        chunk: rows to work on at a time.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    chunk: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.hidden), self.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.head.product_dtype if self.has_weights else self.hidden.dtype

    @property
    def has_weights(self) -> bool:
        """Whether the head is an `OutputHead`; else nothing of it can be trained."""
        return hasattr(self.head, "weight")

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient: the hidden states; of an `OutputHead` also the weight and the bias."""
        return (self.hidden, self.head.weight, self.head.bias) if self.has_weights else (self.hidden,)

    @property
    def requires_grad(self) -> bool:
        return any(leaf is not None and leaf.requires_grad for leaf in self.leaves)

    @cached_property
    def cast_head(self) -> Callable[[Tensor], Tensor]:
        """What makes the logits, without gradient, of the real columns: cast once for all chunks and both passes."""
        with torch.no_grad():
            return self.head.first(self.vocab_size).cast() if self.has_weights else self.head

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.cast_head(self.hidden[rows])[:, : self.vocab_size]


Logits = Tensor | ChunkedLogits


def folded(logits: Logits, stop_ids: tuple[int, ...]) -> Logits:
    """The same logits, with ending as one event (see `text.ends`)."""
    if not isinstance(logits, ChunkedLogits):
        return fold_ends(logits, stop_ids)
    head = logits.head
    ending = replace(head, stop_ids=stop_ids) if logits.has_weights else lambda rows: fold_ends(head(rows), stop_ids)
    return replace(logits, head=ending)


def stop_logits(logits: Logits, stop_ids: tuple[int, ...]) -> Tensor:
    """[R, len(stop_ids)], with gradient: columns of logits."""
    ids = list(stop_ids)
    return logits.head.columns(ids)(logits.hidden) if isinstance(logits, ChunkedLogits) else logits[:, ids]


@dataclass(frozen=True)
class PickedRows:
    """Rows of some logits in another order: `[R', V]`, of which a chunk is made when it is read.

    Attributes:
        logits: `[R, V]`.
        rows: int64 `[R']`; −1 stands for no row and reads row 0, for the caller to mask.
    """

    logits: Logits
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.logits.shape[1]

    @property
    def requires_grad(self) -> bool:
        return self.logits.requires_grad

    def __getitem__(self, at: slice) -> Tensor:
        return self.logits[self.rows[at].clamp(min=0)]


def float_dtype(logits: Logits) -> torch.dtype:
    """float32; float64 is kept, for numerical gradient checks."""
    return torch.promote_types(logits.dtype, torch.float32)


def as_float(logits: Tensor) -> Tensor:
    """Logits as float32; float64 is kept."""
    return logits.to(float_dtype(logits))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def chunks_with_buffers(
    logits: Logits, count: int, n_rows: int | None = None, floats: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of a few rows, and `count` float32 buffers of their shape, the same memory every time.

    Tensors of a few megabytes that come and go cost a CPU more time than the arithmetic (their pages are mapped anew
    each time), and they fragment the heap, which grows to several times their size.

    Args:
        logits: `[R, V]`, for the buffers' width and device.
        n_rows: how many rows to go through; by default R.
        floats: float32 numbers that the work on each of them takes, the buffers included; by default ROW_COPIES rows.
    """
    n_rows, width = len(logits) if n_rows is None else n_rows, logits.shape[1]
    chunk = chunk_rows(n_rows, floats or ROW_COPIES * width, logits.device)
    if isinstance(logits, ChunkedLogits):
        chunk = logits.chunk
    shape = (count, min(chunk, n_rows), width)
    buffers = torch.empty(shape, dtype=float_dtype(logits), device=logits.device)
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        yield slice(start, stop), buffers[:, : stop - start]


def largest_and_total(rows: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """float `[r]` each: the largest logit m of every row of `[r, V]`, and Σ exp(z − m).

    `buffer` is overwritten, and may be the rows themselves.
    """
    largest = rows.amax(-1).to(buffer.dtype)  # or a difference of two bfloat16 would be rounded to one
    return largest, torch.sub(rows, largest[:, None], out=buffer).exp_().sum(-1)


def entropy_largest_and_total(rows: Tensor, z: Tensor, exp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entropy of every row, in nats, with its largest logit and total, of one pass. `z`, `exp`: buffers."""
    # H = ln Σ eᶻ − Σ z eᶻ / Σ eᶻ, with z shifted to a maximum of 0: fewer passes than −Σ p ln p.
    largest = rows.amax(-1).to(z.dtype)
    torch.sub(rows, largest[:, None], out=z).clamp_(min=LEAST_LOGIT)
    total = torch.exp(z, out=exp).sum(-1)
    return total.log() - z.mul_(exp).sum(-1) / total, largest, total


@torch.no_grad()
def entropy(logits: Logits) -> Tensor:
    """Entropy of softmax(logits) of every row, without a float32 copy of all logits (CDM, step 1).

    Args:
        logits: `[R, V]`, any floating dtype, any row stride. A logit of −∞ is a probability of 0.

    Returns:
        float32 `[R]`, in nats, a constant.
    """
    values = torch.empty(len(logits), dtype=float_dtype(logits), device=logits.device)
    for at, buffers in chunks_with_buffers(logits, 2):
        values[at], *_ = entropy_largest_and_total(logits[at], *buffers)
    return values
