"""Logits that never exist as a whole: a head and last hidden states, in the place of a tensor `[R, V]`.

A batch of 4,096 response tokens over a vocabulary of 150,000 has 2.5 GB of float32 logits, as much again for their
gradient. The losses here go through logits a few rows at a time anyway; with these, each part of them is computed when
it is read, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling.output_head import Head, OutputHead


@dataclass(frozen=True)
class ChunkedLogits:
    """`[R, V]` logits as a loss function takes them: what it indexes, `logits[rows]`, is computed there.

    Attributes:
        hidden: `[R, H]`, last hidden states.
        head: makes `[r, W]` logits of `[r, H]` hidden states. Where gradients are wanted it must be an `OutputHead`.
        n_tokens: V ≤ W, how many of the columns are tokens.
        chunk: rows to work on at a time.
    """

    hidden: Tensor
    head: Head
    n_tokens: int
    chunk: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.hidden), self.n_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.head.product_dtype if isinstance(self.head, OutputHead) else self.hidden.dtype

    @cached_property
    def cast_head(self) -> Head:
        """What makes the logits, without gradient, of the real columns: cast once for all chunks and both passes."""
        if not isinstance(self.head, OutputHead):
            return self.head
        with torch.no_grad():
            return self.head.first(self.n_tokens).cast()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.cast_head(self.hidden[rows])[:, : self.n_tokens]

    def index_select(self, dim: int, rows: Tensor) -> ChunkedLogits:
        """Other rows, in any order, or the same one more than once. `dim` is 0, as for a tensor's rows."""
        return replace(self, hidden=self.hidden.index_select(dim, rows))

    def new_empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(*shape, dtype=dtype)

    def map_rows(self, row_function: Callable[..., Tensor], *others: Tensor | ChunkedLogits) -> Tensor:
        """`row_function(logits, *others)`, computed and differentiated a chunk of rows at a time.

        Args:
            row_function: takes rows `[r, …]` of the logits and of the others, and gives `[r, …]`, each row from its own
                row only.
            others: `[R, …]`, without gradient.

        Returns:
            `[R, …]`, differentiable (once) with respect to the hidden states and the head's weights.
        """
        if not isinstance(self.head, OutputHead):
            return in_chunks(len(self), self.chunk, lambda at: row_function(self[at], *(other[at] for other in others)))
        return _MapRows.apply(self, row_function, others, self.hidden, self.head.weight, self.head.bias)


def in_chunks(n_rows: int, chunk: int, values: Callable[[slice], Tensor]) -> Tensor:
    """`[n_rows, …]`: the values `[r, …]` of each chunk of rows.

    They are written into one tensor: small ones kept between the chunks would fragment the heap, which then grows by
    every chunk.
    """
    result = None
    for start in range(0, max(n_rows, 1), chunk):
        at = slice(start, start + chunk)
        rows = values(at)
        if result is None:
            result = rows.new_empty(n_rows, *rows.shape[1:])
        result[at] = rows
    return result


class _MapRows(torch.autograd.Function):
    """Hidden states, weight and bias are inputs of their own, for their gradients; the logits hold the same ones."""

    @staticmethod
    def forward(ctx, logits, row_function, others, hidden, weight, bias):
        ctx.logits, ctx.row_function, ctx.others = logits, row_function, others
        return in_chunks(
            *(len(logits), logits.chunk),
            lambda at: row_function(logits[at], *(other[at] for other in others)),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        logits, row_function = ctx.logits, ctx.row_function
        hidden, n_tokens = logits.hidden.detach(), logits.n_tokens
        head = logits.cast_head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[3:]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over all rows: in float32, whatever smaller dtype the weight has.
        weight, bias = logits.head.weight, logits.head.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
        for start in range(0, len(logits), logits.chunk):
            at = slice(start, start + logits.chunk)
            rows = hidden[at].to(logits.dtype)
            product = F.linear(rows, head.weight, head.bias).requires_grad_()
            with torch.enable_grad():
                values = row_function(head.finish(product), *(other[at] for other in ctx.others))
            (gradient,) = torch.autograd.grad(values, product, grad_output[at])
            del values, product
            if wants_hidden:
                grad_hidden[at] = gradient @ head.weight
            if wants_weight:
                _add_product(grad_weight[:n_tokens], gradient, rows)
            if wants_bias:
                grad_bias[:n_tokens] += gradient.sum(0, dtype=dtype)
        return (
            *(None, None, None, grad_hidden),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total += gradientᵀ · rows"""
    if rows.dtype == total.dtype:
        total.addmm_(gradient.T, rows)
    else:
        total += gradient.T @ rows
