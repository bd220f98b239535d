"""What a method makes of a batch, before it is weighed: the one contract between methods and trainers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The losses of a batch with R_S student response tokens.

    Attributes:
        ce: float32 `[R_S]`, the cross-entropy of each response token, in nats.
        kd: float32 `[units]`, the divergence of each unit that the method compares (a token, a group), in nats; None
            for a method without a teacher.
        covered: `[units]`, how many student tokens each unit stands for; None where it is one each.
        parts: sums over the batch that are logged per response token, as KD is: `{name: scalar}`.
        means: what else is logged: `{name: (sum, count)}`, a mean over all batches and ranks between two logs. A count
            that only the device knows stays there.
    """

    ce: Tensor
    kd: Tensor | None = None
    covered: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)

    def kd_sum(self) -> Tensor:
        """Σ over units of (student tokens that it covers) × (its divergence)."""
        return self.kd.sum() if self.covered is None else torch.dot(self.kd, self.covered.to(self.kd.dtype))

    def mean(self, kd_alpha: float = 0.5) -> Tensor:
        """α·CE + (1 − α)·KD per response token of this batch: what a trainer minimises where a step is one batch."""
        ce, n_tokens = self.ce.sum(), max(len(self.ce), 1)
        return (ce if self.kd is None else kd_alpha * ce + (1 - kd_alpha) * self.kd_sum()) / n_tokens
