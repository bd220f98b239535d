"""GOLD: the extended and hybrid universal logit distance of TRL's General Online Logit Distillation trainer.

    L = α·CE + (1 − α)·KD,   KD = Σ_g |J_g| · KD_g / (response tokens of the optimizer step)
    KD_g = w·JSD_g + (1 − w)·L1_g,   w = |M| / |V_T|, or --matched_weight

1. Units.     The groups of the exact alignment by bytes, teacher positions I_g and student positions J_g, without the
              end of sequence.
2. Merging.   P_g = p_last · Π_{earlier} p[its token] on each side, p = softmax(z / τ): the distribution of the group's
              last row, times the probabilities of its tokens before. It is not renormalised.
3. Matched.   M are the pairs of tokens with equal bytes or equal roles. JSD_g is Σ over M of the generalised
              Jensen-Shannon divergence β·P^T·ln(P^T/m) + (1 − β)·P^S·ln(P^S/m), m = β·P^T + (1 − β)·P^S, of
              probabilities floored at 1e-8; β = --beta, where 0 is P^T·ln(P^T/P^S) and 1 is P^S·ln(P^S/P^T).
4. Unmatched. L1_g = Σ_k | sort↓(P^S_g)_k − sort↓(P^T_g)_k | over all other tokens, the shorter side padded with zeros.

`--hybrid false` matches no token: L1_g is over both whole vocabularies. Gradient flows through the student's whole P_g.

Logged beside the losses: jsd_loss and l1_loss (JSD and L1, unweighted, per response token), coverage (the share of
student tokens that are in units), one_to_one (student tokens in groups of one token a side).

TRL compares raw token strings where this compares bytes, and averages over groups, then over examples, where here a
group counts |J_g| of the step's response tokens. Step 2 is its merge strategy `bayesian`; its default, `observed`,
reads logits one position late, and is not offered.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.errors import one_message
from modeling.losses.divergences import jsd_terms, largest_and_rest, log_likelihood_rows, softmax_rows
from modeling.losses.logits import Logits, PickedRows
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.losses.shared_tokens import SharedTokens
from modeling.text.batch import Batch
from modeling.training.arguments import LikelihoodArguments, MapperArguments, check
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer

FLOOR = 1e-8


@dataclass
class GOLDDistillationArguments(LikelihoodArguments):
    """The temperature, which KD is not multiplied by."""

    kd_temperature: float = field(
        default=1.0, metadata={"help": "Both sides' logits are divided by it before the softmax. Above 0."}
    )


@dataclass
class GOLDArguments(MapperArguments):
    """What is GOLD's own."""

    metrics: ClassVar[tuple[str, ...]] = ("jsd_loss", "l1_loss", "coverage", "one_to_one")

    beta: float = field(
        default=0.5,
        metadata={
            "help": "Of the divergence of matched tokens: 0 is KL(teacher || student), 1 KL(student || teacher)."
        },
    )
    hybrid: bool = field(
        default=True, metadata={"help": "Compare matched tokens one by one; false: sorted probabilities alone."}
    )
    matched_weight: float | None = field(
        default=None,
        metadata={
            "help": "The weight of the matched tokens' divergence, 0 to 1; the rest is that of the sorted distance. By "
            "default the matched share of the teacher's vocabulary."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        weight, no_match = self.matched_weight, "leave it out with --hybrid false, which matches no token"
        check(0 <= self.beta <= 1, "beta", self.beta, "give a number from 0 to 1")
        within = weight is None or 0 <= weight <= 1
        check(within, "matched_weight", weight, "give a number from 0 to 1, or leave it out")
        defaults = {"beta": 0.5, "matched_weight": None, "teacher_to_student_id_mapping": None, "mapper_dir": None}
        for name, default in defaults.items():
            value = getattr(self, name)
            check(self.hybrid or value == default, name, value, no_match)


class Columns(NamedTuple):
    """The tokens of both vocabularies: matched ones, pair by pair, and the others of either side."""

    matched: SharedTokens
    others: SharedTokens

    @classmethod
    def of(cls, pairs: tuple[np.ndarray, np.ndarray], sizes: tuple[int, int], device: torch.device | str = "cpu"):
        """From the teacher ids and student ids of M, and the lengths of the two vocabularies."""
        others = tuple(np.setdiff1d(np.arange(size), ids) for size, ids in zip(sizes, pairs))
        return cls(SharedTokens.of(pairs, device), SharedTokens.of(others, device))


def gold_losses(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    columns: Columns,
    beta: float = 0.5,
    matched_weight: float | None = None,
    temperature: float = 1.0,
) -> Losses:
    """Divergence of matched and sorted distance of other probabilities, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `groups` of the exact alignment.
        columns: M, and all other tokens; M may be empty.
        beta: β, of 0 to 1.
        matched_weight: w, of 0 to 1; None for |M| / |V_T|.
        temperature: τ > 0.
    """
    groups = batch.groups
    weight = len(columns.matched) / teacher.shape[1] if matched_weight is None else matched_weight
    rows = StudentRows(student, batch.student.labels)
    sides = (groups.student, rows), (groups.teacher, StudentRows(teacher, batch.teacher.labels))
    log_earlier = []  # ln Π_{earlier} p[its token], of each side [G]
    for side, of_side in sides:
        if temperature == 1:
            log_p = -of_side.ce
        else:
            log_p = of_side.read(lambda z, label: log_likelihood_rows(z, label, temperature), of_side.labels)
        log_earlier.append(side.sums(log_p) - log_p[side.last_row])

    def distances(student: Tensor, teacher: Tensor, *log_earlier: Tensor) -> Tensor:
        merged = [softmax_rows(z, temperature) * log[:, None].exp() for z, log in zip((student, teacher), log_earlier)]
        return _distances(*merged, columns, beta)

    group = groups.student.group
    last = torch.full_like(group, -1).index_copy(0, groups.student.last_row, groups.teacher.last_row)
    constants = (log.detach()[group] for log in log_earlier)
    read = rows.read(distances, PickedRows(teacher, last), *constants, copies=6)[groups.student.last_row]
    # A row function's gradient is that of its own row alone: what the rows before the last one add goes through here.
    read = read[:, :2] + read[:, 2:].detach() * (log_earlier[0] - log_earlier[0].detach())[:, None]
    jsd, l1 = torch.where(groups.units[:, None], read, 0.0).unbind(1)
    size = groups.student.size
    means = {"coverage": ((groups.units * size).sum(), len(rows)), "one_to_one": (groups.one_to_one, len(rows))}
    parts = {"jsd_loss": (jsd * size).sum(), "l1_loss": (l1 * size).sum()}
    return Losses(rows.ce, weight * jsd + (1 - weight) * l1, size, parts, means)


def _distances(student: Tensor, teacher: Tensor, columns: Columns, beta: float) -> Tensor:
    """`[r, 4]`: JSD and L1 of P^S `[r, V_S]` and P^T `[r, V_T]`, and both's derivatives by the logarithm of a factor of
    P^S."""
    p = student.index_select(1, columns.matched.student).clamp(min=FLOOR)
    q = teacher.index_select(1, columns.matched.teacher).clamp_(min=FLOOR)
    with torch.no_grad():
        jsd, of_p = jsd_terms(p, p.log(), q, beta)
        by_p, by_factor = of_p / p, of_p.masked_fill_(p <= FLOOR, 0.0).sum(-1)
    linear = (p * by_p).sum(-1)  # it has the gradient of jsd
    jsd = linear - linear.detach() + jsd

    others = student.index_select(1, columns.others.student), teacher.index_select(1, columns.others.teacher)
    a, b, rest_a, rest_b = largest_and_rest(*others)
    sign = (a - b).sign()
    own = (a * sign).sum(-1) + rest_a
    l1 = own - (b * sign).sum(-1) + rest_b
    return torch.stack([jsd, l1, by_factor, own.detach()], dim=1)


class GOLDTrainer(DistillationTrainer):
    """Divergence of matched, sorted distance of other tokens.

    Args beyond those of `DistillationTrainer`:
        matched: M, teacher ids and student ids, integers `[n]` each.
        beta, matched_weight: as in `GOLDArguments`.
    """

    def __init__(self, *args, matched, beta: float = 0.5, matched_weight: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.columns = Columns.of(matched, (self.teacher_vocab_size, self.student_vocab_size), self.args.device)
        self.settings = {"beta": beta, "matched_weight": matched_weight}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = gold_losses(student, teacher, inputs, self.columns, temperature=self.kd_temperature, **self.settings)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=GOLDDistillationArguments, method=GOLDArguments)
    args, none = run.method, (np.zeros(0, dtype=np.int64),) * 2
    matched = run.shared_tokens(special=True) if args.hybrid else none
    run.train(GOLDTrainer, alignment="byte", matched=matched, beta=args.beta, matched_weight=args.matched_weight)


if __name__ == "__main__":
    main()
