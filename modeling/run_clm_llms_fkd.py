"""FKD: distillation by forward KL between models of one tokenizer (Hinton et al., arXiv 1503.02531).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = τ² · KL(p^T_j ‖ p^S_j),   p_j = softmax(z_j / τ)

`z_j` are the logits that predict response token j, over the tokens that the tokenizer has: two heads padded to
different widths compare as they are. Forward KL asks the student for probability wherever the teacher has some
(MiniLLM, arXiv 2306.08543, section 2).

Both models must have the same tokenizer: the same tokens under the same ids.
"""

from modeling.arguments import (
    DataArguments,
    SoftDistillationArguments,
    StudentArguments,
    TrainingArguments,
    parse_arguments,
)
from modeling.distillation_trainer import DistillationTrainer
from modeling.divergences import cross_entropy_and_kl
from modeling.errors import one_message, user_input
from modeling.examples import ResponseCollator, require_same_tokenizer, require_same_tokens
from modeling.experiment import load_data, load_student, load_teacher, look_at_models, run, start, teacher_signals


class FKDTrainer(DistillationTrainer):
    """Forward KL of every response token.

    Args beyond those of `DistillationTrainer`:
        kd_temperature: τ.
    """

    def __init__(self, *args, kd_temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.kd_temperature = kd_temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        require_same_tokens(inputs["responses"])
        student = self.student_logits(model, inputs)  # z^S [R, V]
        teacher = self.teacher_logits(inputs)  # z^T [R, V], row by row of the same token
        ce, kd = cross_entropy_and_kl(  # [R], [R]
            student, self.response_labels(inputs), teacher, self.kd_temperature
        )
        return self.step_loss(inputs, ce, kd, num_items_in_batch)


@one_message
def main() -> None:
    student_args, distillation_args, data_args, training_args = parse_arguments(
        [StudentArguments, SoftDistillationArguments, DataArguments, TrainingArguments], description=__doc__
    )
    start(training_args, data_args)
    models = {"model_name_or_path": student_args.model_name_or_path, "teacher_path": distillation_args.teacher_path}
    with user_input():
        require_same_tokenizer(*look_at_models(student_args, data_args.block_size, **models))
    student = load_student(student_args)
    teacher = load_teacher(distillation_args, student_args, training_args)
    train, validation = load_data(data_args, training_args, [student.encoder, teacher.encoder])
    trainer = FKDTrainer(
        model=student.model,
        teacher=teacher_signals(teacher, distillation_args, student_args, training_args, (train, validation)),
        kd_alpha=distillation_args.kd_alpha,
        kd_temperature=distillation_args.kd_temperature,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ResponseCollator(student.encoder, teacher.encoder),
        processing_class=student.tokenizer,
        n_student_tokens=student.n_tokens,
        n_teacher_tokens=teacher.n_tokens,
    )
    run(trainer)


if __name__ == "__main__":
    main()
