"""Cross-entropy and the divergences between two sides' predictions, one value per row of logits, always in float32.

Every function takes logits of any floating dtype (float32, bfloat16, float16; float64 stays float64) and any
row stride, so the columns that pad a head can be cut off with a view, `logits[:, :vocabulary]`. Where `Logits` are
taken, they may also be `ChunkedLogits`, which do not exist as a whole.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling.chunked_logits import ChunkedLogits, in_chunks

Logits = Tensor | ChunkedLogits

# A full-vocabulary float32 temporary may be as large as this share of the logits it is computed from.
CHUNKS = 64
MIN_CHUNK_ROWS = 8


def float_dtype(logits: Logits) -> torch.dtype:
    """float32; float64 is kept, for numerical gradient checks."""
    return torch.promote_types(logits.dtype, torch.float32)


def as_float(logits: Tensor) -> Tensor:
    """Logits as float32; float64 is kept."""
    return logits.to(float_dtype(logits))


def chunk_rows(logits: Logits, n_rows: int) -> int:
    """Of n rows that are a full vocabulary wide: how many to work on at a time."""
    return logits.chunk if isinstance(logits, ChunkedLogits) else max(MIN_CHUNK_ROWS, -(-n_rows // CHUNKS))


def in_row_chunks(row_function: Callable[..., Tensor], logits: Logits, *others: Logits) -> Tensor:
    """`row_function(logits, *others)`, computed and differentiated a few rows at a time.

    A loss over a vocabulary of 150,000 keeps several float32 copies of its logits for the backward pass. Here
    only the logits themselves are kept: the backward pass computes each chunk again, and writes its gradient
    into place.

    Args:
        row_function: takes rows `[r, …]` of every argument and gives `[r, …]`, each row from its own row only.
        logits: `[R, V]`.
        others: `[R, …]`.

    Returns:
        `[R, …]`, differentiable (once) with respect to every floating-point tensor; of `ChunkedLogits`, with respect
        to the first argument only.
    """
    if isinstance(logits, ChunkedLogits):
        return logits.map_rows(row_function, *others)
    return _InRowChunks.apply(row_function, chunk_rows(logits, len(logits)), logits, *others)


class _InRowChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_function, chunk, *tensors):
        ctx.row_function, ctx.chunk = row_function, chunk
        ctx.save_for_backward(*(tensor for tensor in tensors if isinstance(tensor, Tensor)))
        ctx.chunked = {i: logits for i, logits in enumerate(tensors) if isinstance(logits, ChunkedLogits)}
        return in_chunks(len(tensors[0]), chunk, lambda at: row_function(*(tensor[at] for tensor in tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tensors, wanted = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        for i, logits in ctx.chunked.items():
            tensors.insert(i, logits)
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


def cross_entropy(logits: Logits, labels: Tensor) -> Tensor:
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


def cross_entropy_and_columns(
    logits: Logits, labels: Tensor, columns: Tensor, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, and its logits at some columns, which share one gradient.

    A loss that reads a few columns of each row adds next to nothing to the gradient of the cross-entropy: here it is
    scattered into that, instead of filling a second tensor of the size of the logits with zeros.

    Args:
        logits: `[R, V]`.
        labels: int64 `[R]`, as in `cross_entropy`.
        columns: int64 `[R, c]`, each in `0 … V − 1`; a column may stand there more than once.
        logsumexp: float32 `[R]`, where it is known: spares a pass.

    Returns:
        float32 `[R]`, in nats, and float32 `[R, c]`.
    """
    if isinstance(logits, ChunkedLogits):
        both = logits.map_rows(_cross_entropy_and_column_rows, labels, columns)
        return both[:, 0], both[:, 1:]
    return _CrossEntropyAndColumns.apply(logits, labels, columns, logsumexp)


def _cross_entropy_and_column_rows(rows: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    rows = as_float(rows)
    ce = F.cross_entropy(rows, labels, reduction="none")
    return torch.cat([ce[:, None], rows.gather(1, columns)], dim=1)


class _CrossEntropyAndColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, columns, logsumexp):
        if logsumexp is None:
            logsumexp = logits.new_empty(len(logits), dtype=float_dtype(logits))
            for at, (rows,) in chunks_with_buffers(logits, 1):
                logsumexp[at] = logsumexp_(rows.copy_(logits[at]))
        ctx.save_for_backward(logits, labels, columns, logsumexp)
        return logsumexp - as_float(logits.gather(1, labels[:, None])).squeeze(1), as_float(logits.gather(1, columns))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce, grad_columns):
        logits, labels, columns, logsumexp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for at, (rows,) in chunks_with_buffers(logits, 1):
            in_place = gradient.dtype == rows.dtype
            if in_place:
                rows = gradient[at]
            # ∂CE/∂z = softmax(z) − one-hot
            torch.sub(logits[at], logsumexp[at, None], out=rows).exp_().mul_(grad_ce[at, None])
            rows.scatter_add_(1, labels[at, None], -grad_ce[at, None])
            rows.scatter_add_(1, columns[at], grad_columns[at])
            if not in_place:
                gradient[at] = rows
        return gradient, None, None, None


def cross_entropy_and(
    divergence: Callable[..., Tensor], student: Logits, labels: Tensor, *others: Logits
) -> tuple[Tensor, Tensor]:
    """`(cross_entropy(student, labels), divergence(student, *others))`, which share one gradient.

    Two losses of the same logits each give them a gradient of full size, and both are held until they are added.
    Computed in the same chunks of rows, the two add up within the chunk.

    Args:
        divergence: a row function, as of `in_row_chunks`: rows of `student` and of the others to float32 `[r]`.
        student: `[R, V]`.
        labels: int64 `[R]`, as in `cross_entropy`.
        others: `[R, …]`.

    Returns:
        float32 `[R]` and `[R]`, in nats and in the unit of the divergence.
    """

    def row_losses(student_rows: Tensor, row_labels: Tensor, *other_rows: Tensor) -> Tensor:
        student_rows = as_float(student_rows)  # once: the two gradients add up in float32
        ce = F.cross_entropy(student_rows, row_labels, reduction="none")
        return torch.stack([ce, divergence(student_rows, *other_rows)], dim=-1)

    return in_row_chunks(row_losses, student, labels, *others).unbind(-1)


def kl_divergence(p_logits: Logits, q_logits: Logits, temperature: float = 1.0) -> Tensor:
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
    _check_shapes("kl_divergence", p_logits, q_logits)

    return in_row_chunks(lambda q_rows, p_rows: kl_rows(p_rows, q_rows, temperature), q_logits, p_logits)


def cross_entropy_and_kl(
    student: Logits, labels: Tensor, teacher: Logits, temperature: float = 1.0, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(student, labels)` and τ² · KL(p^T ‖ p^S) (reverse: τ² · KL(p^S ‖ p^T)) of every row.

    The same as `cross_entropy` and `kl_divergence` give, in less memory: the two share one gradient, which is written
    out below, and all chunks of rows share three buffers.

    Args:
        student, teacher: `[R, V]`, of equal shape. The teacher is a constant.
        labels: int64 `[R]`, as in `cross_entropy`.
        temperature: τ > 0, of the KL.

    Returns:
        float32 `[R]` and `[R]`, in nats.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("cross_entropy_and_kl", student, teacher)
    if isinstance(student, ChunkedLogits) or isinstance(teacher, ChunkedLogits):

        def divergence(student: Tensor, teacher: Tensor) -> Tensor:
            p, q = (student, teacher) if reverse else (teacher, student)
            return kl_rows(p, q, temperature)

        return cross_entropy_and(divergence, student, labels, teacher)
    return _CrossEntropyAndKl.apply(student, labels, teacher, temperature, reverse)


class _CrossEntropyAndKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, labels, teacher, temperature, reverse):
        ctx.save_for_backward(student, labels, teacher)
        ctx.temperature, ctx.reverse = temperature, reverse
        ce, kl = student.new_empty(2, len(student), dtype=float_dtype(student))
        for at, (x, y, z) in chunks_with_buffers(student, 3):
            log_s = _log_softmax(student[at], 1.0, scratch=x, out=y)
            ce[at] = -log_s.gather(1, labels[at, None]).squeeze(1)
            p, q = (student, teacher) if reverse else (teacher, student)
            log_p = _log_softmax(p[at], temperature, scratch=x, out=y)
            log_q = _log_softmax(q[at], temperature, scratch=x, out=z)
            p = torch.exp(log_p, out=x)
            kl[at] = p.mul_(log_p.sub_(log_q).masked_fill_(p == 0, 0.0)).sum(-1)  # 0 · ∞ would be NaN
        return ce, kl.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce, grad_kl):
        (student, labels, teacher), temperature = ctx.saved_tensors, ctx.temperature
        gradient = torch.empty_like(student)
        for at, (x, y, z) in chunks_with_buffers(student, 3):
            # τ² ∂KL/∂z^S = τ · (p^S − p^T);  reverse: τ · p^S · (log p^S − log p^T − KL)
            log_s = _log_softmax(student[at], temperature, scratch=x, out=y)
            log_t = _log_softmax(teacher[at], temperature, scratch=x, out=z)
            p_s = torch.exp(log_s, out=x)
            if ctx.reverse:
                log_ratio = log_s.sub_(log_t).masked_fill_(p_s == 0, 0.0)
                kl = torch.mul(p_s, log_ratio, out=z).sum(-1, keepdim=True)
                kl_gradient = p_s.mul_(log_ratio.sub_(kl))
            else:
                kl_gradient = p_s.sub_(log_t.exp_())
            kl_gradient.mul_(temperature * grad_kl[at, None])
            # ∂CE/∂z^S = softmax(z^S) − one-hot
            ce_gradient = _log_softmax(student[at], 1.0, scratch=y, out=z).exp_()
            ce_gradient.scatter_add_(1, labels[at, None], -torch.ones_like(ce_gradient[:, :1]))
            gradient[at] = kl_gradient.add_(ce_gradient.mul_(grad_ce[at, None]))
        return gradient, None, None, None, None


def chunks_with_buffers(logits: Logits, count: int, n_rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of a few rows, and `count` float32 buffers of their shape, the same memory every time.

    Tensors of a few megabytes that come and go cost a CPU more time than the arithmetic (their pages are mapped anew
    each time), and they fragment the heap, which grows to several times their size.

    Args:
        logits: `[R, V]`, for the buffers' width and device.
        n_rows: how many rows to go through; by default R.
    """
    n_rows = len(logits) if n_rows is None else n_rows
    chunk = chunk_rows(logits, n_rows)
    buffers = logits.new_empty(count, min(chunk, n_rows), logits.shape[1], dtype=float_dtype(logits))
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        yield slice(start, stop), buffers[:, : stop - start]


def logsumexp_(rows: Tensor) -> Tensor:
    """`[r]`: ln Σ exp of every row of float `[r, V]`, which is overwritten."""
    largest = rows.amax(-1, keepdim=True)
    return rows.sub_(largest).exp_().sum(-1).log_().add_(largest.squeeze(1))


def _log_softmax(logits: Tensor, temperature: float, scratch: Tensor, out: Tensor) -> Tensor:
    return torch.log_softmax(scratch.copy_(logits).div_(temperature), dim=-1, out=out)


def _check_shapes(function: str, a: Logits, b: Logits) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{function} needs logits of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


# ------------------------------------------------------------------------------------------------- row functions
# They keep several float32 copies of their rows: give them to `in_row_chunks` or `cross_entropy_and`.


def kl_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: τ² · KL(p ‖ q) of every row, as in `kl_divergence`."""
    log_p = torch.log_softmax(as_float(p_logits) / temperature, dim=-1)
    log_q = torch.log_softmax(as_float(q_logits) / temperature, dim=-1)
    p = log_p.exp()
    # A token that p rules out (a logit of −∞) adds nothing; 0 · ∞ would be NaN, in the gradient too.
    return temperature**2 * (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def kl_to_target_rows(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: τ² · KL(target ‖ softmax(logits / τ)) of every row; entries of the target may be 0.

    Args:
        target: float32 `[r, V]`, probabilities, without gradient.
        logits: `[r, V]`.
        temperature: τ > 0, of the logits; the target is taken as it is.
    """
    log_q = torch.log_softmax(as_float(logits) / temperature, dim=-1)
    return temperature**2 * (torch.xlogy(target, target) - target * log_q.masked_fill(target == 0, 0.0)).sum(-1)


def sorted_distance_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: Σ_k |sort↓(p)_k − sort↓(q)_k| of every row, p and q the softmax of logits / τ.

    The universal logit distance (ULD, arXiv 2402.12030, section 4): it compares how probability is spread, and
    not over which tokens, so the vocabularies `[r, V]` and `[r, V']` need nothing in common. The shorter one is padded
    with zeros. The gradient is a subgradient: 0 where two probabilities are equal.
    """
    p, q = (torch.softmax(as_float(z) / temperature, -1).sort(-1, descending=True).values for z in (p_logits, q_logits))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(side, (0, width - side.shape[-1])) for side in (p, q))
    return (p - q).abs().sum(-1)


def moved_distribution_rows(teacher_logits: Tensor, static: Tensor, n_student: int, temperature: float) -> Tensor:
    """float32 `[r, n_student]`: q[u] = Σ_{v: static[v] = u} p[v], the teacher's probabilities on the student's tokens.

    `p` is softmax(teacher_logits / τ) over the tokens that map to something: q sums to 1 (FuseLLM, arXiv 2401.10491).

    Args:
        teacher_logits: `[r, V_T]`.
        static: int64 `[V_T]`, a student id or −1 for none; at least one is not −1.
        n_student: V_S.
        temperature: τ > 0.
    """
    mapped = as_float(teacher_logits).masked_fill(static < 0, -torch.inf)
    p = torch.softmax(mapped / temperature, dim=-1)
    return p.new_zeros(len(p), n_student).scatter_add_(1, static.clamp(min=0).expand_as(p), p)


# ---------------------------------------------------------------------------------------------- chosen columns only


def restricted_kl(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
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
    p = log_p.exp()
    terms = p * (log_p - log_q).masked_fill(p == 0, 0.0)  # as in `kl_rows`
    return temperature**2 * terms.masked_fill(~mask, 0.0).sum(-1)


def _masked_log_softmax(logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    scaled = as_float(logits) / temperature
    # The lowest finite number, not −inf: a row without columns must stay finite for its gradient to be 0.
    return torch.log_softmax(scaled.masked_fill(~mask, torch.finfo(scaled.dtype).min), dim=-1)
