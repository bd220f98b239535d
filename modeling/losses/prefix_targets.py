"""The teacher's predictions at the bytes of a student token: what `PrefixRows` names, read from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.losses.divergences import softmax_rows
from modeling.losses.logits import Logits, PickedRows, chunks_with_buffers, float_dtype
from modeling.text.prefix_rows import PrefixRows


@dataclass(frozen=True)
class MovedTokens:
    """Where a map sends the V_T teacher tokens, among the n student tokens that it sends any to.

    Attributes:
        tokens: int64 `[n]`, these student tokens.
        place: int64 `[V_T]`, of each teacher token: the place of its student token among them, −1 for none.
        place_of: int64 `[V_S]`, of each student token: its own place, −1 where nothing goes to it.
    """

    tokens: Tensor
    place: Tensor
    place_of: Tensor

    @classmethod
    def of(cls, static: Tensor, vocab_size: int) -> MovedTokens:
        """Of a map int64 `[V_T]`, each a student id below `vocab_size` or −1."""
        tokens = static[static >= 0].unique()
        place_of = torch.full((vocab_size + 1,), -1, device=static.device)  # the last one for −1
        place_of[tokens] = torch.arange(len(tokens), device=static.device)
        return cls(tokens, place_of[static], place_of[:-1])

    def to(self, device: torch.device | str) -> MovedTokens:
        return MovedTokens(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Continuations:
    """Of some rows, the teacher tokens that go on from a beginning, and where their rests go.

    Given to `StudentRows.read`, which cuts the rows that it is at out of it.
    """

    rows: PrefixRows
    requires_grad = False
    shape = ()  # it holds nothing that is a vocabulary wide

    def __getitem__(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`(row, token, entry)`, int64 `[m]` each: row at.start + row has `token`, whose rest goes to target[entry]."""
        first, stop = np.searchsorted(self.rows.interior_rows, [at.start, at.stop])
        sets, entry = self.rows.continued.entries(first, stop)
        return self.rows.continued.rows[sets] - at.start, self.rows.continued.tokens[entry], entry


@torch.no_grad()
def chain_probabilities(teacher: Logits, rows: PrefixRows, temperature: float) -> Tensor:
    """float32 `[R_S]`: the probability that the teacher, behind the first token that a spanning student token touches,
    goes on with the bytes which the student token holds; 0 of all other rows.

    It is the product over the row's chain of `links`, of the probability that their tokens have together, with
    p = softmax(teacher / τ).
    """
    links, picked = rows.links, PickedRows(teacher, rows.links.rows)
    probability = torch.zeros(len(links.rows), dtype=float_dtype(teacher), device=teacher.device)
    for at, _ in chunks_with_buffers(teacher, 0, n_rows=len(links.rows)):
        p = softmax_rows(picked[at], temperature)
        link, entry = links.entries(at.start, at.stop)
        probability.index_add_(0, link, p[link - at.start, links.tokens[entry]])
    logs = probability.new_zeros(len(rows.teacher_row)).index_add_(0, rows.spanning_row, probability.log())
    return torch.where(rows.spanning, logs.exp(), 0.0)
