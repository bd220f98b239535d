"""BPM: byte-prefix marginalization, distillation across tokenizers at every student token (arXiv 2607.22334).

    L = α·CE + (1 − α)·KD,   KD = Σ_j KD_j / (response tokens of the optimizer step)
    KD_j = τ² · JSD_β(q_j ‖ p_j),   JSD_β(q ‖ p) = β KL(q ‖ m) + (1 − β) KL(p ‖ m),   m = βq + (1 − β)p

Student token s_j begins at byte a of the response. Teacher token t_i covers that byte, and c are its bytes before a.
p^T_i = softmax(z^T_i/τ) is the teacher's prediction there.

1. Weights.   Boundary row, c is empty: every teacher token v weighs p^T_i[v], and its rest r(v) are all of its bytes.
              Interior row: the v that begin with c and are longer weigh p^T_i[v] / π, π their sum, and r(v) are their
              bytes behind c. Where π < 1e-9 there is nothing to learn.
2. Target.    φ(r) is the longest student token that r begins with (in boundary rows the PrefixEM mapper, and the end of
              sequence of one side is that of the other). q_j[u] = Σ_{v: φ(r(v)) = u} weight(v), and what goes to no
              student token is one more category, ⊥: q_j[⊥] = 1 − Σ_u q_j[u]. So are special tokens.
3. Spanning.  Where s_j reaches over the end of t_i, x moves from q_j[φ(r(t_i))] to q_j[s_j]: the weight of t_i, times
              the probabilities of the teacher tokens behind it that s_j holds, times that of all tokens that begin with
              what is left of s_j in the last one it touches.
4. Loss.      p_j = softmax(z^S_j/τ) over the u with q_j[u] > 0, and ⊥ for all others (1e-12 at least).

A student token of spaces and tabs alone is not distilled (--mask_whitespace): with it, code collapses, the authors say.

Logged beside the losses: residual_mass (q_j[⊥], mean over the tokens that have a row, 1 where π is too small), and the
shares of student tokens that are interior, spanning and dropped (not distilled).

The authors' code refuses SentencePiece tokenizers; here their forms are bytes like any other.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from get_vocab_mapper.mapper import VocabMapper
from modeling.errors import one_message
from modeling.losses.divergences import jsd_to_target_rows, softmax_rows
from modeling.losses.logits import Logits, PickedRows
from modeling.losses.prefix_targets import Continuations, MovedTokens, chain_probabilities
from modeling.losses.result import Losses
from modeling.losses.rows import StudentRows
from modeling.text.batch import Batch
from modeling.text.encoder import Encoder
from modeling.training.arguments import LikelihoodArguments, MapperArguments, check
from modeling.training.run import Run
from modeling.training.trainer import DistillationTrainer

LEAST_MASS = 1e-9  # of π


@dataclass
class BPMArguments(MapperArguments):
    """What is BPM's own."""

    metrics: ClassVar[tuple[str, ...]] = ("residual_mass", "interior", "spanning", "dropped")

    beta: float = field(
        default=0.5,
        metadata={
            "help": "Of the Jensen-Shannon divergence, 0 to 1: 0 is the forward KL (teacher to student), 1 the reverse."
        },
    )
    spanning: bool = field(
        default=True,
        metadata={"help": "Move probability to a student token that reaches over the end of the teacher's token."},
    )
    mask_whitespace: bool = field(
        default=True, metadata={"help": "Do not distil where the student's token is spaces and tabs alone."}
    )

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.beta <= 1, "beta", self.beta, "give a number from 0 (forward KL) to 1 (reverse KL)")


def boundary_map(mapper: VocabMapper, student: Encoder, teacher: Encoder) -> MovedTokens:
    """φ of boundary rows: that of a PrefixEM mapper, but special tokens go nowhere, and EOS to EOS."""
    static = torch.from_numpy(mapper.to_student.static).long()
    static[torch.from_numpy(teacher.forms.is_special)] = -1
    static[teacher.eos_id] = student.eos_id
    return MovedTokens.of(static, len(student.forms))


def bpm_losses(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    boundary: MovedTokens,
    beta: float = 0.5,
    temperature: float = 1.0,
    spanning: bool = True,
    mask_whitespace: bool = True,
) -> Losses:
    """JSD to the teacher's probabilities brought to the student's tokens by their bytes, and the cross-entropy.

    Args:
        student, teacher: z^S `[R_S, V_S]` and z^T `[R_T, V_T]`. The teacher is a constant.
        batch: with these response tokens, and `prefix_rows`.
        boundary: φ of boundary rows (`boundary_map`).
        beta: β, 0 to 1.
        temperature: τ > 0.
        spanning, mask_whitespace: as in `BPMArguments`.
    """
    rows, prefix, labels = StudentRows(student, batch.student.labels), batch.prefix_rows, batch.student.labels
    # The columns of q: the tokens that boundary rows reach, those that interior and spanning rows reach, and ⊥.
    columns, n = torch.cat([boundary.tokens, prefix.reached]), len(boundary.tokens)
    nothing = len(columns)
    phi = boundary.place.where(boundary.place >= 0, nothing)
    target, source, label = (
        torch.where(place >= 0, n + place, nothing) for place in (prefix.target, prefix.source, prefix.label)
    )
    said = batch.teacher.labels[prefix.teacher_row.clamp(min=0)]  # t_i of each row
    source = torch.where(prefix.interior, source, phi[said])  # φ(r(t_i))
    in_boundary = boundary.place_of[labels]
    label = torch.where(prefix.interior | (in_boundary < 0), label, in_boundary)
    chain = chain_probabilities(teacher, prefix, temperature) if spanning else torch.zeros_like(prefix.source)
    distilled = prefix.teacher_row >= 0
    if mask_whitespace:
        distilled = distilled & ~prefix.white_space

    def divergence(student, teacher, interior, continued, moved, chain, distilled) -> Tensor:
        p, (row, token, entry) = softmax_rows(teacher, temperature), continued
        weight, of_said = p[row, token], p.gather(1, moved[:, :1])
        mass = p.new_zeros(len(p)).index_add_(0, row, weight)  # π
        scale = torch.where(interior, 1 / mass.clamp(min=LEAST_MASS), 1.0)
        if len(row):
            p.mul_(~interior[:, None])
        q = p.new_zeros(len(p), nothing + 1).scatter_add_(1, phi.expand(len(p), -1), p)
        q.view(-1).index_add_(0, row * (nothing + 1) + target[entry], weight * scale[row])  # step 2

        _, source, label = moved.split(1, dim=1)
        x = torch.minimum(of_said * (scale * chain)[:, None], q.gather(1, source))
        q.scatter_add_(1, source, -x).scatter_add_(1, label, x)  # step 3

        known = ~interior | (mass >= LEAST_MASS)
        jsd = jsd_to_target_rows(q, student, columns, beta, temperature)  # step 4
        of_each = [jsd * known, torch.where(known, q[:, -1], 1.0), known.to(q.dtype)]
        return torch.stack(of_each, dim=1) * distilled[:, None]

    moved = torch.stack([said, source, label], dim=1)
    others = (PickedRows(teacher, prefix.teacher_row), prefix.interior, Continuations(prefix), moved, chain, distilled)
    kd, *counted = rows.read(divergence, *others).unbind(1)  # [R_S] each
    residual, n_distilled = (values.detach().sum() for values in counted)
    n_covered = prefix.n_covered - prefix.n_white_space * mask_whitespace
    means = {
        "residual_mass": (residual, n_covered),
        "interior": (len(prefix.interior_rows), len(rows)),
        "spanning": (prefix.n_spanning, len(rows)),
        "dropped": (len(rows) - n_distilled, len(rows)),
    }
    return Losses(rows.ce, kd, means=means)


class BPMTrainer(DistillationTrainer):
    """BPM.

    Args beyond those of `DistillationTrainer`:
        boundary, beta, spanning, mask_whitespace: as `bpm_losses` takes them.
    """

    def __init__(self, *args, boundary: MovedTokens, beta=0.5, spanning=True, mask_whitespace=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.boundary = boundary.to(self.args.device)
        self.settings = {"beta": beta, "spanning": spanning, "mask_whitespace": mask_whitespace}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, teacher = self.student_logits(model, inputs), self.teacher_logits(inputs)
        losses = bpm_losses(student, teacher, inputs, self.boundary, temperature=self.kd_temperature, **self.settings)
        return self.weigh(losses, inputs, num_items_in_batch)


@one_message
def main() -> None:
    run = Run(__doc__, distillation=LikelihoodArguments, method=BPMArguments)
    args = run.method
    mapper = run.mapper("prefixem", threshold=0.0)  # without the tables of similar tokens
    run.train(
        BPMTrainer,
        alignment="prefix",
        boundary=boundary_map(mapper, *run.encoders),
        beta=args.beta,
        spanning=args.spanning,
        mask_whitespace=args.mask_whitespace,
    )


if __name__ == "__main__":
    main()
