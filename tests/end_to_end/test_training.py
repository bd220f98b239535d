"""The training scripts as users run them: real tokenizers, real rows, real launchers, small random models."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from get_vocab_mapper.mapper_file import read_mapper
from get_vocab_mapper.token_forms import token_forms
from tests.end_to_end.oracle import SIDES, dtw_groups, mapped
from tests.end_to_end.rig import ROOT, flags, launcher, response_of, run_script, steps, training_flags

CDM, SFT = "modeling/run_clm_distill_CDM.py", "modeling/run_clm_sft.py"


def common(output, **changes):
    constant = {"block_size": 96, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    return training_flags(output_dir=output, **{**constant, **changes})


def cdm_flags(pair):
    return flags(model_name_or_path=pair.student, teacher_path=pair.teacher, teacher_to_student_id_mapping=pair.mapper)


# ------------------------------------------------------------------------------------------- the method, at full width


def oracle_losses(pair, rows):
    """CE and KD of a batch, from the models' own forward on each example alone."""
    models = {side: AutoModelForCausalLM.from_pretrained(getattr(pair, side)) for side in SIDES}
    tokenizers = {side: AutoTokenizer.from_pretrained(getattr(pair, side)) for side in SIDES}
    forms = {side: token_forms(tokenizer) for side, tokenizer in tokenizers.items()}
    mapper = read_mapper(pair.mapper)
    ce_sum, kd_sum, n_tokens = 0.0, 0.0, 0
    for row in rows:
        tokens, logits = {}, {}
        for side in SIDES:
            tokens[side], logits[side] = response_of(models[side], tokenizers[side], row)
        for group in dtw_groups(tokens, logits, forms):
            kd_sum += len(group[1]) * mapped(logits, forms, mapper, group).kd
        n_rows = len(tokens["student"])
        ce_sum -= logits["student"].log_softmax(-1)[range(n_rows), tokens["student"]].sum().item()
        n_tokens += n_rows
    return ce_sum / n_tokens, kd_sum / n_tokens


def test_cdm_on_real_rows_at_the_real_widths(phi_qwen, dolly, tmp_path):
    """Step 1 is the oracle's; over 50 steps the divergence falls."""
    rows = json.loads(dolly.train.read_text())
    short = [row for row in rows if len(row["prefix"] + row["text"]) < 260][:4]
    train = tmp_path / "train.json"
    train.write_text(json.dumps(short + [row for row in rows if row not in short]))
    arguments = common(
        tmp_path / "out",
        train_file=train,
        max_steps=50,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        save_strategy="no",
        learning_rate=3e-3,
    )
    run_script(CDM, *cdm_flags(phi_qwen), *arguments)
    logged = steps(tmp_path / "out")
    ce, kd = oracle_losses(phi_qwen, short)
    assert logged[0]["ce_loss"] == pytest.approx(ce, rel=1e-5)
    assert logged[0]["kd_loss"] == pytest.approx(kd, rel=1e-5)
    assert logged[0]["loss"] == pytest.approx((ce + kd) / 2, rel=1e-5)
    assert len(logged) == 50
    first, last = (sum(entry["kd_loss"] for entry in part) / 10 for part in (logged[:10], logged[-10:]))
    assert last < 0.8 * first
    for entry in logged:
        assert 0 < entry["mapped_rate"] <= 1 and 0 < entry["teacher_mass"] <= 1
        assert 0 < entry["one_to_one"] <= 1 and 0 < entry["aligned"] <= 1


# ---------------------------------------------------------------------------------------------------- the normaliser

SGD_RATE = 16.0
WAYS = {  # 16 examples a step, each time: how they are split, among how many ranks, and who launches them
    "1 x 16": (16, 1, 1, {}),
    "4 x 4": (4, 4, 1, {}),
    "2 ranks x 4 x 2, torchrun": (4, 2, 2, {}),
    "2 ranks x 4 x 2, ZeRO-2": (4, 2, 2, {"deepspeed": "deepspeed_config.json"}),
    "2 ranks x 4 x 2, ZeRO-3": (4, 2, 2, {"deepspeed": "deepspeed_zero3_config.json"}),
}


@pytest.fixture(scope="module")
def split_runs(phi_smollm, dolly, tmp_path_factory):
    """The same 2 steps of 16 real rows, evaluation included, in every way of WAYS.

    Plain gradient descent, whose first step shows the gradient itself: Adam turns rounding errors of a gradient near 0
    into steps of the full learning rate.
    """
    folders = {}
    for way, (batch, accumulation, ranks, extra) in WAYS.items():
        folders[way] = folder = tmp_path_factory.mktemp("split") / "out"
        extra = {name: ROOT / "config" / value for name, value in extra.items()}
        arguments = common(
            folder,
            do_eval=True,
            train_file=dolly.train,
            validation_file=dolly.validation,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=2,
            optim="sgd",
            learning_rate=SGD_RATE,
            max_grad_norm=0.0,
            save_steps=1,
            save_only_model=True,
            **extra,
        )
        run_script(CDM, *cdm_flags(phi_smollm), *arguments, launch=launcher(ranks, deepspeed=bool(extra)))
    return folders


def first_gradient(pair, folder):
    before, after = load_file(pair.student / "model.safetensors"), load_file(folder / "checkpoint-1/model.safetensors")
    assert before.keys() == after.keys()
    return torch.cat([(before[name] - after[name]).flatten().double() for name in sorted(before)]) / SGD_RATE


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_loss_and_gradient_do_not_depend_on_the_split(split_runs, phi_smollm, way):
    expected, got = steps(split_runs["1 x 16"]), steps(split_runs[way])
    assert len(got) == 2
    names = ("loss", "ce_loss", "kd_loss", "mapped_rate", "teacher_mass", "one_to_one", "aligned")
    for want, entry in zip(expected, got):
        assert {name: entry[name] for name in names} == pytest.approx({name: want[name] for name in names}, rel=1e-5)
        # Only as exact as a float32 sum of a million squares, which every launcher adds up in another order.
        assert entry["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    want, entry = first_gradient(phi_smollm, split_runs["1 x 16"]), first_gradient(phi_smollm, split_runs[way])
    assert want.norm().item() == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    assert (entry - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_evaluation_does_not_depend_on_the_split(split_runs, way):
    """17 examples: an odd number, so that one rank's share is filled up, which must not count."""
    expected, got = (json.loads((split_runs[w] / "eval_results.json").read_text()) for w in ("1 x 16", way))
    for name in ("eval_loss", "eval_ce_loss", "eval_kd_loss", "eval_bits_per_byte", "eval_mapped_rate", "eval_aligned"):
        assert got[name] == pytest.approx(expected[name], rel=2e-5), name
    assert got["eval_perplexity"] == pytest.approx(math.exp(got["eval_ce_loss"]))


def test_zero3_saves_the_whole_model(split_runs):
    whole = load_file(split_runs["1 x 16"] / "model.safetensors")
    gathered = load_file(split_runs["2 ranks x 4 x 2, ZeRO-3"] / "model.safetensors")
    assert gathered.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.allclose(gathered[name], tensor, atol=1e-4), name


# --------------------------------------------------------------------------------------------------------- the course


def test_a_saved_student_loads_and_generates(split_runs):
    folder = split_runs["1 x 16"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Say hello.", return_tensors="pt")
    assert model.config.use_cache and model.dtype == torch.float32
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_sft_in_bf16_with_checkpointing_frozen_parts_and_tensorboard(phi_smollm, dolly, tmp_path):
    arguments = common(
        tmp_path / "out",
        model_name_or_path=phi_smollm.student,
        train_file=dolly.train,
        validation_file=dolly.validation,
        do_eval=True,
        max_steps=6,
        per_device_train_batch_size=4,
        bf16=True,
        gradient_checkpointing=True,
        freeze_emb=True,
        freeze_layers=1,
        learning_rate=1e-2,
        report_to="tensorboard",
        preprocessing_num_workers=2,
        dataloader_num_workers=1,
    )
    run_script(SFT, *arguments)
    logged = steps(tmp_path / "out")
    assert logged[-1]["loss"] < logged[0]["loss"] and "kd_loss" not in logged[0]
    before, after = load_file(phi_smollm.student / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in before.items():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(tensor, after[name]) == frozen, name
    assert list((tmp_path / "out").rglob("events.out.tfevents.*")) or list(tmp_path.rglob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["eval_bits_per_byte"] > 0


def test_byte_alignment_and_temperature_in_bf16(phi_smollm, dolly, tmp_path):
    arguments = common(
        tmp_path / "out",
        train_file=dolly.train,
        max_steps=8,
        per_device_train_batch_size=4,
        alignment="byte",
        kd_temperature=2.0,
        kd_alpha=0.0,
        topk=20,
        simi_threadshold=0.2,
        bf16=True,
        teacher_dtype="bfloat16",
        learning_rate=3e-3,
    )
    run_script(CDM, *cdm_flags(phi_smollm), *arguments)
    logged = steps(tmp_path / "out")
    assert all(entry["aligned"] == 1.0 for entry in logged)
    assert all(entry["loss"] == pytest.approx(entry["kd_loss"], rel=1e-5) for entry in logged)
    assert logged[-1]["kd_loss"] < logged[0]["kd_loss"]
