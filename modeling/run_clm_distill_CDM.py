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

import torch
from torch import Tensor

from get_vocab_mapper.mapper import VocabMapper
from modeling.errors import one_message
from modeling.losses.alignment import entropy_dtw
from modeling.losses.divergences import kl_rows
from modeling.losses.logits import Logits, entropy
from modeling.losses.mapping import contextual_kl
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.models.teachers import Teacher
from modeling.text.batch import Batch
from modeling.training.arguments import MapperArguments, check
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass
class CDMArguments(MapperArguments):
    """What is CDM's own."""

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
        super().__post_init__()
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


def cdm_losses(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    mapper: VocabMapper,
    topk: int = 100,
    temperature: float = 1.0,
    same_tokenizer_teacher: Logits | None = None,
    cross_weight: float = 0.5,
) -> Losses:
    """CDM over the aligned groups of every response, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens; with `groups` where the alignment needs the text alone, else with
            `token_distances`.
        mapper: of the two vocabularies.
        topk: k ≥ 1.
        temperature: τ > 0.
        same_tokenizer_teacher: z^T' `[R_S, V_S]`, the second teacher's logits, where there is one.
        cross_weight: β, of 0 to 1.
    """
    rows, groups = StudentRows(student, batch.student.labels), batch.groups
    if groups is None:
        groups = entropy_dtw(rows.entropy(), entropy(teacher), batch)  # steps 1 to 3
    cdm = contextual_kl(rows, teacher, groups, mapper, topk, temperature)  # [G], steps 4 and 5
    kd, covered, parts = cdm.kd, groups.student.size, {}  # KD_g counts |J_g| tokens
    if same_tokenizer_teacher is not None:

        def forward_kl(student: Tensor, second: Tensor) -> Tensor:
            return kl_rows(second, student, temperature)

        fkd = rows.read(forward_kl, same_tokenizer_teacher, copies=3)  # [R_S]
        parts = {"kd_cdm_loss": (kd * covered).sum(), "kd_fkd_loss": fkd.sum()}
        kd = torch.cat([cross_weight * kd, (1 - cross_weight) * fkd])
        covered = torch.cat([covered, torch.ones_like(batch.student.labels)])
    means = {
        "mapped_rate": (cdm.mapped_rate.sum(), len(groups)),
        "teacher_mass": (cdm.teacher_mass.sum(), len(groups)),
        "one_to_one": (groups.one_to_one, len(rows)),
        "aligned": (groups.aligned, len(rows)),
    }
    return Losses(rows.ce, kd, covered, parts, means)


class CDMTrainer(DistillationTrainer):
    """CDM.

    Args beyond those of `DistillationTrainer`:
        mapper: of this pair of tokenizers.
        topk, cross_weight: as in `CDMArguments`.
        same_tokenizer_teacher: the second teacher, where there is one, which is fed the student's tokens.
    """

    def __init__(
        self,
        *args,
        mapper: VocabMapper,
        topk: int,
        cross_weight: float = 0.5,
        same_tokenizer_teacher: Teacher | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.mapper, self.topk = mapper, topk
        self.same_tokenizer_teacher, self.cross_weight = same_tokenizer_teacher, cross_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher, second = self.student_logits(model, inputs), self.teacher_logits(inputs), None
        if self.same_tokenizer_teacher is not None:
            second = self.logits_of(self.same_tokenizer_teacher, inputs.student, self.student_vocab_size, inputs.rows)
        losses = cdm_losses(
            *(student, teacher, inputs, self.mapper, self.topk, self.kd_temperature),
            same_tokenizer_teacher=second,
            cross_weight=self.cross_weight,
        )
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, method=CDMArguments)
    args, second = run.method, run.second_teacher("same_tokenizer_teacher_path")
    mapper = run.mapper("em", args.simi_threshold, any_kind=True)
    smaller = min(mapper.teacher.vocab_size, mapper.student.vocab_size)
    if args.topk > smaller and run.training.should_log:
        logger.warning("--topk is %d, and the smaller vocabulary has %d tokens: all are taken.", args.topk, smaller)
    run.train(
        CDMTrainer,
        alignment="byte" if args.alignment == "byte" else "entropy_dtw",
        mapper=mapper,
        topk=args.topk,
        same_tokenizer_teacher=second,
        cross_weight=args.cross_weight,
    )


if __name__ == "__main__":
    main()
