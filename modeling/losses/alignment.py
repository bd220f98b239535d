"""Entropy-weighted dynamic time warping: the one alignment that has to wait for logits (CDM, arXiv 2502.11104)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.text.alignment import Groups, dtw_groups
from modeling.text.batch import Batch


def entropy_dtw(student_entropy: Tensor, teacher_entropy: Tensor, batch: Batch) -> Groups:
    """The aligned groups of a batch, where uncertain positions cost more to misalign (CDM, steps 1 to 3).

    Args:
        student_entropy, teacher_entropy: `[R_S]` and `[R_T]`, from `losses.logits.entropy`.
        batch: with `token_distances`.

    Returns:
        Groups on the entropies' device. The weights are copied to the host, which waits for them.
    """
    sides = batch.teacher.lengths, batch.student.lengths
    weights = torch.cat([entropy_weights(h, n) for h, n in zip((teacher_entropy, student_entropy), sides)]).cpu()
    weights = [part.numpy() for part in weights.split([*sides[0], *sides[1]])]
    examples = [
        dtw_groups(d.table, d.teacher_index, d.student_index, teacher_weights, student_weights)
        for d, teacher_weights, student_weights in zip(batch.token_distances, weights, weights[len(sides[0]) :])
    ]
    ends = list(zip(batch.teacher.byte_ends, batch.student.byte_ends))
    return Groups.of(ends, examples).to(student_entropy.device)


@torch.no_grad()
def entropy_weights(entropy: Tensor, lengths: Sequence[int]) -> Tensor:
    """⌊3·σ(4h − 2) + 3⌋, h being the entropy scaled to [0, 1] within its example (CDM, step 1).

    Uncertain positions cost more to misalign. An example whose entropies are all equal has h = 0.

    Args:
        entropy: `[R]`, the examples one after another.
        lengths: number of positions of each example, each ≥ 1, summing to R; there may be no example.

    Returns:
        int64 `[R]`, each 3, 4 or 5, on the entropy's device, without waiting for it.
    """

    def example_weights(values: Tensor) -> Tensor:
        spread = values.amax() - values.amin()
        h = torch.where(spread > 0, (values - values.amin()) / spread, 0.0)
        return (3 * torch.sigmoid(4 * h - 2) + 3).floor().long()

    if not lengths:
        return entropy.new_empty(0, dtype=torch.int64)
    return torch.cat([example_weights(values) for values in entropy.split(list(lengths))])
