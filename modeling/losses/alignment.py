"""Entropy-weighted dynamic time warping: the one alignment that has to wait for logits (CDM, arXiv 2502.11104)."""

from __future__ import annotations

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
    teacher, student, n = batch.teacher, batch.student, len(batch.rows)
    entropy, example = torch.cat([teacher_entropy, student_entropy]), torch.cat([teacher.example, student.example + n])
    weights = entropy_weights(entropy, example, 2 * n).cpu().split([*teacher.lengths, *student.lengths])
    weights = [part.numpy() for part in weights]
    examples = [
        dtw_groups(d.table, d.teacher_index, d.student_index, teacher_weights, student_weights)
        for d, teacher_weights, student_weights in zip(batch.token_distances, weights, weights[n:])
    ]
    ends = list(zip(teacher.byte_ends, student.byte_ends))
    groups, device = Groups.of(ends, examples, same_start=batch.same_start), student_entropy.device
    return groups if device.type == "cpu" else groups.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def entropy_weights(entropy: Tensor, example: Tensor, n_examples: int) -> Tensor:
    """⌊3·σ(4h − 2) + 3⌋, h being the entropy scaled to [0, 1] within its example (CDM, step 1).

    Uncertain positions cost more to misalign. An example whose entropies are all equal has h = 0.

    Args:
        entropy: `[R]`, in nats.
        example: int64 `[R]`, the example that each belongs to, in `0 … n_examples − 1`.

    Returns:
        int64 `[R]`, each 3, 4 or 5, on the entropy's device, without waiting for it.
    """
    least, most = (
        entropy.new_full((n_examples,), start).scatter_reduce_(0, example, entropy, reduce)[example]
        for start, reduce in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    h = torch.where(most > least, (entropy - least) / (most - least), 0.0)
    return (3 * torch.sigmoid(4 * h - 2) + 3).floor().long()
