"""SFT: supervised fine-tuning on the responses. The baseline without a teacher, and how a teacher is fine-tuned first.

    L = CE = Σ_j −log softmax(z_j)[s_j] / (response tokens of the optimizer step)

with `z_j` the logits that predict response token `s_j`; prompt tokens are context only.
"""

from modeling.errors import one_message
from modeling.losses.logits import Logits
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch
from modeling.training.run import Run
from modeling.training.trainer import ResponseTrainer


def sft_losses(student: Logits, batch: Batch) -> Losses:
    """The cross-entropy of the response tokens.

    Args:
        student: z, `[R, V]`.
        batch: with these R response tokens.
    """
    return Losses(StudentRows(student, batch.student.labels).ce)


class SFTTrainer(ResponseTrainer):
    """Plain fine-tuning."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.weigh(sft_losses(self.student_logits(model, inputs), inputs), inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=None)
    run.train(SFTTrainer)


if __name__ == "__main__":
    main()
