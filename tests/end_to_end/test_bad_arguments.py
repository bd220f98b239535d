"""The training scripts given what they cannot use: one message, status 2, before a model's weights are read.

Each script's own `main` runs in this process, on small models with small tokenizers.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    Qwen2Config,
)

from get_vocab_mapper.mapper import VocabMapper
from modeling.models.language_model import LanguageModel
from tests.end_to_end.rig import launcher, run_script, steps, training_flags
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

SCRIPTS = {
    "SFT": "sft",
    "FKD": "llms_fkd",
    "RKD": "llms_rkd",
    "ULD": "uld",
    "MinED": "MinED",
    "CDM": "distill_CDM",
    "Strict": "strict",
    "BPM": "bpm",
    "GOLD": "gold",
    "SimCT": "simct",
    "ALM": "alm",
}
CONTEXT = 1024  # of the small models
POISON = "Zürich"  # stands in one row alone, POISON_ROW
POISON_ROW = 4


@pytest.fixture(scope="module")
def rig(small_pair, tmp_path_factory):
    """The small pair, and five rows, of which one alone has POISON in it."""
    texts = [text for text in SAMPLE_TEXTS if POISON not in text]
    rows = [{"prefix": f"Say {i}: ", "text": text} for i, text in enumerate(texts[:5], 1)]
    rows[POISON_ROW - 1]["prefix"] = f"Say it in {POISON}: "
    train = tmp_path_factory.mktemp("rows") / "train.json"
    train.write_text(json.dumps(rows), encoding="utf-8")
    return SimpleNamespace(**vars(small_pair), train=train)


@pytest.fixture
def call(rig, main, tmp_path):
    """`call(method, flag=value, …)` runs the script's main; gives `(exit status, stderr)`. None leaves a flag out."""

    def call(method, **changes):
        arguments = {
            "model_name_or_path": rig.student,
            "train_file": rig.train,
            "output_dir": tmp_path / "out",
            "block_size": 128,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "sequential",
        }
        if method != "SFT":
            arguments["teacher_path"] = rig.same if method in ("FKD", "RKD") else rig.teacher
        mapper = {"MinED": rig.mined, "BPM": rig.prefixem} | dict.fromkeys(("CDM", "Strict", "GOLD", "SimCT"), rig.em)
        if method in mapper:
            arguments["teacher_to_student_id_mapping"] = mapper[method]
        run = main(SCRIPTS[method], **{**arguments, **changes})
        return run.status, run.stderr

    return call


@pytest.fixture
def refused(call, monkeypatch):
    """`refused(method, …)` gives the message of a script that ended on it before any weights were read."""

    def no_weights(*_, **__):
        raise AssertionError("weights were read")

    def refused(method, **changes):
        with monkeypatch.context() as patched:
            patched.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
            status, said = call(method, **changes)
        start = f"run_clm_{SCRIPTS[method]}.py: error: "
        lines = [line for line in said.splitlines() if line.startswith(start)]
        assert status == 2 and len(lines) == 1 and "Traceback" not in said
        return lines[0].removeprefix(start)

    return refused


# ----------------------------------------------------------------------------------------------------------- mappers


def newer(rig, path):
    save_file({"a": torch.zeros(1)}, path, {"format": "cdm-vocab-mapper", "format_version": "99"})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda rig, path: None, "There is no vocabulary mapper at"),
        (lambda rig, path: path.write_bytes(rig.em.read_bytes()[:-1]), "is damaged"),
        (lambda rig, path: shutil.copy(rig.student / "model.safetensors", path), "but no vocabulary mapper"),
        (newer, "version '99'"),
        (lambda rig, path: path.with_suffix(".json").write_text('{"0": 100000}'), "'0': 100000 is no pair of ids"),
    ],
)
@pytest.mark.parametrize("method", ["CDM", "MinED"])
def test_a_mapper_that_cannot_be_used(rig, refused, method, write, reason, tmp_path):
    """What `tests/unit/test_vocab_mapper.py` holds the files to, through the flag: file, reason, and what to do."""
    path = tmp_path / "some.safetensors"
    write(rig, path)
    (path,) = list(tmp_path.glob("some*")) or [path]
    message = refused(method, teacher_to_student_id_mapping=path)
    assert message.startswith("--teacher_to_student_id_mapping: ") and reason in message
    script = "get_MinED_mapper.py" if method == "MinED" and "no vocabulary mapper at" in reason else "get_"
    assert str(path) in message and f"python get_vocab_mapper/{script}" in message and f"'{rig.teacher}'" in message


@pytest.mark.parametrize("method", ["CDM", "MinED"])
def test_a_mapper_of_another_pair_and_exchanged_sides(rig, refused, method):
    message = refused(method, teacher_path=rig.same)
    for part in (f"'{rig.teacher}' (", f"'{rig.student}' (", f"the teacher is '{rig.same}' ("):
        assert part in message
    message = refused(method, teacher_path=rig.student, model_name_or_path=rig.teacher)
    assert "have changed places here. Exchange the two models" in message


@pytest.mark.parametrize("method", ["CDM", "MinED"])
def test_a_published_file_with_missing_ids_is_taken(call, method, tmp_path):
    path = tmp_path / "published.json"
    path.write_text('{"300": 30, "301": 31}')
    with pytest.warns(UserWarning, match=r"It leaves out \d+ of the \d+ teacher ids, the first of them 0;"):
        status, _ = call(method, teacher_to_student_id_mapping=path, max_steps=1)
    assert status == 0


def test_pairs_of_a_published_file_with_unlike_bytes_are_not_shared_tokens(refused, tmp_path):
    path = tmp_path / "published.json"
    path.write_text('{"300": 30, "301": 31}')
    with pytest.warns(UserWarning, match="It leaves out"):
        assert "share no token" in refused("Strict", teacher_to_student_id_mapping=path)


def test_a_threshold_above_the_mappers(rig, refused):
    message = refused("CDM", simi_threshold=0.5)
    assert f"{rig.em} holds similar tokens below 0.3 only, and --simi_threshold 0.5 is asked for. Give 0.3" in message
    assert message.endswith("--simi_threshold 0.5")


@pytest.mark.parametrize(("method", "kind", "script"), [("MinED", "mined", "MinED"), ("BPM", "prefixem", "prefixEM")])
def test_a_method_wants_its_own_kind(rig, refused, method, kind, script):
    message = refused(method, teacher_to_student_id_mapping=rig.em)
    for part in (f"{rig.em} is of the kind 'em'", f"'{kind}'", f"get_vocab_mapper/get_{script}_mapper.py"):
        assert part in message


@pytest.mark.parametrize("beta", ["-0.1", "1.1", "nan"])
def test_a_beta_that_is_no_share(refused, beta):
    assert f"--beta is {beta}: give a number from 0 (forward KL) to 1 (reverse KL)" in refused("BPM", beta=beta)


@pytest.mark.parametrize("method", ["Strict", "BPM", "GOLD", "SimCT", "ALM"])
def test_what_is_not_kept_of_a_teacher_cannot_be_read(refused, tmp_path, method):
    message = refused(method, teacher_cache=tmp_path / "cache", teacher_cache_topk=50)
    assert message.startswith("--teacher_cache_topk is 50: leave it out: this method reads the teacher's probability")
    assert "the text's own tokens" in message


def test_vocabularies_without_a_common_token(refused, rig, monkeypatch):
    none = np.zeros(0, dtype=np.int64)
    monkeypatch.setattr(VocabMapper, "mutual_pairs", lambda *_: (none, none))
    for method in ("Strict", "SimCT", "GOLD"):
        assert "share no token" in refused(method)


@pytest.mark.parametrize("method", ["FKD", "RKD"])
def test_different_tokenizers(rig, refused, method):
    message = refused(method, teacher_path=rig.teacher)
    for part in (
        *(f"--teacher_path {rig.teacher}", str(rig.student), "id 0 is '<|endoftext|>' in the student's and '<unk>' in"),
        *("run_clm_distill_CDM.py", "run_clm_MinED.py", "run_clm_uld.py"),
    ):
        assert part in message


def test_a_second_teacher_with_another_tokenizer(rig, refused):
    message = refused("CDM", same_tokenizer_teacher_path=rig.teacher)
    assert message.startswith(f"--same_tokenizer_teacher_path {rig.teacher}: ") and "are not the same" in message


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("method", SCRIPTS)
def test_every_script_ends_with_one_message(refused, method):
    """What `tests/unit/test_arguments.py` holds `parse_arguments` to, through each script."""
    temperature = [({"kd_temperature": "nan"}, "--kd_temperature is nan: give a finite number above 0.")]
    for changes, message in (
        ({"learning_rate": "nan"}, "--learning_rate is nan: give a finite number, 0 or more."),
        ({"blok_size": 9}, "unknown argument --blok_size. Did you mean --block_size?"),
        ({"model_name_or_path": None}, "the following arguments are required: --model_name_or_path"),
        ({"train_file": None}, "--do_train true needs --train_file FILE."),
        ({"do_eval": True}, "--do_eval true needs --validation_file FILE."),
        ({"fp16": True}, "--fp16 is True: on a CPU it would be ignored, and training run in float32."),
        *(temperature if method != "SFT" else []),
    ):
        assert refused(method, **changes).startswith(message)


@pytest.mark.parametrize(
    ("quantization", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "of tomorrow"}, "of tomorrow"),
    ],
)
def test_quantised_weights_whose_package_is_not_installed(rig, refused, quantization, package, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(rig.same, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    for method, flag in (("FKD", "teacher_path"), ("SFT", "model_name_or_path")):
        message = refused(method, **{flag: quantized})
        assert message.startswith(f"--{flag} {quantized}: its weights are quantised, and that cannot be read here: ")
        assert package in message


def test_an_attention_that_is_not_to_be_had(rig, refused, call):
    for kind in ("flash_attention_2", "flash_attention_3", "slow_attention"):
        message = refused("ULD", attn_implementation=kind)
        assert message.startswith(f"--attn_implementation {kind}: --model_name_or_path {rig.student} cannot be run")
    assert call("ULD", attn_implementation="eager", max_steps=1)[0] == 0


def test_layers_that_can_be_adapted_are_named(rig, call, tmp_path):
    """peft does not adapt all linear layers of a Mamba, and none of another model's names. What is named trains."""
    tokenizer = byte_level_bpe()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**sizes, eos_token_id=tokenizer.eos_token_id))
    mamba.save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    for student, wish, layers, refused in (
        (tmp_path / "mamba", "all-linear", "dt_proj in_proj out_proj x_proj", "out_proj"),
        (rig.student, "c_attn", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", ""),
    ):
        lora = {"model_name_or_path": student, "use_lora": True, "max_steps": 1}
        status, said = call("SFT", **lora, lora_target_modules=wish)
        assert status == 2 and f"run_clm_sft.py: error: --lora_target_modules {wish}: " in said
        assert refused in said and said.endswith(f"linear layers: {layers}.\n")
        named = [name for name in layers.split() if name != refused]
        assert call("SFT", **lora, lora_target_modules=named)[0] == 0


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_metrics_that_an_evaluation_gives_are_known_before_it(rig, refused, call, method, tmp_path):
    best = {"do_eval": True, "validation_file": rig.train, "metric_for_best_model": "rougeL"}
    if method == "CDM":
        best["same_tokenizer_teacher_path"] = rig.same
    message = refused(method, **best)
    start = "--metric_for_best_model is 'rougeL': an evaluation gives "
    known = message.removeprefix(start).removesuffix(". Give one of them.").split(", ")
    assert message.startswith(start)
    assert call(method, **{**best, "metric_for_best_model": "eval_ce_loss"}, do_train=None)[0] == 0
    given = json.loads((tmp_path / "out/eval_results.json").read_text())
    about_time = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    assert {f"eval_{name}" for name in known} == {key for key in given if key.startswith("eval_")} - {*about_time}


@pytest.mark.parametrize("method", SCRIPTS)
def test_examples_longer_than_a_model_reads(rig, refused, method):
    message = refused(method, block_size=CONTEXT + 1)
    assert message == (
        f"--block_size is {CONTEXT + 1}: --model_name_or_path {rig.student} reads {CONTEXT} tokens at most "
        f"(max_position_embeddings in its config.json). Give --block_size {CONTEXT} or less."
    )


@pytest.mark.parametrize("method", ["FKD", "ULD", "CDM"])
def test_examples_longer_than_the_teacher_reads(rig, refused, method, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    source = rig.same if method == "FKD" else rig.teacher
    for file in source.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(source)
    config.max_position_embeddings = 64
    config.save_pretrained(short)
    assert f"--block_size is 65: --teacher_path {short} reads 64 tokens at most" in refused(
        method, teacher_path=short, block_size=65
    )
    if method == "CDM":
        message = refused("CDM", same_tokenizer_teacher_path=short, block_size=65)
        assert message.startswith(f"--block_size is 65: --same_tokenizer_teacher_path {short} reads 64")


def test_how_many_tokens_models_were_made_for():
    llama_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
    llama_3 |= {"high_freq_factor": 4.0, "rope_theta": 500_000.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    for config, longest in (
        (GPT2Config(), 1024),
        (OPTConfig(), 2048),
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (LlamaConfig(max_position_embeddings=131_072, rope_parameters=llama_3), 131_072),
        (Qwen2Config(max_position_embeddings=32_768, rope_parameters=yarn), 131_072),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters=linear), 8192),
        (BloomConfig(), None),
    ):
        model = LanguageModel("a model", "model_name_or_path")
        vars(model)["config"] = config  # as if it had been read
        assert model.longest_input == longest


def test_more_frozen_layers_than_there_are(call):
    status, said = call("SFT", freeze_layers=2)
    assert status == 2 and "--freeze_layers is 2: " in said and " has 1 layers." in said


def test_topk_above_the_vocabulary_is_all_of_it(rig, call, tmp_path):
    smaller = len(byte_level_bpe())
    losses = {}
    for topk in (smaller, 10**6):
        status, said = call("CDM", topk=topk, output_dir=tmp_path / str(topk), max_steps=1)
        assert status == 0
        losses[topk] = steps(tmp_path / str(topk))[0]["kd_loss"]
        warning = f"--topk is {topk}, and the smaller vocabulary has {smaller} tokens: all are taken."
        assert said.count(warning) == (topk > smaller)
    assert losses[smaller] == losses[10**6] > 0


@pytest.mark.parametrize(("alpha", "part"), [(1, "ce_loss"), (0, "kd_loss")])
def test_one_loss_alone(call, tmp_path, alpha, part):
    """kd_alpha 1 is SFT, and that is said once; kd_alpha 0 is a wish like any other."""
    status, said = call("CDM", kd_alpha=alpha)
    assert status == 0
    assert said.count("this is plain SFT. modeling/run_clm_sft.py does the same") == alpha
    for entry in steps(tmp_path / "out"):
        assert entry["loss"] == pytest.approx(entry[part], rel=1e-6) and entry["kd_loss"] > 0


# ----------------------------------------------------------------------------------------------------------- numbers


def poisoned(source, folder):
    """The model, with a NaN in the embedding of a token that stands in the row POISON_ROW alone."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = sentencepiece_bpe() if source.name == "teacher" else byte_level_bpe()
    others = " ".join(f"Say 12345 it in: {text}" for text in SAMPLE_TEXTS if POISON not in text)
    only_there = set(tokenizer(POISON)["input_ids"]) - set(tokenizer(others)["input_ids"])
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][max(only_there)] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_nan_stops_with_the_row_and_nothing_is_saved_after_it(rig, call, tmp_path, method):
    """Rows 1 and 2 make step 1; rows 3 and 4 step 2, in which the teacher (of SFT, the model) has a NaN."""
    source = rig.student if method == "SFT" else rig.same if method in ("FKD", "RKD") else rig.teacher
    flag = "model_name_or_path" if method == "SFT" else "teacher_path"
    changes = {flag: poisoned(source, tmp_path / source.name), "save_strategy": "steps", "save_steps": 1}
    status, said = call(method, **changes, save_only_model=True)
    what = "the student's cross-entropy is NaN or infinite" if method == "SFT" else "the teacher's logits hold a NaN"
    message = f"run_clm_{SCRIPTS[method]}.py: error: In step 2, rank 0, row {POISON_ROW} of --train_file: {what}"
    assert status == 2 and message in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["checkpoint-1"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_nan_in_evaluation(rig, call, tmp_path):
    changes = {"do_train": None, "train_file": None, "do_eval": True, "validation_file": rig.train}
    status, said = call("ULD", **changes, teacher_path=poisoned(rig.teacher, tmp_path / "teacher"))
    assert status == 2
    assert f"In evaluation after step 0, rank 0, row {POISON_ROW} of --validation_file: the teacher's logits" in said


DEFERRED = """
from modeling.training.finite_check import FiniteCheck
from modeling.run_clm_sft import main

start = FiniteCheck.__init__


def deferred(self, accelerator):
    start(self, accelerator)
    self.deferred = True


FiniteCheck.__init__ = deferred
main()
"""


def test_two_ranks_that_look_when_they_save(rig, tmp_path):
    """As on accelerators. The NaN is in rank 1's half of step 2, and step 3 saves: no rank does."""
    script = tmp_path / "deferred.py"
    script.write_text(DEFERRED)
    arguments = training_flags(
        model_name_or_path=poisoned(rig.student, tmp_path / "student"),
        train_file=rig.train,
        output_dir=tmp_path / "out",
        block_size=128,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        save_steps=3,
        logging_steps=10,
    )
    done = run_script(str(script), *arguments, launch=launcher(2), fails=True)
    message = f"deferred.py: error: In step 2, rank 1, row {POISON_ROW} of --train_file: the student's cross-entropy"
    assert done.stderr.count(message) == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))
