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

import torch
from torch import Tensor

from modeling.alignment import same_index_rows
from modeling.arguments import (
    DataArguments,
    DistillationArguments,
    StudentArguments,
    TrainingArguments,
    parse_arguments,
)
from modeling.distillation_trainer import DistillationTrainer
from modeling.divergences import cross_entropy_and, sorted_distance_rows
from modeling.errors import one_message
from modeling.examples import ResponseCollator
from modeling.experiment import load_data, load_student, load_teacher, look_at_models, run, start, teacher_signals


@dataclass
class ULDArguments(DistillationArguments):
    metrics: ClassVar[tuple[str, ...]] = (*DistillationArguments.metrics, "paired")

    kd_temperature: float = field(
        default=1.0, metadata={"help": "Both sides' logits are divided by it before the softmax. Above 0."}
    )


class ULDTrainer(DistillationTrainer):
    """Distance of sorted probabilities at every index that both sides have.

    Args beyond those of `DistillationTrainer`:
        kd_temperature: τ.
    """

    def __init__(self, *args, kd_temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.kd_temperature = kd_temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.student_logits(model, inputs)  # z^S [R_S, V_S]
        teacher = self.teacher_logits(inputs)  # z^T [R_T, V_T]

        lengths = [(len(r.teacher_ends), len(r.ends)) for r in inputs["responses"]]
        rows = torch.from_numpy(same_index_rows(lengths)).to(teacher.device)  # [R_S], −1 without a partner
        teacher = teacher.index_select(0, rows.clamp(min=0))  # [R_S, V_T]

        def divergence(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
            return (rows >= 0) * sorted_distance_rows(student, teacher, self.kd_temperature)

        ce, kd = cross_entropy_and(divergence, student, self.response_labels(inputs), teacher, rows)  # [R_S], [R_S]
        self.record("paired", sum(map(min, lengths)), len(rows))
        return self.step_loss(inputs, ce, kd, num_items_in_batch)


@one_message
def main() -> None:
    student_args, distillation_args, data_args, training_args = parse_arguments(
        [StudentArguments, ULDArguments, DataArguments, TrainingArguments], description=__doc__
    )
    start(training_args, data_args)
    models = {"model_name_or_path": student_args.model_name_or_path, "teacher_path": distillation_args.teacher_path}
    look_at_models(student_args, data_args.block_size, **models)
    student = load_student(student_args)
    teacher = load_teacher(distillation_args, student_args, training_args)
    train, validation = load_data(data_args, training_args, [student.encoder, teacher.encoder])
    trainer = ULDTrainer(
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
