"""The end of a response is one event, whatever token says it.

The *stop tokens* of a side are its tokenizer's EOS, every `eos_token_id` of its model's generation configuration, and
the token that its chat template writes behind an assistant's message, where the rows are chats. One of them, the *end*,
is what responses end with: the template's in chats, else EOS. It stands first in `Encoder.stop_ids`. From there on

- the labels of a batch that has two sides hold the end in the place of every stop token (`text.batch.Side`);
- both sides' logits are folded: the end has the summed probability of the stop tokens, and the others have none
  (`fold_ends`; the trainer does it, for whole and chunked logits, live and stored teachers);
- in a mapper the stop tokens of one side match the end of the other, and nothing else (`VocabMapper.with_ends`).

So every method compares one probability of ending on either side, and knows nothing of this. Which of its stop tokens
the student says is learned by cross-entropy alone: −ln p(token) = −ln p(ending) − ln p(token | ending). Its first term
is that of the folded logits, and the trainer adds the second (`end_choice`).

A temperature softens the folded distribution, in which ending is one category like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.text.encoder import Encoder


def stop_tokens(tokenizer, generation_ids: Iterable[int], template_end: int | None) -> dict[int, list[str]]:
    """The stop tokens of a side, each with the places that name it, EOS first.

    Args:
        generation_ids: the `eos_token_id`s of the model's generation configuration. One that is a piece of ordinary
            text in this tokenizer (a default of another family's) is none.
        template_end: what its chat template writes behind an assistant's message, where that is a token.
    """
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    named = [(tokenizer.eos_token_id, "the tokenizer's EOS")]
    named += [(token_id, "the generation configuration") for token_id in generation_ids if token_id in special]
    named += [(template_end, "the chat template")]
    found: dict[int, list[str]] = {}
    for token_id, place in named:
        if token_id is not None:
            found.setdefault(int(token_id), []).append(place)
    return found


def shared_ends(student: Encoder, *teachers: Encoder) -> list[Encoder]:
    """The same sides; a teacher with the student's tokens ends its responses as the student does.

    What stops either of two models with one vocabulary is a stop token of both, so that they compare token by token.
    """
    alike = [teacher for teacher in teachers if teacher.forms.forms == student.forms.forms]
    stop_ids = tuple(dict.fromkeys(i for side in (student, *alike) for i in side.stop_ids))
    return [side.with_stop_ids(stop_ids) if side in (student, *alike) else side for side in (student, *teachers)]


def fold_ends(logits: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """z[end] = ln Σ_stops e^z, and −∞ in the columns of the other stop tokens. All other probabilities stay.

    Args:
        logits: `[…, V]`, any floating dtype. Without gradient they are changed in place.
        stop_ids: distinct, each below V, the end first; with fewer than two there is nothing to fold.
    """
    if len(stop_ids) < 2:
        return logits
    columns = torch.tensor(stop_ids).to(logits.device, non_blocking=True)
    stops = logits.index_select(-1, columns)
    total = _as_float(stops).logsumexp(-1, keepdim=True).to(stops.dtype)
    folded = torch.cat([total, torch.full_like(stops[..., 1:], -torch.inf)], dim=-1)
    return logits.index_copy(-1, columns, folded) if logits.requires_grad else logits.index_copy_(-1, columns, folded)


def end_choice(stop_logits: Tensor, stop_ids: Sequence[int], said: Tensor) -> Tensor:
    """float `[R]`: −ln p(token | ending) where the token to be said is a stop token; 0 elsewhere.

    Args:
        stop_logits: `[R, len(stop_ids)]`, the model's own logits of the stop tokens.
        said: int64 `[R]`, the tokens to be said.
    """
    is_it = said[:, None] == torch.tensor(stop_ids).to(said.device, non_blocking=True)
    loss = F.cross_entropy(_as_float(stop_logits), is_it.int().argmax(-1), reduction="none")
    return torch.where(is_it.any(-1), loss, 0.0)


def _as_float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
