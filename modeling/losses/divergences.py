"""Divergences between two sides' predictions, one value a row, in float32, as row functions for `StudentRows.read`.

A row function takes rows of logits, `[r, V]`, and gives `[r]`, each row from its own row only. Logits may be of any
floating dtype (float64 stays float64).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling.losses.logits import as_float


def kl_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(p ‖ q) of every row, with p = softmax(p_logits / τ) and q likewise.

    Forward KL gives the teacher first, reverse KL the student first (MiniLLM, arXiv 2306.08543). The gradient flows
    into both arguments; τ² keeps its scale the same at every temperature (Hinton et al., 1503.02531).

    Args:
        p_logits, q_logits: `[r, V]`, of equal shape. A logit of −∞ is a token that its side rules out.
        temperature: τ > 0.

    Returns:
        float32 `[r]`, in nats.

    Raises:
        ValueError: the shapes differ.
    """
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"kl_rows needs logits of one shape, got {tuple(p_logits.shape)} and {tuple(q_logits.shape)}")
    return _KL.apply(as_float(p_logits), as_float(q_logits), temperature)


class _KL(torch.autograd.Function):
    """Written out for the memory and time of a CPU: autograd would keep, and make, twice as many copies of the rows."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        log_p, log_q = (torch.log_softmax(_divided(z, temperature), dim=-1) for z in (p_logits, q_logits))
        p = log_p.exp()
        log_ratio = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)  # a token that p rules out adds nothing; 0 · ∞ is NaN
        kl = torch.linalg.vecdot(p, log_ratio)
        ctx.temperature = temperature
        ctx.save_for_backward(p, log_q, log_ratio, kl)
        return kl * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        p, log_q, log_ratio, kl = ctx.saved_tensors
        scale = ctx.temperature * gradient[:, None]
        of_p = of_q = None
        if ctx.needs_input_grad[0]:  # τ² ∂KL/∂z^p = τ · p · (log p/q − KL)
            of_p = (log_ratio - kl[:, None]).mul_(p).mul_(scale)
        if ctx.needs_input_grad[1]:  # τ² ∂KL/∂z^q = τ · (q − p)
            of_q = log_q.exp().sub_(p).mul_(scale)
        return of_p, of_q, None


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def kl_to_target_rows(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: τ² · KL(target ‖ softmax(logits / τ)) of every row; entries of the target may be 0.

    Args:
        target: float32 `[r, V]`, probabilities, without gradient.
        logits: `[r, V]`.
        temperature: τ > 0, of the logits; the target is taken as it is.
    """
    log_q = torch.log_softmax(_divided(as_float(logits), temperature), dim=-1)
    return temperature**2 * (torch.xlogy(target, target) - target * log_q.masked_fill(target == 0, 0.0)).sum(-1)


def sorted_distance_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: Σ_k |sort↓(p)_k − sort↓(q)_k| of every row, p and q the softmax of logits / τ.

    The universal logit distance (ULD, arXiv 2402.12030, section 4): it compares how probability is spread, and
    not over which tokens, so the vocabularies `[r, V]` and `[r, V']` need nothing in common. The shorter one is padded
    with zeros. The gradient is a subgradient: 0 where two probabilities are equal.
    """
    p, q, rest_p, rest_q = largest_and_rest(
        *(torch.softmax(as_float(z) / temperature, -1) for z in (p_logits, q_logits))
    )
    return (p - q).abs().sum(-1) + rest_p + rest_q


def largest_and_rest(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sort↓(p), sort↓(q)` to the length c of the shorter, and the sums of what each side has beyond it: all that a
    distance of sorted numbers ≥ 0 needs, where the shorter side is padded with zeros.

    Args:
        p, q: `[r, V]` and `[r, V']`.

    Returns:
        `[r, c]` twice and `[r]` twice.
    """
    c = min(p.shape[-1], q.shape[-1])
    largest = [side.topk(c, dim=-1).values for side in (p, q)]
    rests = [
        side.sum(-1) - top.sum(-1) if side.shape[-1] > c else side.new_zeros(len(side))
        for side, top in zip((p, q), largest)
    ]
    return *largest, *rests


def jsd_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: τ² · (KL(p ‖ m) + KL(q ‖ m)) / 2, m = (p + q) / 2, of every row; p, q as in `kl_rows`."""
    log_p, log_q = (torch.log_softmax(_divided(as_float(z), temperature), dim=-1) for z in (p_logits, q_logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = (
        torch.linalg.vecdot(log.exp(), (log - log_m).masked_fill(log == -torch.inf, 0.0)) for log in (log_p, log_q)
    )
    return temperature**2 / 2 * sum(halves)


def log_likelihood_rows(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """float32 `[r]`: log softmax(logits / τ)[label] of every row."""
    return torch.log_softmax(_divided(as_float(logits), temperature), dim=-1).gather(1, labels[:, None]).squeeze(1)


def moved_distribution_rows(teacher_logits: Tensor, static: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """float32 `[r, vocab_size]`: q[u] = Σ_{v: static[v] = u} p[v], the teacher's probabilities on the student's tokens.

    `p` is softmax(teacher_logits / τ) over the tokens that map to something: q sums to 1 (FuseLLM, arXiv 2401.10491).

    Args:
        teacher_logits: `[r, V_T]`.
        static: int64 `[V_T]`, a student id or −1 for none; at least one is not −1.
        vocab_size: V_S.
        temperature: τ > 0.
    """
    mapped = as_float(teacher_logits).masked_fill(static < 0, -torch.inf)
    p = torch.softmax(mapped / temperature, dim=-1)
    return p.new_zeros(len(p), vocab_size).scatter_add_(1, static.clamp(min=0).expand_as(p), p)


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
    p, q = (_divided(as_float(z), temperature) for z in (teacher_logits.detach(), student_logits))
    # The lowest finite number, not −inf: a row without columns is then uniform on both sides, and its KL exactly 0.
    p, q = (z.masked_fill(~mask, torch.finfo(z.dtype).min) for z in (p, q))
    return temperature**2 * kl_rows(p, q)
