"""ULD: universal logit distillation, across tokenizers by sorted probabilities alone (arXiv 2402.12030).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = Σ_k | sort↓(p^S_j)_k − sort↓(p^T_j)_k |,   p_j = softmax(z_j / τ)

`z_j` are the logits that predict response token j of a side. Positions pair by index from the first response token,
j = 1 … min(N, M), and the shorter vocabulary is padded with zeros. A student token past the teacher's last one adds 0
and still counts. There is no alignment and no mapper: it is the baseline that shows what the two are worth.

The paper's CE + 1.5·ULD is `--kd_alpha 0.4`, up to a constant factor.

Logged beside the losses: paired (the share of student tokens that have a teacher's token at their index).
"""

from dataclasses import dataclass, field
from typing import ClassVar

from modeling.errors import one_message
from modeling.losses.divergences import sorted_distance_rows
from modeling.losses.logits import Logits, PickedRows
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch
from modeling.training.arguments import DistillationArguments
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer


@dataclass
class ULDArguments(DistillationArguments):
    metrics: ClassVar[tuple[str, ...]] = (*DistillationArguments.metrics, "paired")

    kd_temperature: float = field(
        default=1.0, metadata={"help": "Both sides' logits are divided by it before the softmax. Above 0."}
    )


def uld_losses(student: Logits, teacher: Logits, batch: Batch, temperature: float = 1.0) -> Losses:
    """Distance of sorted probabilities at every index that both sides have, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `index_rows`.
        temperature: τ > 0.
    """

    def distance(student, teacher, teacher_row):
        return (teacher_row >= 0) * sorted_distance_rows(student, teacher, temperature)

    rows = StudentRows(student, batch.student.labels)
    kd = rows.read(distance, PickedRows(teacher, batch.index_rows), batch.index_rows)  # [R_S]
    paired = sum(map(min, zip(batch.student.lengths, batch.teacher.lengths)))
    return Losses(rows.ce, kd, means={"paired": (paired, len(rows))})


class ULDTrainer(DistillationTrainer):
    """Distance of sorted probabilities."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = uld_losses(student, teacher, inputs, self.kd_temperature)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=ULDArguments)
    run.train(ULDTrainer, alignment="index")


if __name__ == "__main__":
    main()
