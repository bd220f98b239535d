"""One way through what is a vocabulary wide: rows of logits, a few at a time, with one gradient for all losses.

A loss over a vocabulary of 150,000 that keeps its float32 copies for the backward pass exhausts memory. Here a loss is
a *row function*: rows of logits in, a few numbers a row out. `StudentRows` walks over the student's logits in chunks of
rows, gives the cross-entropy with what the row functions make, and in the backward pass walks once more, computing each
chunk again and adding up all gradients within it: the gradient of the logits is the only large thing that is made.

    rows = StudentRows(student, labels)
    kd = rows.read(lambda s, t: kl_rows(t, s), teacher)     # float32 [R]
    ce = rows.ce                                            # float32 [R], of the same pass

The logits are a tensor `[R, V]`, or `ChunkedLogits`, which are never there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling.losses.logits import (
    ChunkedLogits,
    Logits,
    PickedRows,
    as_float,
    chunks_with_buffers,
    entropy_largest_and_total,
    float_dtype,
    largest_and_total,
)


class StudentRows:
    """The student's logits at the R positions that predict the response tokens, for losses that share one gradient.

    Args:
        logits: `[R, V]`, any floating dtype and row stride: the columns that pad a head are cut off with a view.
        labels: int64 `[R]`, the tokens to be predicted, each in `0 … V − 1`.

    All that is read is differentiable, once, with respect to the logits (of `ChunkedLogits`: the hidden states and the
    head's weights). Nothing else may want a gradient: ValueError says so, in the call or in the backward pass.
    """

    def __init__(self, logits: Logits, labels: Tensor):
        self.logits, self.labels = logits, labels
        self._shared = _SharedGradient(logits, labels)
        tensors = logits.leaves if isinstance(logits, ChunkedLogits) else (logits,)
        # A node of the graph below all reads: its backward runs once the gradients of all of them are known.
        self._anchor = _Anchor.apply(self._shared, *tensors)
        self._ce: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ce(self) -> Tensor:
        """float32 `[R]`: −log softmax(z)[label], in nats. The first pass, whatever it is for, computes it too."""
        if self._ce is None:
            shared = self._shared
            if shared.total is None:
                self._walk()
            values = shared.total.log() - (shared.label_logits - shared.largest)
            self._ce = _Reading.apply(self._anchor, shared.cross_entropy, values)
        return self._ce

    def entropy(self) -> Tensor:
        """float32 `[R]`: the entropy of every row's prediction, in nats, a constant; of one pass with `ce`."""
        values = torch.empty(len(self), dtype=float_dtype(self.logits), device=self.logits.device)
        self._walk(entropy=values)
        return values

    def log_mass(self, columns: Tensor) -> Tensor:
        """float32 `[R]`: ln Σ_v softmax(z)[v] over some columns v; its gradient costs no more than the cross-entropy's.

        Args:
            columns: int64 `[c]`, distinct, c ≥ 1.
        """
        sums = torch.empty(len(self), dtype=float_dtype(self.logits), device=self.logits.device)
        self._walk(mass=(columns, sums))
        # Of a mass too small for a float32, the smallest one.
        read = _Mass(columns, sums.clamp_(min=torch.finfo(sums.dtype).tiny))
        return _Reading.apply(self._anchor, self._shared.new(read), sums.log() - self._shared.total.log())

    def read(self, row_function: Callable[..., Tensor], *others: Logits | PickedRows, copies: int = 5) -> Tensor:
        """`row_function(rows, *others)`, computed and differentiated a few rows at a time.

        Args:
            row_function: takes float32 rows `[r, V]` of the logits and rows `[r, …]` of the others, and gives `[r]` or
                `[r, c]`, each row from its own row only.
            others: `[R, …]`, constants.
            copies: float32 copies of its rows, and of those of other logits, that it holds at most, its gradient's
                and the arguments' own included. By this `loss_memory` is kept.

        Returns:
            `[R]` or `[R, c]`.
        """
        if any(other.requires_grad for other in others):
            raise ValueError("read: only the student's logits get a gradient. Detach the other arguments.")
        widths = [self.logits.shape[1], *(other.shape[1] for other in others if len(other.shape) == 2)]
        read = _Read(row_function, others, copies * sum(widths))
        return _Reading.apply(self._anchor, self._shared.new(read), self._walk(read))

    def columns(self, ids: Tensor) -> Tensor:
        """float32 `[R, c]`: the logits at chosen columns, whose gradient is scattered into the one that all share.

        Args:
            ids: int64 `[R, c]`, each in `0 … V − 1`; a column may stand there more than once.
        """
        read = _Read(None, (ids,))
        whole = isinstance(self.logits, Tensor)
        values = as_float(self.logits.detach().gather(1, ids)) if whole else self._walk(read)
        return _Reading.apply(self._anchor, self._shared.new(read), values)

    @torch.no_grad()
    def _walk(
        self,
        read: _Read | None = None,
        entropy: Tensor | None = None,
        mass: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """One pass: what `read` makes of the rows; the entropies, into their tensor; what the cross-entropy needs.

        `mass`: columns, and where Σ exp(z − largest) over them goes, of each row.
        """
        shared, values = self._shared, None
        first = shared.total is None
        if first:
            dtype, device = float_dtype(self.logits), self.logits.device
            shared.largest, shared.total, shared.label_logits = torch.empty(3, len(self), dtype=dtype, device=device)
        floats = None if read is None else read.floats
        for at, buffers in chunks_with_buffers(self.logits, 1 if entropy is None else 2, floats=floats):
            rows = self.logits[at]
            if entropy is not None:
                entropy[at], *normaliser = entropy_largest_and_total(rows, *buffers)
            elif first or mass is not None:
                normaliser = largest_and_total(rows, *buffers)
            if first:
                shared.largest[at], shared.total[at] = normaliser
                shared.label_logits[at] = rows.gather(1, self.labels[at, None]).squeeze(1)
            if mass is not None:
                mass[1][at] = buffers[0].index_select(1, mass[0]).sum(-1)  # (a product would be less exact)
            if read is not None:
                part = read(as_float(rows), at)
                if values is None:
                    # One tensor for all: small ones kept between the chunks would fragment the heap.
                    values = part.new_empty(len(self), *part.shape[1:])
                values[at] = part
        if read is not None and values is None:  # no rows at all: of the shape that some would give
            values = read(as_float(self.logits[:0]), slice(0, 0))
        return values


@dataclass(eq=False)
class _Read:
    """Something read from the rows, and, in a backward pass, the gradient of what came out.

    `function` is a row function with its other arguments; or None, and `others` are the columns to gather. `floats`:
    float32 numbers that it holds for each row, where they are many.
    """

    function: Callable[..., Tensor] | None = None
    others: tuple = ()
    floats: int = 0
    gradient: Tensor | None = None

    def __call__(self, rows: Tensor, at: slice) -> Tensor:
        others = (other[at] for other in self.others)
        return rows.gather(1, *others) if self.function is None else self.function(rows, *others)


@dataclass(eq=False)
class _Mass:
    """The probability of some columns was read: their ids, and Σ exp(z − largest) over them, `[R]`."""

    columns: Tensor
    sums: Tensor
    floats: int = 0
    gradient: Tensor | None = None


class _SharedGradient:
    """What the backward pass needs: all that was read, and what the cross-entropy was made of."""

    def __init__(self, logits: Logits, labels: Tensor):
        self.logits, self.labels = logits if isinstance(logits, ChunkedLogits) else None, labels
        self.largest: Tensor | None = None  # float [R], as are the next two
        self.total: Tensor | None = None  # Σ exp(z − largest)
        self.label_logits: Tensor | None = None
        self.cross_entropy = _Read()
        self.reads: list[_Read | _Mass] = []

    def new(self, read: _Read | _Mass) -> _Read | _Mass:
        self.reads.append(read)
        return read

    def take(self) -> list[tuple[_Read | _Mass, Tensor]]:
        """What the loss depends on, with its gradient. (A graph may be gone through again, with other gradients.)"""
        found = [(read, read.gradient) for read in (self.cross_entropy, *self.reads) if read.gradient is not None]
        for read, _ in found:
            read.gradient = None
        return found

    def of_whole(self, logits: Tensor) -> Tensor:
        """The gradient of `[R, V]` logits, in their dtype."""
        found, gradient = self.take(), torch.empty_like(logits)
        for at, (buffer,) in chunks_with_buffers(logits, 1, floats=max((read.floats for read, _ in found), default=0)):
            in_place = gradient.dtype == buffer.dtype
            self._add_up(found, logits[at], at, out=gradient[at] if in_place else buffer)
            if not in_place:
                gradient[at] = buffer
        return gradient

    def of_chunked(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list:
        """The gradients of hidden states, the head's weight and its bias, None for one that is not wanted."""
        found, logits, head = self.take(), self.logits, self.logits.cast_head
        # Sums over all rows: in float32, whatever smaller dtype the weight has.
        n, dtype = logits.vocab_size, float_dtype(weight)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        for at, (buffer,) in chunks_with_buffers(logits, 1):
            rows = hidden[at].to(logits.dtype)
            product = F.linear(rows, head.weight, head.bias).requires_grad_()
            with torch.enable_grad():
                z = head.finish(product)
            self._add_up(found, z.detach(), at, out=buffer)
            (gradient,) = torch.autograd.grad(z, product, buffer.to(z.dtype))
            if of_hidden is not None:
                of_hidden[at] = gradient @ head.weight
            if of_weight is not None:
                _add_product(of_weight[:n], gradient, rows)
            if of_bias is not None:
                of_bias[:n] += gradient.sum(0, dtype=dtype)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return [of_hidden, of_weight, None if of_bias is None else of_bias.to(bias.dtype)]

    def _add_up(self, found: list[tuple[_Read, Tensor]], rows: Tensor, at: slice, out: Tensor) -> None:
        """Writes the gradient of some rows of logits to `out`, float `[r, V]`."""
        self._add_up_probabilities(found, rows, at, out)
        for read, gradient in found:
            if read is self.cross_entropy or isinstance(read, _Mass):
                continue
            if read.function is None:
                out.scatter_add_(1, read.others[0][at], gradient[at].to(out.dtype))
            else:
                leaf = as_float(rows).detach().requires_grad_()
                with torch.enable_grad():
                    values = read(leaf, at)
                if at.start == 0:
                    _require_no_other_gradient(values, leaf)
                out.add_(*torch.autograd.grad(values, leaf, gradient[at]))

    def _add_up_probabilities(self, found: list, rows: Tensor, at: slice, out: Tensor) -> None:
        """Writes the gradient of the cross-entropy and of all masses, which is made of exp(z − largest) alone."""
        ce = [gradient[at, None] for read, gradient in found if read is self.cross_entropy]
        masses = [(read, gradient[at, None]) for read, gradient in found if isinstance(read, _Mass)]
        if not ce and not masses:
            out.zero_()
            return
        # ∂CE/∂z = softmax(z) − one-hot;  ∂ ln Σ_c softmax(z)[c]/∂z = exp(z − largest) · [z in c] / Σ_c − softmax(z)
        torch.sub(rows, self.largest[at, None], out=out).exp_()
        parts = [out.index_select(1, read.columns).mul_(g / read.sums[at, None]) for read, g in masses]
        out.mul_((sum(ce) - sum(g for _, g in masses)) / self.total[at, None])
        for (read, _), part in zip(masses, parts):
            out.index_add_(1, read.columns, part)
        if ce:
            out.scatter_add_(1, self.labels[at, None], -ce[0])


class _Anchor(torch.autograd.Function):
    """The node between the logits and all that is read of them: a scalar that every `_Reading` hangs on."""

    @staticmethod
    def forward(ctx, shared: _SharedGradient, *tensors: Tensor | None):
        ctx.shared = shared
        ctx.save_for_backward(*tensors)
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        if ctx.shared.logits is None:
            return None, ctx.shared.of_whole(*ctx.saved_tensors)
        return None, *ctx.shared.of_chunked(ctx.needs_input_grad[1:], *ctx.saved_tensors)


class _Reading(torch.autograd.Function):
    """Values that were read: their gradient is kept for the one backward walk."""

    @staticmethod
    def forward(ctx, anchor: Tensor, read: _Read, values: Tensor):
        ctx.read = read
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        ctx.read.gradient = gradient
        return gradient.new_zeros((), dtype=torch.float32), None, None


def _require_no_other_gradient(values: Tensor, leaf: Tensor) -> None:
    """Raises ValueError where a row function's values depend on another tensor that wants a gradient."""
    nodes, seen = [values.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if getattr(node, "variable", leaf) is not leaf:
                raise ValueError("A row function reads a tensor that wants a gradient, and gets none here. Detach it.")
            nodes.extend(following for following, _ in node.next_functions)


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total += gradientᵀ · rows"""
    if rows.dtype == total.dtype:
        total.addmm_(gradient.T, rows)
    else:
        total += gradient.T @ rows
