"""The methods, for what goes through all of them: one line for a new one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from get_vocab_mapper.mapper import VocabMapper
from modeling.losses.prefix_targets import MovedTokens
from modeling.losses.result import Losses
from modeling.run_clm_bpm import BPMTrainer, bpm_losses
from modeling.run_clm_distill_CDM import CDMTrainer, cdm_losses
from modeling.run_clm_llms_fkd import FKDTrainer, fkd_losses
from modeling.run_clm_llms_rkd import RKDTrainer, rkd_losses
from modeling.run_clm_MinED import MinEDTrainer, mined_losses
from modeling.run_clm_sft import SFTTrainer, sft_losses
from modeling.run_clm_uld import ULDTrainer, uld_losses
from modeling.text.batch import Alignment
from modeling.training.trainer import ResponseTrainer


@dataclass(frozen=True)
class Mappers:
    """Of a pair of tokenizers: what the methods that need one are given."""

    em: VocabMapper | None = None
    static: Tensor | None = None  # MinED's φ
    boundary: MovedTokens | None = None  # BPM's


@dataclass(frozen=True)
class Method:
    """A method, with the alignment that its batches are made with.

    `losses(student, teacher, batch, mappers, **options)` takes both sides' logits; options are those that the method's
    own function has a default for.
    """

    trainer: type[ResponseTrainer]
    losses: Callable[..., Losses]
    alignment: Alignment | None = None
    same_tokenizer: bool = False


def _cdm(student, teacher, batch, mappers, **options) -> Losses:
    return cdm_losses(student, teacher, batch, mappers.em, **options)


METHODS = {
    "SFT": Method(SFTTrainer, lambda s, t, batch, m: sft_losses(s, batch)),
    "FKD": Method(FKDTrainer, lambda s, t, batch, m, **o: fkd_losses(s, t, batch, **o), same_tokenizer=True),
    "RKD": Method(RKDTrainer, lambda s, t, batch, m, **o: rkd_losses(s, t, batch, **o), same_tokenizer=True),
    "ULD": Method(ULDTrainer, lambda s, t, batch, m, **o: uld_losses(s, t, batch, **o), "index"),
    "MinED": Method(MinEDTrainer, lambda s, t, batch, m, **o: mined_losses(s, t, batch, m.static, **o), "dtw"),
    "CDM": Method(CDMTrainer, _cdm, "entropy_dtw"),
    "BPM": Method(BPMTrainer, lambda s, t, batch, m, **o: bpm_losses(s, t, batch, m.boundary, **o), "prefix"),
    "CDM, byte": Method(CDMTrainer, _cdm, "byte"),
}
ONE_A_SCRIPT = [name for name in METHODS if name != "CDM, byte"]
