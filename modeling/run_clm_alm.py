"""ALM: approximate likelihood matching, of chunks of text that both tokenizers end alike (arXiv 2503.20083).

    L = α·CE + (1 − α)·KD,   KD = Σ_c |J_c| · KD_c / (response tokens of the optimizer step)
    KD_c = e^u·(u − v) + (1 − e^u)·(ln(1 − e^u) − ln(1 − e^v)),   u = ℓ^T_c/τ_b − 1e-6,   v = ℓ^S_c/τ_b − 1e-6

1. Units.       The groups of the exact alignment by bytes, without the end of sequence: ℓ_g = Σ log p[own token] over
                the group's tokens, on each side.
2. Boundaries.  With `--debias space`, o_g = ln Σ p[v] over the tokens v that begin with white space or end the
                sequence, at the row after the group: the probability that the text may be cut there. A group is joined
                with the following units, to a chunk c, until the teacher's e^{o_g} is above --space_threshold; then
                ℓ_c = Σ ℓ_g + o_last. (Where a cut text ends, no row follows and nothing is added.) `--debias none`
                takes every group as it is.
3. Loss.        The KL between the two events "this chunk" and "another": binary, of e^u and e^v, the likelihoods
                raised to 1/τ_b, τ_b = --binarization_temperature. J_c are the chunk's student positions.

The teacher's distribution is read nowhere else. Likelihoods are those of softmax(z): there is no --kd_temperature.

Logged beside the losses: coverage (the share of student tokens that are in chunks), chunk_tokens (mean student tokens
of a chunk).

The authors' code minimises the cross-entropy of the two events, which has the same gradient. In it, stop tokens are an
option of the white space's, a special token may be part of a chunk, and teacher tokens are what a chunk counts.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from get_vocab_mapper.token_forms import TokenForms
from modeling.errors import one_message
from modeling.losses.logits import Logits
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch
from modeling.training.arguments import LikelihoodArguments, check
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer

WHITE_SPACE = (b" ", b"\t", b"\n", b"\r", b"\v", b"\f")


@dataclass
class ALMDistillationArguments(LikelihoodArguments):
    """Without a temperature of the softmax."""

    kd_temperature: float = field(
        default=1.0, metadata={"help": "Stays 1: likelihoods are softened by --binarization_temperature instead."}
    )

    def __post_init__(self):
        super().__post_init__()
        check(
            self.kd_temperature == 1,
            *("kd_temperature", self.kd_temperature),
            "leave it out: likelihoods are compared as they are, and softened by --binarization_temperature",
        )


@dataclass
class ALMArguments:
    """What is ALM's own."""

    metrics: ClassVar[tuple[str, ...]] = ("coverage", "chunk_tokens")

    binarization_temperature: float = field(
        default=100.0, metadata={"help": "Log-likelihoods of chunks are divided by it. Above 0."}
    )
    debias: Literal["space", "none"] = field(
        default="space",
        metadata={
            "help": "space: chunks end where the teacher expects white space or the end, and count its probability; "
            "none: every aligned group is a chunk."
        },
    )
    space_threshold: float = field(
        default=0.1,
        metadata={"help": "A chunk goes on until the teacher's probability of white space is above it. 0 to 1."},
    )

    def __post_init__(self):
        temperature, threshold = self.binarization_temperature, self.space_threshold
        check(0 < temperature < float("inf"), "binarization_temperature", temperature, "give a finite number above 0")
        check(0 <= threshold <= 1, "space_threshold", threshold, "give a number from 0 to 1")
        check(
            self.debias == "space" or threshold == 0.1,
            *("space_threshold", threshold, "leave it out with --debias none, which joins no groups"),
        )


def boundary_tokens(forms: TokenForms, stop_ids: list[int]) -> np.ndarray:
    """int64 `[n]`: the tokens that a text may be cut in front of, those that begin with white space and those that end
    it."""
    begins = [i for i, form in enumerate(forms.forms) if form.startswith(WHITE_SPACE) and not forms.is_special[i]]
    return np.union1d(begins, stop_ids).astype(np.int64)


def alm_losses(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    boundaries: tuple[Tensor, Tensor] | None,
    space_threshold: float = 0.1,
    binarization_temperature: float = 100.0,
) -> Losses:
    """Binary KL between the likelihoods of chunks, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `groups` of the exact alignment.
        boundaries: the teacher's and the student's tokens that a text may be cut in front of, int64 `[n]` each; None
            takes every group as it is.
        space_threshold: from 0 to 1.
        binarization_temperature: τ_b > 0.
    """
    groups, units = batch.groups, batch.groups.units
    rows, said = StudentRows(student, batch.student.labels), StudentRows(teacher, batch.teacher.labels)
    sides = (said, groups.teacher), (rows, groups.student)
    likelihoods = [side.sums(-of_side.ce) for of_side, side in sides]  # ℓ_g, [G] each

    example = batch.student.example[groups.student.first_row]  # [G]
    has_next, joins = torch.zeros_like(units), torch.zeros_like(units)
    has_next[:-1] = example[1:] == example[:-1]
    if boundaries is not None:
        after = [
            of_side.log_mass(ids)[(side.last_row + 1).clamp(max=max(len(of_side) - 1, 0))]
            for ids, (of_side, side) in zip(boundaries, sides)
        ]  # o_g, where a row follows
        joins[:-1] = units[:-1] & units[1:] & has_next[:-1] & (after[0][:-1].exp() <= space_threshold)
        likelihoods = [ll + torch.where(joins | ~has_next, 0.0, o) for ll, o in zip(likelihoods, after)]

    begins = torch.ones_like(units)
    begins[1:] = ~joins[:-1]
    chunk = begins.cumsum(0) - 1  # [G]; there are no more chunks than groups
    teacher_ll, student_ll = (
        ll.new_zeros(len(groups)).index_add(0, chunk, torch.where(units, ll, 0.0)).clamp(max=0) for ll in likelihoods
    )
    covered = torch.zeros_like(chunk).index_add(0, chunk, groups.student.size * units)

    u, v = teacher_ll / binarization_temperature - 1e-6, student_ll / binarization_temperature - 1e-6
    log_other_u, log_other_v = (-u.expm1()).log(), (-v.expm1()).log()
    kd = u.exp() * (u - v) - u.expm1() * (log_other_u - log_other_v)
    n_tokens = covered.sum()
    means = {"coverage": (n_tokens, len(rows)), "chunk_tokens": (n_tokens, (units & ~joins).sum())}
    return Losses(rows.ce, kd, covered, means=means)


class ALMTrainer(DistillationTrainer):
    """Binary KL between likelihoods of chunks.

    Args beyond those of `DistillationTrainer`:
        boundaries: as `alm_losses` takes them, integers `[n]` each.
        space_threshold, binarization_temperature: as in `ALMArguments`.
    """

    def __init__(
        self, *args, boundaries, space_threshold: float = 0.1, binarization_temperature: float = 100.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        to_device = (torch.as_tensor(ids).long().to(self.args.device) for ids in boundaries or ())
        self.boundaries = tuple(to_device) or None
        self.settings = space_threshold, binarization_temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = alm_losses(student, teacher, inputs, self.boundaries, *self.settings)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=ALMDistillationArguments, method=ALMArguments)
    args, encoders, boundaries = run.method, run.encoders[::-1], None  # teacher, student
    if args.debias == "space":
        boundaries = [boundary_tokens(encoder.forms, [encoder.eos_id]) for encoder in encoders]
    run.train(
        ALMTrainer,
        alignment="byte",
        boundaries=boundaries,
        space_threshold=args.space_threshold,
        binarization_temperature=args.binarization_temperature,
    )


if __name__ == "__main__":
    main()
