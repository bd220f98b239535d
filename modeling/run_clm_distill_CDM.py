"""CDM: contextual dynamical mapping, distillation across tokenizers (arXiv 2502.11104, Findings of ACL 2025).

    L = α·CE + (1 − α)·KD,   KD = Σ_g |J_g| · KD_g / (response tokens of the optimizer step)

1. Weights.   Each position costs w = ⌊3·σ(4h − 2) + 3⌋ to misalign, h the entropy of its prediction, scaled to [0, 1]
              within the response: uncertain positions cost more.
2. Alignment. Dynamic time warping between teacher tokens i and student tokens j with the cost
              lev(a_i, b_j) · w_i · w_j, a and b the tokens' texts without spaces.
3. Groups.    The path cut at its diagonal moves: group g pairs teacher positions I_g with student positions J_g, and
              its logits z_g are their means.
4. Mapping.   Each of the teacher's top k tokens in g maps to its exact match, or else to the nearest string among the
              student's top k; the pairs found are P_→(g). The same from student to teacher gives P_←(g).
5. Loss.      KD_g = τ²/2 · Σ_{d ∈ {→, ←}} KL(softmax(z^T_g[v]/τ) ‖ softmax(z^S_g[u]/τ)) over the pairs (v, u) of P_d.
              Gradient flows through the student's logits here, and through nothing that steps 1 to 4 chose.

`--alignment byte` puts the exact alignment in the place of steps 1 and 2: a group ends wherever both sides end a
token at the same byte of the response.

With `--same_tokenizer_teacher_path` a second teacher, which shares the student's tokenizer, teaches beside the first:

    KD = β·KD_CDM + (1 − β)·KD_FKD,   KD_FKD = Σ_j τ² KL(softmax(z^T'_j/τ) ‖ softmax(z^S_j/τ)) / (response tokens)

with β = --cross_weight and z^T' that teacher's logits; both parts are logged, as kd_cdm_loss and kd_fkd_loss.

Logged beside the losses: mapped_rate (pairs found of 2k, mean over groups), teacher_mass (the share of the teacher's
probability that P_→ covers), one_to_one (student tokens in groups of one token a side), aligned (student tokens whose
group covers the same bytes on both sides).
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from get_vocab_mapper.vocab_mapper import VocabMapper, load_mapper
from modeling.alignment import (
    alignment_counts,
    byte_groups,
    concatenate_groups,
    dtw_groups,
    entropy,
    entropy_and_logsumexp,
    entropy_weights,
)
from modeling.arguments import (
    DataArguments,
    DistillationArguments,
    StudentArguments,
    TrainingArguments,
    check,
    parse_arguments,
)
from modeling.contextual_mapping import contextual_kl, direction_maps
from modeling.distillation_trainer import DistillationTrainer
from modeling.divergences import Logits, kl_divergence
from modeling.errors import one_message, user_input
from modeling.examples import Response, ResponseCollator, require_same_tokenizer
from modeling.experiment import load_data, load_student, load_teacher, look_at_models, run, start, teacher_signals
from modeling.teachers import Teacher

logger = logging.getLogger(__name__)


@dataclass
class CDMArguments:
    """What is CDM's own."""

    teacher_to_student_id_mapping: str = field(
        metadata={
            "help": "The mapper file of this pair, made by get_vocab_mapper/get_em_mapper.py (or the MinED or prefixEM "
            "one), or a JSON file {teacher id: student id} as the published scripts have it. Required."
        }
    )
    topk: int = field(
        default=100,
        metadata={
            "help": "How many of each side's most probable tokens a group maps. 1 or more; above the smaller "
            "vocabulary, all of it."
        },
    )
    simi_threshold: float = field(
        default=0.3,
        metadata={
            "help": "Strings nearer than this (Levenshtein distance over the sum of lengths) count as similar. Above "
            "0, and no more than the mapper was built with.",
            "aliases": ["--simi_threadshold"],
        },
    )
    alignment: Literal["dtw", "byte"] = field(
        default="dtw",
        metadata={"help": "dtw: entropy-weighted dynamic time warping, the paper's. byte: exact, by byte positions."},
    )
    same_tokenizer_teacher_path: str | None = field(
        default=None,
        metadata={"help": "A second teacher with the student's tokenizer: a hub name or a folder. By default none."},
    )
    cross_weight: float = field(
        default=0.5,
        metadata={"help": "With a second teacher: KD = cross_weight * KD_CDM + (1 - cross_weight) * KD_FKD. 0 to 1."},
    )

    def __post_init__(self):
        check(self.topk >= 1, "topk", self.topk, "give 1 or more")
        check(0 < self.simi_threshold <= 1, "simi_threshold", self.simi_threshold, "give a number above 0, at most 1")
        check(0 <= self.cross_weight <= 1, "cross_weight", self.cross_weight, "give a number from 0 to 1")
        check(
            self.cross_weight == 0.5 or self.same_tokenizer_teacher_path is not None,
            *("cross_weight", self.cross_weight, "give --same_tokenizer_teacher_path too, to have two KDs to weigh"),
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation gives besides those of all methods."""
        of_two = ("kd_cdm_loss", "kd_fkd_loss") if self.same_tokenizer_teacher_path is not None else ()
        return (*of_two, "mapped_rate", "teacher_mass", "one_to_one", "aligned")


class CDMTrainer(DistillationTrainer):
    """CDM over the groups of every response.

    Args beyond those of `DistillationTrainer`:
        mapper: of this pair of tokenizers.
        topk, kd_temperature, alignment, cross_weight: as in `CDMArguments` and `DistillationArguments`.
        same_tokenizer_teacher: the second teacher, where there is one, which is fed the student's tokens.
    """

    def __init__(
        self,
        *args,
        mapper: VocabMapper,
        topk: int,
        kd_temperature: float,
        alignment: str,
        cross_weight: float = 0.5,
        same_tokenizer_teacher: Teacher | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher_to_student, self.student_to_teacher = direction_maps(mapper)
        self.topk = topk
        self.kd_temperature = kd_temperature
        self.alignment = alignment
        self.cross_weight = cross_weight
        self.same_tokenizer_teacher = same_tokenizer_teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.student_logits(model, inputs)  # z^S [R_S, V_S]
        teacher = self.teacher_logits(inputs)  # z^T [R_T, V_T]
        responses = [response for response in inputs["responses"] if len(response.ends)]

        aligned, logsumexp = self.align(student, teacher, responses)  # steps 1 to 3
        groups = concatenate_groups(aligned)
        cdm = contextual_kl(  # steps 4 and 5
            student,
            teacher,
            groups,
            self.teacher_to_student,
            self.student_to_teacher,
            self.topk,
            self.kd_temperature,
            self.response_labels(inputs),
            logsumexp,
        )
        kd = cdm.kd * torch.from_numpy(groups.student_size).to(cdm.kd.device)  # [G]: KD_g counts |J_g| tokens
        parts = {}
        if self.same_tokenizer_teacher is not None:
            same = self.logits_of(self.same_tokenizer_teacher, inputs, self.n_student_tokens)  # z^T' [R_S, V_S]
            fkd = kl_divergence(same, student, self.kd_temperature)  # [R_S]
            parts = {"kd_cdm_loss": kd, "kd_fkd_loss": fkd}
            kd = torch.cat([self.cross_weight * kd, (1 - self.cross_weight) * fkd])

        self.record("mapped_rate", cdm.mapped_rate.sum(), len(groups))
        self.record("teacher_mass", cdm.teacher_mass.sum(), len(groups))
        ends = [(response.teacher_ends, response.ends) for response in responses]
        for name, count in alignment_counts(ends, aligned).items():
            self.record(name, count, len(student))
        return self.step_loss(inputs, cdm.ce, kd, num_items_in_batch, **parts)

    def align(
        self, student: Logits, teacher: Logits, responses: list[Response]
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], Tensor | None]:
        """`(teacher_group, student_group)` of each response; and ln Σ exp of each row of the student's, if at hand."""
        if self.alignment == "byte":
            return [byte_groups(r.teacher_ends, r.ends) for r in responses], None
        teacher_lengths, student_lengths = [len(r.teacher_ends) for r in responses], [len(r.ends) for r in responses]
        student_entropy, logsumexp = entropy_and_logsumexp(student)
        weights = torch.cat(
            [
                entropy_weights(entropy(teacher), teacher_lengths),
                entropy_weights(student_entropy, student_lengths),
            ]
        ).cpu()  # one copy to the host for both sides
        weights = [part.numpy() for part in weights.split(teacher_lengths + student_lengths)]
        groups = [
            dtw_groups(r.distance, r.teacher_index, r.student_index, teacher_weights, student_weights)
            for r, teacher_weights, student_weights in zip(responses, weights, weights[len(responses) :])
        ]
        return groups, logsumexp


@one_message
def main() -> None:
    student_args, distillation_args, cdm_args, data_args, training_args = parse_arguments(
        [StudentArguments, DistillationArguments, CDMArguments, DataArguments, TrainingArguments], description=__doc__
    )
    start(training_args, data_args)
    models = {"model_name_or_path": student_args.model_name_or_path, "teacher_path": distillation_args.teacher_path}
    second_path = cdm_args.same_tokenizer_teacher_path
    student_tokens, teacher_tokens, *second_tokens = look_at_models(
        student_args, data_args.block_size, **models, same_tokenizer_teacher_path=second_path
    )
    for tokens in second_tokens:
        with user_input(f"--same_tokenizer_teacher_path {second_path}"):
            require_same_tokenizer(student_tokens, tokens)
    with user_input("--teacher_to_student_id_mapping"):
        mapper = load_mapper(
            cdm_args.teacher_to_student_id_mapping, teacher_tokens.forms, student_tokens.forms, cdm_args.simi_threshold
        )
    smaller = min(len(teacher_tokens.forms), len(student_tokens.forms))
    if cdm_args.topk > smaller and training_args.should_log:
        logger.warning("--topk is %d, and the smaller vocabulary has %d tokens: all are taken.", cdm_args.topk, smaller)
    student = load_student(student_args)
    teacher = load_teacher(distillation_args, student_args, training_args)
    second = None
    if cdm_args.same_tokenizer_teacher_path is not None:
        path = cdm_args.same_tokenizer_teacher_path
        second = load_teacher(distillation_args, student_args, training_args, path, "same_tokenizer_teacher_path")
    train, validation = load_data(data_args, training_args, [student.encoder, teacher.encoder])
    signals = teacher_signals(teacher, distillation_args, student_args, training_args, (train, validation))
    if second is not None:
        second = teacher_signals(
            *(second, distillation_args, student_args, training_args, (train, validation)),
            *(path, "same_tokenizer_teacher_path"),
            side="",
        )
    trainer = CDMTrainer(
        model=student.model,
        teacher=signals,
        same_tokenizer_teacher=second,
        cross_weight=cdm_args.cross_weight,
        mapper=mapper,
        topk=cdm_args.topk,
        alignment=cdm_args.alignment,
        kd_alpha=distillation_args.kd_alpha,
        kd_temperature=distillation_args.kd_temperature,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ResponseCollator(student.encoder, teacher.encoder, edit_distances=cdm_args.alignment == "dtw"),
        processing_class=student.tokenizer,
        n_student_tokens=student.n_tokens,
        n_teacher_tokens=teacher.n_tokens,
    )
    run(trainer)


if __name__ == "__main__":
    main()
