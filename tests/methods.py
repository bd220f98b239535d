"""The methods, for what goes through all of them: one line for a new one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from get_vocab_mapper.mapper import VocabMapper
from modeling.losses.prefix_targets import MovedTokens
from modeling.losses.result import Losses
from modeling.losses.shared_tokens import SharedTokens
from modeling.run_clm_alm import ALMTrainer, alm_losses
from modeling.run_clm_bpm import BPMTrainer, bpm_losses
from modeling.run_clm_distill_CDM import CDMTrainer, cdm_losses
from modeling.run_clm_gold import Columns, GOLDTrainer, gold_losses
from modeling.run_clm_llms_fkd import FKDTrainer, fkd_losses
from modeling.run_clm_llms_rkd import RKDTrainer, rkd_losses
from modeling.run_clm_MinED import MinEDTrainer, mined_losses
from modeling.run_clm_sft import SFTTrainer, sft_losses
from modeling.run_clm_simct import SimCTTrainer, simct_losses
from modeling.run_clm_strict import StrictTrainer, strict_losses
from modeling.run_clm_uld import ULDTrainer, uld_losses
from modeling.text.batch import Alignment
from modeling.training.trainer import ResponseTrainer


@dataclass(frozen=True)
class Mappers:
    """Of a pair of tokenizers: what the methods that need one are given."""

    em: VocabMapper | None = None
    static: Tensor | None = None  # MinED's φ
    boundary: MovedTokens | None = None  # BPM's
    special: tuple[np.ndarray, np.ndarray] | None = None  # teacher tokens and student tokens
    boundaries: tuple[Tensor, Tensor] | None = None  # ALM's
    device: str = "cpu"

    @cached_property
    def shared(self) -> SharedTokens:
        return SharedTokens.of(self.em.mutual_pairs(self.special), self.device)

    @cached_property
    def columns(self) -> Columns:
        sizes = self.em.teacher.vocab_size, self.em.student.vocab_size
        return Columns.of(self.em.mutual_pairs(), sizes, self.device)


@dataclass(frozen=True)
class Method:
    """A method, with the alignment that its batches are made with.

    `losses(student, teacher, batch, mappers, **options)` takes both sides' logits; options are those that the method's
    own function has a default for. `settings(mappers)` are its trainer's own arguments.
    """

    trainer: type[ResponseTrainer]
    losses: Callable[..., Losses]
    alignment: Alignment | None = None
    same_tokenizer: bool = False
    settings: Callable[[Mappers], dict] = lambda mappers: {}


def _cdm(student, teacher, batch, mappers, **options) -> Losses:
    return cdm_losses(student, teacher, batch, mappers.em, **options)


def _alm(student, teacher, batch, mappers, temperature=1.0, **options) -> Losses:
    """(It has no temperature of the softmax.)"""
    return alm_losses(student, teacher, batch, mappers.boundaries, **options)


def _cdm_settings(mappers: Mappers) -> dict:
    return {"mapper": mappers.em, "topk": 20}


METHODS = {
    "SFT": Method(SFTTrainer, lambda s, t, batch, m: sft_losses(s, batch)),
    "FKD": Method(FKDTrainer, lambda s, t, batch, m, **o: fkd_losses(s, t, batch, **o), same_tokenizer=True),
    "RKD": Method(RKDTrainer, lambda s, t, batch, m, **o: rkd_losses(s, t, batch, **o), same_tokenizer=True),
    "ULD": Method(ULDTrainer, lambda s, t, batch, m, **o: uld_losses(s, t, batch, **o), "index"),
    "MinED": Method(
        MinEDTrainer,
        lambda s, t, batch, m, **o: mined_losses(s, t, batch, m.static, **o),
        "dtw",
        settings=lambda m: {"static": m.static},
    ),
    "CDM": Method(CDMTrainer, _cdm, "entropy_dtw", settings=_cdm_settings),
    "CDM, byte": Method(CDMTrainer, _cdm, "byte", settings=_cdm_settings),
    "Strict": Method(
        StrictTrainer,
        lambda s, t, batch, m, **o: strict_losses(s, t, batch, m.shared, **o),
        "byte",
        settings=lambda m: {"shared": m.shared},
    ),
    "BPM": Method(
        BPMTrainer,
        lambda s, t, batch, m, **o: bpm_losses(s, t, batch, m.boundary, **o),
        "prefix",
        settings=lambda m: {"boundary": m.boundary},
    ),
    "GOLD": Method(
        GOLDTrainer,
        lambda s, t, batch, m, **o: gold_losses(s, t, batch, m.columns, **o),
        "byte",
        settings=lambda m: {"matched": m.columns.matched},
    ),
    "SimCT": Method(
        SimCTTrainer,
        lambda s, t, batch, m, **o: simct_losses(s, t, batch, m.shared, **o),
        "byte",
        settings=lambda m: {"shared": m.shared},
    ),
    "ALM": Method(ALMTrainer, _alm, "byte", settings=lambda m: {"boundaries": m.boundaries}),
}
ONE_A_SCRIPT = [name for name in METHODS if name != "CDM, byte"]
