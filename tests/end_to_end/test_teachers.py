"""Where teachers run, two teachers at once, LoRA students."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling.models.language_model import LanguageModel
from modeling.models.teachers import LiveTeacher
from modeling.text.batch import Side
from modeling.training.arguments import DistillationArguments
from modeling.training.teacher import load_teacher
from modeling.training.training_arguments import TrainingArguments
from tests.end_to_end.rig import ROOT, launcher, response_of, run_script, steps, tiny_llama, training_flags
from tests.unit.tokenizer_zoo import load_real

CDM, SFT = "modeling/run_clm_distill_CDM.py", "modeling/run_clm_sft.py"


@pytest.fixture(scope="module")
def short_rows(dolly, tmp_path_factory):
    """8 real rows that need no cutting: one batch, in the order of the file."""
    rows = json.loads(dolly.train.read_text())
    path = tmp_path_factory.mktemp("short") / "train.json"
    path.write_text(json.dumps([row for row in rows if len(row["prefix"] + row["text"]) < 260][:8]))
    return path


@pytest.fixture(scope="module")
def second_teacher(tmp_path_factory):
    """It has the student's tokenizer, and a head that is padded otherwise."""
    return tiny_llama(tmp_path_factory.mktemp("second"), load_real("smollm2"), 49_280, seed=3)


@pytest.fixture(scope="module")
def cdm_run(phi_smollm, short_rows, dolly, tmp_path_factory):
    """Runs 2 steps on the same 8 rows, and evaluates: `(logged steps, evaluation, what it said)`."""

    def cdm_run(launch=None, **arguments):
        folder = tmp_path_factory.mktemp("run") / "out"
        given = {
            "model_name_or_path": phi_smollm.student,
            "teacher_path": phi_smollm.teacher,
            "teacher_to_student_id_mapping": phi_smollm.mapper,
            "train_file": short_rows,
            "validation_file": dolly.validation,
            "output_dir": folder,
            "do_eval": True,
            "block_size": 96,
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
        }
        done = run_script(CDM, *training_flags(**{**given, **arguments}), launch=launch)
        return steps(folder), json.loads((folder / "eval_results.json").read_text()), done.stdout + done.stderr

    return cdm_run


@pytest.fixture(scope="module")
def one_teacher(cdm_run):
    return cdm_run()


@pytest.fixture(scope="module")
def two_teachers(cdm_run, second_teacher):
    return cdm_run(same_tokenizer_teacher_path=second_teacher)


# ------------------------------------------------------------------------------------------------------- two teachers


def fkd_loss(pair, teacher, rows):
    """Σ KL(p^T ‖ p^S) over the response tokens, a token, from the models' own forward on each row alone."""
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (teacher, pair.student)]
    total, n_tokens = 0.0, 0
    for row in rows:
        log_p, log_q = (response_of(model, tokenizer, row)[1].log_softmax(-1) for model in models)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        n_tokens += len(log_p)
    return total / n_tokens


def test_two_teachers_are_weighted(one_teacher, two_teachers, cdm_run, phi_smollm, second_teacher, short_rows):
    alone = one_teacher[0]
    cross = alone[0]["kd_loss"]
    same = fkd_loss(phi_smollm, second_teacher, json.loads(short_rows.read_text()))
    ways = {
        0.5: two_teachers,
        1.0: cdm_run(same_tokenizer_teacher_path=second_teacher, cross_weight=1),
        0.0: cdm_run(same_tokenizer_teacher_path=second_teacher, cross_weight=0),
    }
    for weight, (logged, evaluation, _) in ways.items():
        first = logged[0]
        assert first["kd_cdm_loss"] == pytest.approx(cross, rel=1e-5)
        assert first["kd_fkd_loss"] == pytest.approx(same, rel=1e-5)
        assert first["kd_loss"] == pytest.approx(weight * cross + (1 - weight) * same, rel=1e-5)
        assert first["loss"] == pytest.approx((first["ce_loss"] + first["kd_loss"]) / 2, rel=1e-5)
        parts = weight * evaluation["eval_kd_cdm_loss"] + (1 - weight) * evaluation["eval_kd_fkd_loss"]
        assert evaluation["eval_kd_loss"] == pytest.approx(parts, rel=1e-5)
    for want, got in zip(alone, ways[1.0][0]):  # with weight 1, the gradient too is that of the first teacher alone
        assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert ways[0.0][0][1]["kd_fkd_loss"] < ways[0.0][0][0]["kd_fkd_loss"]
    assert "kd_fkd_loss" not in alone[0]


# ---------------------------------------------------------------------------------------------- where the teacher runs


def assert_equal_losses(expected, got, rel):
    for want, entry in zip(expected[0], got[0]):
        names = [name for name in want if name.endswith("loss")]
        assert {name: entry[name] for name in names} == pytest.approx({name: want[name] for name in names}, rel=rel)
    for name in ("eval_loss", "eval_kd_loss"):
        assert got[1][name] == pytest.approx(expected[1][name], rel=rel)


def sharded_shares(output):
    """`(held by rank 0, whole)` of every teacher that was sharded."""
    lines = [line for line in output.splitlines() if "is sharded: this rank holds" in line]
    return [tuple(int(word) for word in line.partition("sharded")[2].split() if word.isdigit()) for line in lines]


def test_a_teacher_sharded_beside_a_zero2_student(one_teacher, cdm_run):
    config = ROOT / "config/deepspeed_config.json"
    sharded = cdm_run(launcher(2, deepspeed=True), per_device_train_batch_size=4, deepspeed=config, teacher_zero3=True)
    assert_equal_losses(one_teacher, sharded, rel=1e-4)
    ((held, whole),) = sharded_shares(sharded[2])
    assert whole > 2_000_000 and whole / 2 <= held < 0.51 * whole


def test_two_teachers_sharded_beside_a_zero3_student(two_teachers, cdm_run, second_teacher):
    config = ROOT / "config/deepspeed_zero3_config.json"
    sharded = cdm_run(
        launcher(2, deepspeed=True),
        per_device_train_batch_size=4,
        deepspeed=config,
        teacher_zero3=True,
        same_tokenizer_teacher_path=second_teacher,
    )
    assert_equal_losses(two_teachers, sharded, rel=1e-4)
    shares = sharded_shares(sharded[2])
    assert len(shares) == 2 and all(held < 0.51 * whole for held, whole in shares)


def test_a_float16_teacher_on_a_device_of_its_own(one_teacher, cdm_run):
    # Not closer: a rounding error can turn the path of an alignment.
    assert_equal_losses(one_teacher, cdm_run(teacher_dtype="float16", teacher_device="cpu"), rel=5e-3)


@pytest.fixture
def placed(phi_smollm, tmp_path):
    """Loads the teacher as some arguments want it."""

    def placed(**arguments):
        arguments = DistillationArguments(str(phi_smollm.teacher), **arguments)
        model = LanguageModel(arguments.teacher_path, "teacher_path")
        return load_teacher(model, arguments, TrainingArguments(str(tmp_path), use_cpu=True), datasets=[])

    return placed


def test_a_device_that_is_not_there(placed):
    with pytest.raises(ValueError, match="--teacher_device xla:3: "):
        placed(teacher_device="xla:3")


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
@pytest.mark.parametrize(("dtype", "atol"), [("auto", 1e-5), ("bfloat16", 0.2), ("float16", 0.02)])
def test_a_placed_teacher_gives_the_logits_of_its_response(placed, phi_smollm, device, dtype, atol):
    teacher = placed(teacher_device=device, teacher_dtype=dtype)
    assert teacher.model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    side, expected = side_and_logits(phi_smollm.teacher, teacher.vocab_size)
    got = teacher.logits(side)
    assert got.dtype == teacher.model.dtype
    torch.testing.assert_close(got.float(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("on_disk", ["model.embed_tokens", "model.layers.1", "lm_head"])
def test_a_teacher_whose_layers_lie_apart(phi_smollm, tmp_path, on_disk):
    """As auto places one that is larger than its devices: hooks bring each layer's input and weights together."""
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {part: "disk" if part == on_disk else "cpu" for part in parts}
    model = AutoModelForCausalLM.from_pretrained(phi_smollm.teacher, device_map=places, offload_folder=tmp_path)
    side, expected = side_and_logits(phi_smollm.teacher, 32_000)
    teacher = LiveTeacher(model, 32_000)
    torch.testing.assert_close(teacher.logits(side), expected)
    rows, head = teacher.signal(side)
    torch.testing.assert_close(head(rows), expected)


def side_and_logits(path, n_tokens):
    """Two rows of 7 and 5 tokens, whose last 3 are the response, and the plain model's logits for those."""
    torch.manual_seed(0)
    rows = [torch.randint(3, 30_000, (length,)) for length in (7, 5)]
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits = [model(input_ids=ids[None]).logits[0, -4:-1, :n_tokens] for ids in rows]
    response = {"byte_ends": [1, 2, 3], "byte_start": 0}
    examples = [{"input_ids": ids, "response_start": len(ids) - 3, **response} for ids in rows]
    return Side.of(examples, "", pad_id=0), torch.cat(logits)


# --------------------------------------------------------------------------------------------------------------- LoRA


def lora_arguments(pair, dolly, output, **changes):
    arguments = {
        "model_name_or_path": pair.student,
        "train_file": dolly.train,
        "output_dir": output,
        "use_lora": True,
        "lora_rank": 8,
        "lora_dropout": 0.1,
        "merge_lora": True,
        "block_size": 96,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
    }
    return training_flags(**{**arguments, **changes})


def test_only_adapters_are_trained_and_saved(phi_smollm, dolly, tmp_path):
    """Through gradient checkpointing and a dropout too. (That what is saved was trained: `test_adapters.py`.)"""
    output = tmp_path / "out"
    run_script(SFT, *lora_arguments(phi_smollm, dolly, output))
    logged = steps(output)
    assert sum(e["loss"] for e in logged[-3:]) < 0.98 * sum(e["loss"] for e in logged[:3])
    for folder in (output / "checkpoint-8", output / "adapter"):
        assert not (folder / "model.safetensors").exists()
        weights = load_file(folder / "adapter_model.safetensors")
        assert weights and all("lora_A" in name or "lora_B" in name for name in weights)
    base, merged = (load_file(path / "model.safetensors") for path in (phi_smollm.student, output))
    assert base.keys() == merged.keys()
    for name in base:
        assert torch.equal(base[name], merged[name]) != ("_proj" in name), name


def test_an_adapter_is_not_merged_under_zero3(phi_smollm, dolly, tmp_path):
    words = lora_arguments(phi_smollm, dolly, tmp_path, deepspeed=ROOT / "config/deepspeed_zero3_config.json")
    done = run_script(SFT, *words, launch=launcher(1, deepspeed=True), fails=True)
    assert "--merge_lora is True: leave it out under ZeRO-3" in done.stderr
