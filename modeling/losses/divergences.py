"""Divergences between two sides' predictions, one value a row, in float32, as row functions for `StudentRows.read`.

A row function takes rows of logits, `[r, V]`, and gives `[r]`, each row from its own row only. Logits may be of any
floating dtype (float64 stays float64).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling.losses.logits import LEAST_LOGIT, as_float

FLOOR = 1e-12  # of a probability in a logarithm
LARGEST_RATIO = 1e30  # what stands for a log-ratio of +∞, times which a probability of 0 is 0


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
    return _KL.apply(p_logits, q_logits, temperature)


class _KL(torch.autograd.Function):
    """Written out: two float32 copies of the rows at a time, none kept, and half-precision logits read as they are."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        p_largest, q_largest = (as_float(z.amax(-1, keepdim=True)) for z in (p_logits, q_logits))
        log_q = _shifted(q_logits, q_largest, temperature)
        p = log_q.exp()
        q_total = p.sum(-1, keepdim=True)
        log_p = _shifted(p_logits, p_largest, temperature, out=p).clamp_(min=LEAST_LOGIT)
        log_ratio = torch.sub(log_p, log_q, out=log_q)
        p_total = p.exp_().sum(-1, keepdim=True)
        shift = p_total.log() - q_total.log()
        kl = _expected(p, log_ratio.sub_(shift))[:, None].div_(p_total)
        ctx.temperature = temperature
        ctx.save_for_backward(p_logits, q_logits, p_largest, q_largest, p_total, q_total, shift + kl)
        return kl.squeeze(1) * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        p_logits, q_logits, p_largest, q_largest, p_total, q_total, shift = ctx.saved_tensors
        scale = ctx.temperature * gradient[:, None]
        of_p = of_q = None
        if ctx.needs_input_grad[0]:  # τ² ∂KL/∂z^p = τ · p · (log p/q − KL)
            p = _shifted(p_logits, p_largest, ctx.temperature).clamp_(min=LEAST_LOGIT)
            of_p = _shifted(q_logits, q_largest, ctx.temperature)
            torch.sub(p, of_p, out=of_p).clamp_(max=LARGEST_RATIO).sub_(shift).mul_(p.exp_()).mul_(scale / p_total)
        if ctx.needs_input_grad[1]:  # τ² ∂KL/∂z^q = τ · (q − p)
            of_q = _shifted(q_logits, q_largest, ctx.temperature).exp_().mul_(scale / q_total)
            of_q.addcmul_(_shifted(p_logits, p_largest, ctx.temperature).exp_(), scale / p_total, value=-1)
        return of_p, of_q, None


def _shifted(logits: Tensor, largest: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """float `[r, V]`: (z − largest) / τ"""
    shifted = torch.sub(logits, largest, out=out)
    return shifted if temperature == 1 else shifted.mul_(1 / temperature)


def _expected(p: Tensor, log_ratio: Tensor) -> Tensor:
    """`[r]`: Σ p · log_ratio, in which tokens that p rules out add nothing, even at +∞. `log_ratio` is overwritten."""
    values = log_ratio.clamp_(max=LARGEST_RATIO).mul_(p).sum(-1)
    # Only a ratio of ∞ makes a sum so large.
    return values.masked_fill_(values > 1e9, torch.inf)


def jsd_to_target_rows(
    target: Tensor, logits: Tensor, columns: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """τ² · JSD_β(q ‖ p) of every row, p = softmax(logits / τ), over the tokens with q > 0 and one for the rest.

    JSD_β(q ‖ p) = β KL(q ‖ m) + (1 − β) KL(p ‖ m) with m = βq + (1 − β)p, the generalised Jensen-Shannon divergence
    (GKD, arXiv 2306.13649, equation 1). β = 0 is KL(q ‖ p), and β = 1 is KL(p ‖ q) with q floored at `FLOOR`.

    Args:
        target: float32 `[r, C + 1]`, q: probabilities of the tokens `columns`, and in the last column of the rest; a
            constant.
        logits: `[r, V]`. The rest's p is `FLOOR` at least.
        columns: int64 `[C]`. A token may stand there twice, where no row has a q > 0 in both places.
        beta: 0 to 1.
        temperature: τ > 0, of the logits; the target is taken as it is.

    Returns:
        float32 `[r]`, in nats.
    """
    return _JSDToTarget.apply(as_float(logits), target, columns, beta, temperature)


class _JSDToTarget(torch.autograd.Function):
    """Written out, as `_KL` is: of all that is a vocabulary wide there is one normaliser, and one gradient.

    With G = p · ∂JSD/∂p of each category, ∂JSD/∂z = (G − p ΣG) / τ; a token of the rest has its share of the rest's G.
    """

    @staticmethod
    def forward(ctx, logits, target, columns, beta, temperature):
        z, q, rest_q = _divided(logits, temperature), target[:, :-1], target[:, -1]
        largest, no_token = z.amax(-1), q <= 0
        exp = torch.sub(z, largest[:, None]).exp_()
        total = exp.sum(-1)
        normaliser = largest + total.log()
        log_p = z.index_select(1, columns).sub_(normaliser[:, None])
        p = log_p.exp().masked_fill_(no_token, 0.0)
        # 1 − Σp without its cancellation: a token's own power, taken from itself, is exactly 0.
        exp.index_add_(1, columns, exp.index_select(1, columns).masked_fill_(no_token, 0.0), alpha=-1)
        left = exp.sum(-1) / total
        rest_p = left.clamp(min=FLOOR)
        value, of_p = jsd_terms(p, log_p, q, beta)
        rest_value, of_rest = jsd_terms(*(x[:, None] for x in (rest_p, rest_p.log(), rest_q)), beta)
        if ctx.needs_input_grad[0]:
            of_rest = of_rest.squeeze(1) * (left > FLOOR)
            ctx.temperature = temperature
            ctx.save_for_backward(
                *(logits, columns, no_token, normaliser, of_rest / rest_p, of_p, of_p.sum(-1) + of_rest)
            )
        return (value + rest_value) * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logits, columns, no_token, normaliser, share, of_p, total = ctx.saved_tensors
        of_z = torch.sub(_divided(logits, ctx.temperature), normaliser[:, None]).exp_()
        p = of_z.index_select(1, columns).masked_fill_(no_token, 0.0)
        # The rest alone first: its share may be so large that what is added to it and taken away again is lost.
        of_z.index_add_(1, columns, p, alpha=-1).mul_((share - total)[:, None])
        of_z.index_add_(1, columns, torch.addcmul(of_p, p, total[:, None], value=-1))
        return of_z.mul_(ctx.temperature * gradient[:, None]), None, None, None, None


def jsd_terms(p: Tensor, log_p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`[r]`: Σ of JSD_β's terms over categories `[r, c]`; `[r, c]`: p times its derivative by p.

    The probabilities need not sum to 1. Where q is 0, p is too, and `log_p` may be anything.
    """
    tiny = torch.finfo(p.dtype).tiny
    log_p = log_p.clamp(min=math.log(tiny))  # a token that p rules out: 0 · −∞ is NaN
    if beta == 1:
        terms = (log_p - q.clamp(min=FLOOR).log_()).mul_(p)
        return terms.sum(-1), terms.add_(p)
    log_q = q.clamp(min=tiny).log_()
    if beta == 0:
        return log_q.sub_(log_p).mul_(q).sum(-1), -q
    log_m = torch.lerp(p, q, beta).clamp_(min=tiny).log_()
    of_p = log_p.sub_(log_m).mul_(p).mul_(1 - beta)
    return log_q.sub_(log_m).mul_(q).sum(-1).mul_(beta).add_(of_p.sum(-1)), of_p


def softmax_rows(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r, V]`: softmax(logits / τ)."""
    return torch.softmax(_divided(as_float(logits), temperature), dim=-1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def kl_to_target_rows(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: τ² · KL(target ‖ softmax(logits / τ)) of every row; entries of the target may be 0.

    Args:
        target: float32 `[r, V]`, probabilities, without gradient.
        logits: `[r, V]`.
        temperature: τ > 0, of the logits; the target is taken as it is.
    """
    return _KLToTarget.apply(target, logits, temperature)


class _KLToTarget(torch.autograd.Function):
    """Written out as `_KL` is."""

    @staticmethod
    def forward(ctx, target, logits, temperature):
        largest = as_float(logits.amax(-1, keepdim=True))
        log_q = _shifted(logits, largest, temperature)
        buffer = log_q.exp()
        total = buffer.sum(-1, keepdim=True)
        log_target = torch.clamp(target, min=torch.finfo(target.dtype).tiny, out=buffer).log_()
        kl = _expected(target, log_target.sub_(log_q).add_(total.log()))
        ctx.temperature = temperature
        ctx.save_for_backward(target, logits, largest, total)
        return kl * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        target, logits, largest, total = ctx.saved_tensors
        scale = ctx.temperature * gradient[:, None]
        of_logits = _shifted(logits, largest, ctx.temperature).exp_()  # τ² ∂KL/∂z = τ · (q · Σ target − target)
        of_logits.mul_(scale * target.sum(-1, keepdim=True) / total).addcmul_(target, scale, value=-1)
        return None, of_logits, None


def sorted_distance_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 `[r]`: Σ_k |sort↓(p)_k − sort↓(q)_k| of every row, p and q the softmax of logits / τ.

    The universal logit distance (ULD, arXiv 2402.12030, section 4): it compares how probability is spread, and
    not over which tokens, so the vocabularies `[r, V]` and `[r, V']` need nothing in common. The shorter one is padded
    with zeros. The gradient is a subgradient: 0 where two probabilities are equal.
    """
    p, q, rest_p, rest_q = largest_and_rest(*(softmax_rows(z, temperature) for z in (p_logits, q_logits)))
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
    mapped = as_float(teacher_logits.masked_fill(static < 0, -torch.inf))
    p = torch.softmax(mapped.div_(temperature), dim=-1)
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
