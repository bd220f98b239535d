"""Tokens that two vocabularies share: pairs of equal bytes, of which each token stands in one at most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.losses.logits import Logits, chunks_with_buffers
from modeling.losses.mapping import row_topk


class SharedTokens(NamedTuple):
    """int64 `[n]` each: the teacher's ids and the student's, pair by pair."""

    teacher: Tensor
    student: Tensor

    @classmethod
    def of(cls, pairs: tuple[np.ndarray, np.ndarray], device: torch.device | str = "cpu") -> SharedTokens:
        """From `VocabMapper.mutual_pairs`."""
        return cls(*(torch.as_tensor(ids).long().to(device) for ids in pairs))

    def __len__(self) -> int:
        """n"""
        return len(self.teacher)


@torch.no_grad()
def shared_topk(logits: Logits, ids: Tensor, k: int) -> Tensor:
    """int64 `[R, k]`: the places in `ids`, int64 `[n]`, of the k ≤ n largest logits of every row of `[R, V]`."""
    places = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    for at, _ in chunks_with_buffers(logits, 0):
        places[at] = row_topk(logits[at].index_select(1, ids), k)[1]
    return places
