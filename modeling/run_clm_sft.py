"""SFT: supervised fine-tuning on the responses. The baseline without a teacher, and how a teacher is fine-tuned first.

    L = CE = Σ_j −log softmax(z_j)[s_j] / (response tokens of the optimizer step)

with `z_j` the logits that predict response token `s_j`; prompt tokens are context only.
"""

from modeling.arguments import DataArguments, StudentArguments, TrainingArguments, parse_arguments
from modeling.distillation_trainer import ResponseTrainer
from modeling.divergences import cross_entropy
from modeling.errors import one_message
from modeling.examples import ResponseCollator
from modeling.experiment import load_data, load_student, look_at_models, run, start


class SFTTrainer(ResponseTrainer):
    """Cross-entropy of the response tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.student_logits(model, inputs)  # z [R, V]
        ce = cross_entropy(student, self.response_labels(inputs))  # [R]
        return self.step_loss(inputs, ce, num_items_in_batch)


@one_message
def main() -> None:
    student_args, data_args, training_args = parse_arguments(
        [StudentArguments, DataArguments, TrainingArguments], description=__doc__
    )
    start(training_args, data_args)
    look_at_models(student_args, data_args.block_size, model_name_or_path=student_args.model_name_or_path)
    student = load_student(student_args)
    train, validation = load_data(data_args, training_args, [student.encoder])
    trainer = SFTTrainer(
        model=student.model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ResponseCollator(student.encoder),
        processing_class=student.tokenizer,
        n_student_tokens=student.n_tokens,
    )
    run(trainer)


if __name__ == "__main__":
    main()
