"""SimCT: distillation across tokenizers over shared tokens and the aligned spans themselves (arXiv 2605.07711).

    L = α·CE + (1 − α)·KD,   KD = Σ_g |J_g| · KD_g / (response tokens of the optimizer step)
    KD_g = τ² · KL(π^S_g ‖ π^T_g),   π = softmax(scores / τ) over the candidates of g

1. Units.      The groups of the exact alignment by bytes, teacher positions I_g and student positions J_g, without the
               end of sequence.
2. Candidates. V∩, the pairs of tokens with equal bytes, special ones left out; and, for a group that is not one token
               a side, the group itself.
3. Scores.     Of a shared token, log p[it] at the group's first row. Of the group itself, the mean of log p[own token]
               over its tokens, each at its own row. p = softmax(z), on each side. Gradient flows through π^S in both
               places, the rows of the whole group included.

Logged beside the losses: coverage (the share of student tokens that are in units), one_to_one (student tokens in groups
of one token a side), span_share and teacher_span_share (π of the group itself, mean over groups that have it).

This is the paper's definition. The published code takes raw logits for scores, and where the texts of two tokens do not
match, joins all up to the next equal token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modeling.errors import one_message
from modeling.losses.divergences import kl_rows
from modeling.losses.logits import Logits, PickedRows, as_float
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.losses.shared_tokens import SharedTokens
from modeling.text.alignment import GroupedSide
from modeling.text.batch import Batch
from modeling.training.arguments import LikelihoodArguments, MapperArguments
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer


@dataclass
class SimCTArguments(MapperArguments):
    """What is SimCT's own."""

    metrics: ClassVar[tuple[str, ...]] = ("coverage", "one_to_one", "span_share", "teacher_span_share")


def simct_losses(
    student: Logits, teacher: Logits, batch: Batch, shared: SharedTokens, temperature: float = 1.0
) -> Losses:
    """Reverse KL over shared tokens and the group itself, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `groups` of the exact alignment.
        shared: V∩, at least one pair.
        temperature: τ > 0.
    """
    groups = batch.groups
    rows, said = StudentRows(student, batch.student.labels), StudentRows(teacher, batch.teacher.labels)

    def over_shared(student: Tensor, teacher: Tensor, label: Tensor, teacher_label: Tensor) -> Tensor:
        sides = (student, label, shared.student), (as_float(teacher), teacher_label, shared.teacher)
        s, t = (z.index_select(1, ids) for z, _, ids in sides)
        own = (z.gather(1, ids[:, None]) for z, ids, _ in sides)  # what ln p is told from: small numbers stay exact
        sums = (((z - z_own) / temperature).logsumexp(-1) for z, z_own in zip((s, t), own))
        return torch.stack([kl_rows(s, t, temperature), *sums], dim=1)

    first = torch.full_like(groups.student.group, -1)
    first = first.index_copy(0, groups.student.first_row, groups.teacher.first_row)  # [R_S]: teacher rows
    labels = rows.labels, said.labels[first.clamp(min=0)]
    kl, *sums = rows.read(over_shared, PickedRows(teacher, first), *labels)[groups.student.first_row].unbind(1)
    # The candidates are V∩ as a whole and the group: KL(π^S ‖ π^T) is that between the two, plus that within V∩.
    (log_v, log_g), (teacher_log_v, teacher_log_g) = (
        _log_shares(*side, temperature) for side in ((rows, groups.student, sums[0]), (said, groups.teacher, sums[1]))
    )
    between = log_v.exp() * (log_v - teacher_log_v) + log_g.exp() * (log_g - teacher_log_g)
    kd = torch.where(groups.alone, kl, temperature**2 * between + log_v.exp() * kl)
    kd = torch.where(groups.units, kd, 0.0)

    size, spans = groups.student.size, groups.units & ~groups.alone
    means = {"coverage": ((groups.units * size).sum(), len(rows)), "one_to_one": (groups.one_to_one, len(rows))}
    for name, log_share in (("span_share", log_g), ("teacher_span_share", teacher_log_g)):
        means[name] = ((log_share.detach().exp() * spans).sum(), spans.sum())
    return Losses(rows.ce, kd, size, means=means)


def _log_shares(rows: StudentRows, side: GroupedSide, log_sum: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`[G]` each: ln of the share of V∩ as a whole, and of the group itself, in π.

    Args:
        rows: of a side.
        side: its tokens in the groups.
        log_sum: `[G]`, ln Σ over V∩ of exp((z − z[own token]) / τ) at each group's first row.
        temperature: τ.
    """
    log_v = log_sum - rows.ce[side.first_row] / temperature
    log_g = -side.sums(rows.ce) / side.size / temperature
    total = torch.logaddexp(log_v, log_g)
    return log_v - total, log_g - total


class SimCTTrainer(DistillationTrainer):
    """Reverse KL over shared tokens and spans.

    Args beyond those of `DistillationTrainer`:
        shared: V∩, teacher ids and student ids, integers `[n]` each.
    """

    def __init__(self, *args, shared, **kwargs):
        super().__init__(*args, **kwargs)
        self.shared = SharedTokens.of(shared, self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = simct_losses(student, teacher, inputs, self.shared, self.kd_temperature)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=LikelihoodArguments, method=SimCTArguments)
    run.train(SimCTTrainer, alignment="byte", shared=run.shared_tokens())


if __name__ == "__main__":
    main()
