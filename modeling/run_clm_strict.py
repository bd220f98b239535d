"""Strict: distillation across tokenizers at the positions where both sides have one token for the same bytes, and
nowhere else (Hou et al., arXiv 2610.08448).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = τ² · KL(p̄^S_j ‖ p̄^T_i),   p̄ = softmax(z / τ) over the pairs of K_j

1. Units.     The exact alignment by bytes: student token s_j is a unit where its group is itself and one teacher token
              t_i. Special tokens are none.
2. Support.   V∩ are the pairs of tokens with equal bytes, special ones left out. K_j are those of V∩ whose student
              token is among the k = --topk most probable for the student (0: all of V∩).
3. Loss.      Reverse KL over K_j, renormalised on both sides; `--divergence` takes forward KL or the Jensen-Shannon
              divergence instead. Gradient flows through p̄^S in both places, and through no choice of K_j.

`--span_weight λ` adds, for every group g of more tokens, teacher positions I_g and student positions J_g, |J_g| times

    λ · (Σ_{j ∈ J_g} log p^S_j[s_j] − Σ_{i ∈ I_g} log p^T_i[t_i])²

at temperature 1. The paper finds that every λ > 0 hurts, which is its claim: here anybody can see.

Logged beside the losses: coverage and teacher_coverage (the share of either side's tokens that are units), and means
over units of shared_mass, teacher_shared_mass (the probability of V∩), topk_mass, teacher_topk_mass (that of K_j).

The paper averages over its units; here a unit counts one of the step's response tokens, as in all methods.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modeling.errors import one_message
from modeling.losses.divergences import jsd_rows, kl_rows
from modeling.losses.logits import Logits, PickedRows
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.losses.shared_tokens import SharedTokens, shared_topk
from modeling.text.batch import Batch
from modeling.training.arguments import LikelihoodArguments, MapperArguments, check
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer

Divergence = Literal["forward", "reverse", "jsd"]
DIVERGENCES = {
    "forward": lambda student, teacher, temperature: kl_rows(teacher, student, temperature),
    "reverse": kl_rows,
    "jsd": jsd_rows,
}


@dataclass
class StrictArguments(MapperArguments):
    """What is Strict's own."""

    metrics: ClassVar[tuple[str, ...]] = (
        *("coverage", "teacher_coverage", "shared_mass", "teacher_shared_mass", "topk_mass", "teacher_topk_mass"),
    )

    topk: int = field(
        default=16,
        metadata={
            "help": "How many of the student's most probable shared tokens a position compares. 1 or more; 0, or above "
            "the shared vocabulary: all of it."
        },
    )
    divergence: Divergence = field(
        default="reverse",
        metadata={"help": "reverse: KL(student || teacher), the paper's; forward: KL(teacher || student); jsd."},
    )
    span_weight: float = field(
        default=0.0,
        metadata={
            "help": "The weight of the squared difference of log-likelihoods, of groups of several tokens. 0, the "
            "paper's, or more."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check(self.topk >= 0, "topk", self.topk, "give 1 or more, or 0 for the whole shared vocabulary")
        check(0 <= self.span_weight < float("inf"), "span_weight", self.span_weight, "give a finite number, 0 or more")


def strict_losses(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    shared: SharedTokens,
    topk: int = 16,
    temperature: float = 1.0,
    divergence: Divergence = "reverse",
    span_weight: float = 0.0,
) -> Losses:
    """Divergence over shared tokens where one token a side stands for the same bytes, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `groups` of the exact alignment.
        shared: V∩, at least one pair.
        topk: k ≥ 0.
        temperature: τ > 0.
        divergence: of p̄^S and p̄^T.
        span_weight: λ ≥ 0.
    """
    groups, distance = batch.groups, DIVERGENCES[divergence]
    rows, said = StudentRows(student, batch.student.labels), StudentRows(teacher, batch.teacher.labels)
    teacher_row = torch.where(groups.units[groups.student.group], groups.one_to_one_rows(), -1)  # [R_S]: i of each j
    unit, at = teacher_row >= 0, teacher_row.clamp(min=0)
    shared_masses = rows.log_mass(shared.student).detach().exp(), said.log_mass(shared.teacher).exp()[at]

    if 0 < topk < len(shared):
        places = shared_topk(student, shared.student, topk)  # [R_S, k], of V∩
        # One teacher row more than there are takes what belongs to no unit.
        row_of_unit = torch.where(unit, teacher_row, len(said))
        columns = places.new_zeros(len(said) + 1, topk).index_copy_(0, row_of_unit, shared.teacher[places])[:-1]
        (z, masses), (teacher_z, teacher_masses) = (
            _columns_and_mass(*side) for side in ((rows, shared.student[places]), (said, columns))
        )
        kd = distance(z, teacher_z[at], temperature)
        masses = masses, teacher_masses[at]
    else:

        def over_all(student: Tensor, teacher: Tensor) -> Tensor:
            sides = student.index_select(1, shared.student), teacher.index_select(1, shared.teacher)
            return distance(*sides, temperature)

        kd, masses = rows.read(over_all, PickedRows(teacher, teacher_row)), shared_masses
    kd, covered = torch.where(unit, kd, 0.0), torch.ones_like(teacher_row)
    if span_weight:
        spans = groups.units & ~groups.alone
        difference = groups.teacher.sums(said.ce) - groups.student.sums(rows.ce)
        kd = torch.cat([kd, torch.where(spans, span_weight * difference**2, 0.0)])
        covered = torch.cat([covered, groups.student.size])

    n_units, names = unit.sum(), ("shared_mass", "teacher_shared_mass", "topk_mass", "teacher_topk_mass")
    means = {name: ((mass * unit).sum(), n_units) for name, mass in zip(names, (*shared_masses, *masses))}
    means |= {"coverage": (n_units, len(rows)), "teacher_coverage": (n_units, len(said))}
    return Losses(rows.ce, kd, covered, means=means)


def _columns_and_mass(rows: StudentRows, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at int64 `[R, k]` columns, and their probability, `[R]`, a constant."""
    z, label = rows.columns(torch.cat([ids, rows.labels[:, None]], dim=1)).split([ids.shape[1], 1], dim=1)
    log_p = z - label - rows.ce[:, None]
    return z, log_p.detach().exp().sum(1)


class StrictTrainer(DistillationTrainer):
    """Divergence at one-to-one positions.

    Args beyond those of `DistillationTrainer`:
        shared: V∩, teacher ids and student ids, integers `[n]` each.
        topk, divergence, span_weight: as in `StrictArguments`.
    """

    def __init__(
        self, *args, shared, topk: int = 16, divergence: Divergence = "reverse", span_weight: float = 0.0, **kw
    ):
        super().__init__(*args, **kw)
        self.shared = SharedTokens.of(shared, self.args.device)
        self.settings = {"topk": topk, "divergence": divergence, "span_weight": span_weight}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = strict_losses(student, teacher, inputs, self.shared, temperature=self.kd_temperature, **self.settings)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=LikelihoodArguments, method=StrictArguments)
    args = run.method
    settings = {"topk": args.topk, "divergence": args.divergence, "span_weight": args.span_weight}
    run.train(StrictTrainer, alignment="byte", shared=run.shared_tokens(), **settings)


if __name__ == "__main__":
    main()
