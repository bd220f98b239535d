"""CDM at the width of real vocabularies, from two models' own logits, straight from the definition."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from get_vocab_mapper.mapper import VocabMapper
from get_vocab_mapper.token_forms import TokenForms
from tests.reference import cdm_oracle

SIDES = ("teacher", "student")


def entropies(logits: torch.Tensor) -> list[float]:
    log_p = logits.log_softmax(-1)
    return (-log_p.exp() * log_p).sum(-1).tolist()


def dtw_groups(
    tokens: dict[str, list[int]], logits: dict[str, torch.Tensor], forms: dict[str, TokenForms]
) -> list[tuple[list[int], list[int]]]:
    """Steps 1 to 3: groups of positions, of one response's tokens and the logits that predict them, on either side."""
    weights = {side: cdm_oracle.weights(entropies(logits[side])) for side in SIDES}
    last = len(tokens["teacher"]) - 1, len(tokens["student"]) - 1
    cost = []
    for i, t in enumerate(tokens["teacher"]):
        cost.append([])
        for j, s in enumerate(tokens["student"]):
            a, b = (forms[side].texts[token].replace(" ", "") for side, token in zip(SIDES, (t, s)))
            distance = 0 if (i, j) == last else cdm_oracle.levenshtein(a, b)
            cost[-1].append(distance * weights["teacher"][i] * weights["student"][j])
    return cdm_oracle.cut_at_diagonals(cdm_oracle.dtw_path(cost))


def mapped(
    logits: dict[str, torch.Tensor],
    forms: dict[str, TokenForms],
    mapper: VocabMapper,
    group: tuple[list[int], list[int]],
    k: int = 100,
) -> SimpleNamespace:
    """Steps 4 and 5 of one group.

    `candidates` (of either side: id, probability, match or None, kind of match), the teacher's `mass`, the number of
    `pairs`, and `kd`.
    """
    z = {side: logits[side][positions].mean(0) for side, positions in zip(SIDES, group)}
    top = {side: z[side].topk(k).indices.tolist() for side in SIDES}
    assert all(len(set(z[side][top[side]].tolist())) == k for side in SIDES)  # no equal logits, whose order is a choice
    candidates, divergence = {}, 0.0
    for side, other, direction in zip(SIDES, reversed(SIDES), (mapper.to_student, mapper.to_teacher)):
        probabilities = z[side].softmax(-1)
        candidates[side] = []
        for token in top[side]:
            match, kind = int(direction.static[token]), "static"
            if match >= 0:
                own, others = forms[side], forms[other]
                same_role = any(own.roles.get(r) == token and others.roles.get(r) == match for r in own.roles)
                if same_role or own.forms[token] == others.forms[match]:
                    kind = "exact"
            else:
                near = dict(zip(*(part.tolist() for part in direction.row(token))))
                match = min((o for o in top[other] if o in near), key=near.__getitem__, default=None)
                kind = "none" if match is None else "similar"
            candidates[side].append((token, probabilities[token].item(), match, kind))
        found = [(token, match) for token, _, match, _ in candidates[side] if match is not None]
        if found:
            own_z, other_z = [z[side][t] for t, _ in found], [z[other][m] for _, m in found]
            values = (own_z, other_z) if side == "teacher" else (other_z, own_z)
            divergence += cdm_oracle.kl_over_pairs(*values, 1.0).item() / 2
    return SimpleNamespace(
        candidates=candidates,
        mass=sum(p for _, p, match, _ in candidates["teacher"] if match is not None),
        pairs=sum(match is not None for side in SIDES for _, _, match, _ in candidates[side]),
        kd=divergence,
    )
