"""MinED: distillation across tokenizers by a static mapper of minimum edit distance (FuseLLM, arXiv 2401.10491).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = τ² · KL(q_j ‖ p^S_j),   p_j = softmax(z_j / τ)

1. Alignment. Dynamic time warping between teacher tokens t_i and student tokens s_j by the edit distance of their
              texts without spaces; the path cut at its diagonal moves gives groups.
2. Target.    φ sends each teacher token to a student token. Where s_j is alone in its group with a teacher token t_i,
              and φ(t_i) = s_j, the target is the teacher's distribution on the student's vocabulary,
              q_j[u] = Σ_{v: φ(v) = u} p^T_i[v]. Everywhere else it is one-hot on s_j, the token to be predicted.

`z_j` are the logits that predict response token j of a side. p^T is taken over the teacher's tokens that φ maps (all
but some special ones), so that q_j sums to 1.

Logged beside the losses: distilled (the share of student tokens with a teacher's target), one_to_one (student tokens
in groups of one token a side), aligned (student tokens whose group covers the same bytes on both sides).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modeling.errors import one_message
from modeling.losses.divergences import kl_to_target_rows, moved_distribution_rows
from modeling.losses.logits import Logits, PickedRows
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch
from modeling.training.arguments import MapperArguments, SoftDistillationArguments
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer


@dataclass
class MinEDArguments(MapperArguments):
    """What is MinED's own."""

    metrics: ClassVar[tuple[str, ...]] = ("distilled", "one_to_one", "aligned")


def mined_losses(student: Logits, teacher: Logits, batch: Batch, static: Tensor, temperature: float = 2.0) -> Losses:
    """KL to the teacher's distribution moved by φ, or to the token itself, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `groups` of dynamic time warping with equal weights (step 1).
        static: φ, int64 `[V_T]`, a student id or −1.
        temperature: τ > 0.
    """
    labels, groups = batch.student.labels, batch.groups
    teacher_row = groups.one_to_one_rows()  # [R_S]: i of each j, or −1
    said = static[batch.teacher.labels[teacher_row.clamp(min=0)]]  # φ(t_i)
    distilled = (teacher_row >= 0) & (said == labels)  # [R_S]

    def divergence(student: Tensor, teacher: Tensor, labels: Tensor, distilled: Tensor) -> Tensor:
        distilled = distilled[:, None].to(student.dtype)
        moved = moved_distribution_rows(teacher, static, student.shape[-1], temperature)
        target = moved.mul_(distilled).scatter_add_(1, labels[:, None], 1 - distilled)  # q, step 2
        return kl_to_target_rows(target, student, temperature)

    rows = StudentRows(student, labels)
    kd = rows.read(divergence, PickedRows(teacher, teacher_row), labels, distilled)  # [R_S]
    counts = {"distilled": distilled.sum(), "one_to_one": groups.one_to_one, "aligned": groups.aligned}
    return Losses(rows.ce, kd, means={name: (count, len(rows)) for name, count in counts.items()})


class MinEDTrainer(DistillationTrainer):
    """KL to the moved distribution.

    Args beyond those of `DistillationTrainer`:
        static: φ, integers `[V_T]`, a student id or −1.
    """

    def __init__(self, *args, static, **kwargs):
        super().__init__(*args, **kwargs)
        self.static = torch.as_tensor(static).long().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = mined_losses(student, teacher, inputs, self.static, self.kd_temperature)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=SoftDistillationArguments, method=MinEDArguments)
    mapper = run.mapper("mined", threshold=0.0)  # without the tables of similar tokens
    run.train(MinEDTrainer, alignment="dtw", static=mapper.to_student.static)


if __name__ == "__main__":
    main()
