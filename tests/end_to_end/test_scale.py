"""Responses of 8,192 tokens through every method, vocabularies of 262,144 tokens."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from get_vocab_mapper.builders import build_em
from get_vocab_mapper.mapper_file import load_mapper, save_mapper
from get_vocab_mapper.token_forms import TokenForms
from modeling import run_clm_distill_CDM, run_clm_llms_fkd, run_clm_llms_rkd, run_clm_MinED, run_clm_uld
from modeling.losses.mapping import contextual_kl
from modeling.losses.rows import StudentRows
from modeling.text.alignment import Groups, byte_groups
from tests.end_to_end.rig import ROOT, flags, in_a_fork, steps, training_flags
from tests.unit.tokenizer_zoo import byte_level_bpe, sentencepiece_bpe

# ----------------------------------------------------------------------------------------------------- long responses

LONG = 8_192


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """A response of 8,192 student tokens, bytes all of them, and nearly as many of the teacher's; small models."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 8))) for _ in range(4_000)]
    text = " ".join(words)[: LONG - 1]
    (folder / "train.json").write_text(json.dumps([{"prefix": "Q: ", "text": text}]))
    tokenizers = {"student": byte_level_bpe(vocab_size=257), "same": byte_level_bpe(vocab_size=257)}
    tokenizers["teacher"] = sentencepiece_bpe([text], vocab_size=290)
    for name, tokenizer in tokenizers.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=2 * LONG,
            initializer_range=0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(len(name))
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for kind in ("em", "MinED"):
        with pytest.MonkeyPatch.context() as patch:
            pair = flags(teacher=folder / "teacher", student=folder / "student", output=folder / f"{kind}.safetensors")
            patch.setattr(sys, "argv", ["build", *pair])
            runpy.run_path(str(ROOT / f"get_vocab_mapper/get_{kind}_mapper.py"), run_name="__main__")
    return folder


@pytest.mark.parametrize(
    ("module", "teacher", "extra"),
    [
        pytest.param(run_clm_distill_CDM, "teacher", {"alignment": "dtw"}, id="CDM, dtw"),
        pytest.param(run_clm_distill_CDM, "teacher", {"alignment": "byte"}, id="CDM, byte"),
        pytest.param(run_clm_MinED, "teacher", {}, id="MinED"),
        pytest.param(run_clm_uld, "teacher", {}, id="ULD"),
        pytest.param(run_clm_llms_fkd, "same", {}, id="FKD"),
        pytest.param(run_clm_llms_rkd, "same", {}, id="RKD"),
    ],
)
def test_a_response_of_8192_tokens(long_pair, tmp_path, module, teacher, extra):
    if module in (run_clm_distill_CDM, run_clm_MinED):
        kind = "MinED" if module is run_clm_MinED else "em"
        extra = {**extra, "teacher_to_student_id_mapping": long_pair / f"{kind}.safetensors"}

    def train():
        sys.argv = [
            module.__name__,
            *flags(model_name_or_path=long_pair / "student", teacher_path=long_pair / teacher, **extra),
            *training_flags(train_file=long_pair / "train.json", output_dir=tmp_path / "out"),
            *flags(block_size=LONG + 200, max_steps=1, save_strategy="no"),
        ]
        module.main()

    done = in_a_fork(train)
    assert done.status == 0, done.output
    assert "1 examples, 0 of them cut" in done.output
    logged = steps(tmp_path / "out")[0]
    assert 0 < logged["kd_loss"] < 100 and 0 < logged["ce_loss"] < 100


# ------------------------------------------------------------------------------------------------ large vocabularies

LARGE = 262_144


def large_vocabulary(name: str, own: int) -> TokenForms:
    """The last `own` tokens are this side's own, and similar to nothing; EOS comes last of all."""
    forms = [f"{'' if i < LARGE - own else name}{i:x}".encode() for i in range(LARGE - 1)]
    special = np.zeros(LARGE, dtype=bool)
    special[-1] = True
    return TokenForms(name, [*forms, b"<eos>"], special, np.zeros(LARGE, dtype=bool), {"eos": LARGE - 1})


def test_a_mapper_of_262144_tokens_and_a_loss_with_it(tmp_path):
    """Built, saved, loaded, used: every token of the shared part maps to itself, and none of the others to anything."""
    own = 500
    teacher, student = large_vocabulary("teacher", own), large_vocabulary("student", own)
    mapper = build_em(teacher, student, threshold=0.0, progress=False)
    expected = np.arange(LARGE, dtype=np.int32)
    expected[LARGE - own : LARGE - 1] = -1
    save_mapper(mapper, tmp_path / "large.safetensors")
    assert (tmp_path / "large.safetensors").stat().st_size < 10 * 2**20
    loaded = load_mapper(tmp_path / "large.safetensors", teacher, student, 0.0)
    for direction in (mapper.to_student, mapper.to_teacher, loaded.to_student, loaded.to_teacher):
        assert np.array_equal(direction.static, expected) and not len(direction.indices)

    torch.manual_seed(0)
    z_teacher, z_student = torch.randn(6, LARGE), torch.randn(6, LARGE, requires_grad=True)
    ends = np.arange(1, 7)
    groups = Groups.of([(ends, ends)], [byte_groups(ends, ends)])
    student_rows = StudentRows(z_student, torch.zeros(6, dtype=torch.int64))
    got = contextual_kl(student_rows, z_teacher, groups, loaded, topk=100, temperature=1.0)
    want = []
    for row in range(6):
        total = 0.0
        for side in (z_teacher, z_student):
            top = side[row].topk(100).indices
            top = top[torch.from_numpy(expected[top.numpy()] >= 0)]
            p, q = z_teacher[row, top].double().softmax(0), z_student[row, top].double().softmax(0)
            total += (p * (p / q).log()).sum().item() / 2
        want.append(total)
    assert got.kd.tolist() == pytest.approx(want, rel=1e-4)
    got.kd.sum().backward()
    assert torch.isfinite(z_student.grad).all() and z_student.grad.count_nonzero() <= 6 * 200
