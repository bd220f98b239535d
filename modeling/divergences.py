"""Cross-entropy and Kullback–Leibler divergences, one value per row of logits, always in float32.

Every function takes logits of any floating dtype (float32, bfloat16, float16; float64 stays float64) and any
row stride, so the columns that pad a model's head can be cut off with a view, `logits[:, :vocabulary]`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A full-vocabulary float32 temporary may be as large as this share of the logits it is computed from.
CHUNKS = 64
MIN_CHUNK_ROWS = 8


def as_float(logits: Tensor) -> Tensor:
    """Logits as float32; float64 is kept, for numerical gradient checks."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def chunk_rows(n_rows: int) -> int:
    """Rows to work on at a time when every row is a full vocabulary wide."""
    return max(MIN_CHUNK_ROWS, -(-n_rows // CHUNKS))


def in_row_chunks(row_function: Callable[..., Tensor], *tensors: Tensor, chunk: int | None = None) -> Tensor:
    """`row_function(*tensors)`, computed and differentiated a few rows at a time.

    A loss over a vocabulary of 150,000 keeps several float32 copies of its logits for the backward pass. Here
    only the logits themselves are kept: the backward pass computes each chunk again, and writes its gradient
    into place.

    Args:
        row_function: takes rows `[r, …]` of every tensor and gives `[r, …]`, each row from its own row only.
        tensors: all with the same first dimension R.
        chunk: rows at a time.

    Returns:
        `[R, …]`, differentiable (once) with respect to every floating-point tensor.
    """
    return _InRowChunks.apply(row_function, chunk or chunk_rows(len(tensors[0])), *tensors)


class _InRowChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_function, chunk, *tensors):
        ctx.row_function, ctx.chunk = row_function, chunk
        ctx.save_for_backward(*tensors)
        # Results are written into one tensor: small ones kept between the chunks would fragment the heap,
        # which then grows by every chunk.
        result = None
        for start in range(0, max(len(tensors[0]), 1), chunk):
            rows = row_function(*(tensor[start : start + chunk] for tensor in tensors))
            if result is None:
                result = rows.new_empty(len(tensors[0]), *rows.shape[1:])
            result[start : start + chunk] = rows
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        gradients = [torch.empty_like(t) if want else None for t, want in zip(tensors, wanted)]
        for start in range(0, len(grad_output), ctx.chunk):
            at = slice(start, start + ctx.chunk)
            rows = [t[at].detach().requires_grad_(want) for t, want in zip(tensors, wanted)]
            inputs = [row for row, want in zip(rows, wanted) if want]
            with torch.enable_grad():
                output = ctx.row_function(*rows)
            parts = iter(torch.autograd.grad(output, inputs, grad_output[at]))
            for gradient in gradients:
                if gradient is not None:
                    gradient[at] = next(parts)
        return None, None, *gradients


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label] of every token.

    Args:
        logits: `[R, V]`, those that predict the labels.
        labels: int64 `[R]`, each in `0 … V − 1`.

    Returns:
        float32 `[R]`, in nats.
    """
    return in_row_chunks(
        lambda rows, row_labels: F.cross_entropy(as_float(rows), row_labels, reduction="none"), logits, labels
    )


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(p ‖ q) of every row, with p = softmax(p_logits / τ) and q likewise.

    Forward KL gives the teacher first, reverse KL the student first (MiniLLM, arXiv 2306.08543). The gradient
    flows into both arguments; τ² keeps its scale the same at every temperature (Hinton et al., 1503.02531).

    Args:
        p_logits, q_logits: `[R, V]`, of equal shape.
        temperature: τ > 0.

    Returns:
        float32 `[R]`, in nats.

    Raises:
        ValueError: the shapes differ.
    """
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            "kl_divergence needs logits of one shape, "
            f"got {tuple(p_logits.shape)} and {tuple(q_logits.shape)}"
        )

    def row_kl(p_rows: Tensor, q_rows: Tensor) -> Tensor:
        log_p = torch.log_softmax(as_float(p_rows) / temperature, dim=-1)
        log_q = torch.log_softmax(as_float(q_rows) / temperature, dim=-1)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

    return in_row_chunks(row_kl, p_logits, q_logits)


def restricted_kl(
    teacher_logits: Tensor, student_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """τ² · KL(q^T ‖ q^S) over the columns that the mask keeps, on which both sides are renormalised.

    Column c of the teacher and column c of the student are one category, whatever tokens they stand for
    (CDM, arXiv 2502.11104, step 5). The teacher is a constant target. A row that keeps no column is exactly 0
    and gives a gradient of exactly 0.

    Args:
        teacher_logits, student_logits: `[G, c]`.
        mask: bool `[G, c]`.
        temperature: τ > 0.

    Returns:
        float32 `[G]`, in nats.
    """
    log_p = _masked_log_softmax(teacher_logits.detach(), mask, temperature)
    log_q = _masked_log_softmax(student_logits, mask, temperature)
    terms = log_p.exp() * (log_p - log_q)
    return temperature**2 * terms.masked_fill(~mask, 0.0).sum(-1)


def _masked_log_softmax(logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    scaled = as_float(logits) / temperature
    # The lowest finite number, not −inf: a row without columns must stay finite for its gradient to be 0.
    return torch.log_softmax(scaled.masked_fill(~mask, torch.finfo(scaled.dtype).min), dim=-1)
