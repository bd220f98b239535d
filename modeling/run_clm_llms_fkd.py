"""FKD: distillation by forward KL between models of one tokenizer (Hinton et al., arXiv 1503.02531).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = τ² · KL(p^T_j ‖ p^S_j),   p_j = softmax(z_j / τ)

`z_j` are the logits that predict response token j, over the tokens that the tokenizer has: two heads padded to
different widths compare as they are. Forward KL asks the student for probability wherever the teacher has some
(MiniLLM, arXiv 2306.08543, section 2).

Both models must have the same tokenizer: the same tokens under the same ids.
"""

from modeling.errors import one_message
from modeling.losses.divergences import kl_rows
from modeling.losses.logits import Logits
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch, require_same_tokens
from modeling.training.arguments import SoftDistillationArguments
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer


def fkd_losses(student: Logits, teacher: Logits, batch: Batch, temperature: float = 2.0) -> Losses:
    """Forward KL of every response token, and its cross-entropy.

    Args:
        student, teacher: z^S and z^T, `[R, V]` each, row by row of the same token. The teacher is a constant.
        batch: with these R response tokens.
        temperature: τ > 0.

    Raises:
        InputError: a response was split into other tokens on the two sides.
    """
    require_same_tokens(batch)
    rows = StudentRows(student, batch.student.labels)
    kd = rows.read(lambda student, teacher: kl_rows(teacher, student, temperature), teacher, copies=3)  # [R]
    return Losses(rows.ce, kd)


class FKDTrainer(DistillationTrainer):
    """Forward KL."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = fkd_losses(student, teacher, inputs, self.kd_temperature)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=SoftDistillationArguments)
    run.require_same_tokenizer()
    run.train(FKDTrainer)


if __name__ == "__main__":
    main()
