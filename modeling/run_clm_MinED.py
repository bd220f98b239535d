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

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from get_vocab_mapper.vocab_mapper import VocabMapper, build_command, load_mapper
from modeling.alignment import alignment_counts, concatenate_groups, dtw_groups, one_to_one_rows
from modeling.arguments import (
    DataArguments,
    SoftDistillationArguments,
    StudentArguments,
    TrainingArguments,
    parse_arguments,
)
from modeling.distillation_trainer import DistillationTrainer
from modeling.divergences import cross_entropy_and, kl_to_target_rows, moved_distribution_rows
from modeling.errors import one_message, user_input
from modeling.examples import Encoder, Response, ResponseCollator
from modeling.experiment import load_data, load_student, load_teacher, look_at_models, run, start, teacher_signals


@dataclass
class MinEDArguments:
    """What is MinED's own."""

    metrics: ClassVar[tuple[str, ...]] = ("distilled", "one_to_one", "aligned")

    teacher_to_student_id_mapping: str = field(
        metadata={
            "help": "The mapper file of this pair, made by get_vocab_mapper/get_MinED_mapper.py, or a JSON file "
            "{teacher id: student id} as the published scripts have it (0 = unmapped). Required."
        }
    )


class MinEDTrainer(DistillationTrainer):
    """KL to the teacher's distribution moved by φ, or to the token itself.

    Args beyond those of `DistillationTrainer`:
        teacher_to_student: φ, integers [V_T], a student id or −1.
        kd_temperature: τ.
    """

    def __init__(self, *args, teacher_to_student: np.ndarray, kd_temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_to_student = torch.from_numpy(teacher_to_student).long().to(self.args.device)
        self.kd_temperature = kd_temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.student_logits(model, inputs)  # z^S [R_S, V_S]
        teacher = self.teacher_logits(inputs)  # z^T [R_T, V_T]
        labels, teacher_labels = self.response_labels(inputs), self.response_labels(inputs, "teacher_")  # [R_S], [R_T]

        responses = [response for response in inputs["responses"] if len(response.ends)]
        aligned = [align(response) for response in responses]  # step 1
        rows = torch.from_numpy(one_to_one_rows(concatenate_groups(aligned))).to(teacher.device)  # i of each j, or −1
        one_to_one, rows = rows >= 0, rows.clamp(min=0)
        distilled = one_to_one & (self.teacher_to_student[teacher_labels[rows]] == labels)  # [R_S]
        teacher = teacher.index_select(0, rows)  # [R_S, V_T]

        def divergence(student: Tensor, teacher: Tensor, labels: Tensor, distilled: Tensor) -> Tensor:
            moved = moved_distribution_rows(teacher, self.teacher_to_student, student.shape[-1], self.kd_temperature)
            one_hot = torch.zeros_like(moved).scatter_(1, labels[:, None], 1.0)
            target = torch.where(distilled[:, None], moved, one_hot)  # q, step 2
            return kl_to_target_rows(target, student, self.kd_temperature)

        ce, kd = cross_entropy_and(divergence, student, labels, teacher, labels, distilled)  # [R_S], [R_S]

        self.record("distilled", distilled.sum(), len(labels))
        ends = [(response.teacher_ends, response.ends) for response in responses]
        for name, count in alignment_counts(ends, aligned).items():
            self.record(name, count, len(labels))
        return self.step_loss(inputs, ce, kd, num_items_in_batch)


def align(r: Response) -> tuple[np.ndarray, np.ndarray]:
    """`(teacher_group, student_group)` of a response, every position weighing the same."""
    return dtw_groups(
        r.distance, r.teacher_index, r.student_index, np.ones_like(r.teacher_index), np.ones_like(r.student_index)
    )


def load_mined_mapper(path: str, teacher: Encoder, student: Encoder) -> VocabMapper:
    """The mapper of this pair. A file in the published layout does not say its kind, and is taken (with a warning).

    Raises ValueError for a mapper of another kind, and what `load_mapper` raises.
    """
    # Without the tables of similar tokens.
    mapper = load_mapper(path, teacher.forms, student.forms, threshold=0.0, kind="mined")
    if mapper.kind not in ("mined", "published"):
        raise ValueError(
            f"{path} is a mapper of the kind {mapper.kind!r}, and MinED needs one of the kind 'mined'. Build it: "
            f"{build_command('mined', 'NEW.safetensors', teacher.forms, student.forms)}"
        )
    return mapper


@one_message
def main() -> None:
    student_args, distillation_args, mined_args, data_args, training_args = parse_arguments(
        [StudentArguments, SoftDistillationArguments, MinEDArguments, DataArguments, TrainingArguments],
        description=__doc__,
    )
    start(training_args, data_args)
    models = {"model_name_or_path": student_args.model_name_or_path, "teacher_path": distillation_args.teacher_path}
    student_tokens, teacher_tokens = look_at_models(student_args, data_args.block_size, **models)
    with user_input("--teacher_to_student_id_mapping"):
        mapper = load_mined_mapper(mined_args.teacher_to_student_id_mapping, teacher_tokens, student_tokens)
    student = load_student(student_args)
    teacher = load_teacher(distillation_args, student_args, training_args)
    train, validation = load_data(data_args, training_args, [student.encoder, teacher.encoder])
    trainer = MinEDTrainer(
        model=student.model,
        teacher=teacher_signals(teacher, distillation_args, student_args, training_args, (train, validation)),
        teacher_to_student=mapper.teacher_to_student,
        kd_alpha=distillation_args.kd_alpha,
        kd_temperature=distillation_args.kd_temperature,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ResponseCollator(student.encoder, teacher.encoder, edit_distances=True),
        processing_class=student.tokenizer,
        n_student_tokens=student.n_tokens,
        n_teacher_tokens=teacher.n_tokens,
    )
    run(trainer)


if __name__ == "__main__":
    main()
