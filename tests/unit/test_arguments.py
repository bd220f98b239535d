"""The arguments: defaults, ranges, spellings, contradictions; a bad one exits with status 2 and says what to change."""

import importlib
import json
import re
import sys

import huggingface_hub
import pytest
from huggingface_hub.utils import _http, httpx

from modeling.run_clm_alm import ALMArguments, ALMDistillationArguments
from modeling.run_clm_distill_CDM import CDMArguments
from modeling.run_clm_gold import GOLDArguments
from modeling.run_clm_strict import StrictArguments
from modeling.training.arguments import (
    DataArguments,
    DistillationArguments,
    LikelihoodArguments,
    StudentArguments,
)
from modeling.training.parsing import REPLACED, ArgumentParser, check_together, notes, parse_arguments
from modeling.training.training_arguments import TrainingArguments

GROUPS = [StudentArguments, DistillationArguments, CDMArguments, DataArguments, TrainingArguments]


@pytest.fixture
def required(tmp_path):
    return {
        "model_name_or_path": "S",
        "teacher_path": "T",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": "true",
        "do_train": "true",
        "train_file": "F",
    }


@pytest.fixture
def parse(required):
    def parse(*words, **arguments):
        given = {**required, **arguments}
        flags = [word for name, value in given.items() if value for word in (f"--{name}", *value.split())]
        return parse_arguments(GROUPS, "", [*flags, *words])

    return parse


@pytest.fixture
def error_of(parse, capsys):
    """What a user sees: one line on stderr, without usage, and status 2."""

    def error_of(*words, **arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            parse(*words, **arguments)
        assert exit.value.code == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and ": error: " in said.err
        return said.err

    return error_of


def test_defaults(parse):
    student, distillation, cdm, data, training = parse()
    assert (student.dtype, student.freeze_emb, student.freeze_layers) == ("float32", False, 0)
    assert (student.use_lora, student.lora_rank, student.lora_alpha, student.lora_dropout) == (False, 16, 32, 0.0)
    assert student.lora_target_modules == ["all-linear"]
    assert (distillation.kd_alpha, distillation.kd_temperature) == (0.5, 1.0)
    assert (distillation.teacher_dtype, distillation.teacher_device) == ("auto", None)
    assert distillation.teacher_zero3 is False
    assert (distillation.teacher_cache, distillation.teacher_cache_topk) == (None, None)
    assert distillation.teacher_cache_dtype == "auto"
    assert (cdm.topk, cdm.simi_threshold, cdm.alignment, cdm.cross_weight) == (100, 0.3, "dtw", 0.5)
    assert cdm.same_tokenizer_teacher_path is None
    assert (cdm.teacher_to_student_id_mapping, cdm.mapper_dir) == (None, None)
    assert data.block_size == 512
    assert (training.logging_nan_inf_filter, training.logging_steps, training.merge_lora) == (False, 10, False)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("kd_alpha", ("0", "1"), ("-0.1", "1.1", "nan", "inf")),
        ("kd_temperature", ("0.01",), ("0", "-1", "nan", "inf")),
        ("topk", ("1",), ("0", "-1")),
        ("simi_threshold", ("1",), ("0", "1.1", "nan", "inf")),
        ("block_size", ("2",), ("1",)),
        ("max_train_samples", ("1",), ("0",)),
        ("max_eval_samples", ("1",), ("0",)),
        ("preprocessing_num_workers", ("1",), ("0",)),
        ("freeze_layers", ("0",), ("-1",)),
        ("teacher_device", ("cpu", "cpu:0", "auto"), ("gpu", "cpu:x")),
        ("learning_rate", ("0", "1e-5"), ("-1", "nan", "inf")),
        ("weight_decay", ("0",), ("-1", "nan", "inf")),
        ("max_grad_norm", ("0",), ("-1", "nan", "inf")),
        ("warmup_steps", ("0", "0.1"), ("-1", "nan", "inf")),
        ("adam_beta1", ("0",), ("-0.1", "1", "nan")),
        ("adam_beta2", ("0",), ("-0.1", "1", "nan")),
        ("adam_epsilon", ("0",), ("-1", "nan")),
        ("num_train_epochs", ("0.5",), ("0", "-1", "nan", "inf")),
        ("max_steps", ("-1", "1"), ("0", "-2")),
        ("per_device_train_batch_size", ("1",), ("0", "-1")),
        ("per_device_eval_batch_size", ("1",), ("0", "-1")),
        ("gradient_accumulation_steps", ("1",), ("0", "-1")),
        ("logging_steps", ("1", "0.1"), ("0", "-1", "nan", "inf")),
        ("save_steps", ("1", "0.1"), ("0", "-1", "nan", "inf")),
        ("eval_steps", ("1", "0.1"), ("0", "-1", "nan", "inf")),
        ("save_total_limit", ("1",), ("0", "-1")),
        ("dataloader_num_workers", ("0",), ("-1",)),
        ("seed", ("0", str(2**32 - 1)), ("-1", str(2**32))),
        ("data_seed", ("0",), ("-1", str(2**32))),
    ],
)
def test_ranges(parse, error_of, name, good, bad):
    for value in good:
        parse(**{name: value})
    for value in bad:
        assert f"error: --{name} is " in error_of(**{name: value})


@pytest.mark.parametrize(
    ("name", "needs", "good", "bad"),
    [
        ("cross_weight", {"same_tokenizer_teacher_path": "T2"}, ("0", "1"), ("-0.1", "1.1", "nan")),
        ("lora_rank", {"use_lora": "true"}, ("1",), ("0",)),
        ("lora_alpha", {"use_lora": "true"}, ("1",), ("0",)),
        ("lora_dropout", {"use_lora": "true"}, ("0", "0.99"), ("-0.1", "1", "nan")),
        ("lora_target_modules", {"use_lora": "true"}, ("q_proj",), ()),
    ],
)
def test_ranges_of_what_needs_another_flag(parse, error_of, name, needs, good, bad):
    for value in good:
        parse(**{name: value, **needs})
    for value in (*good, *bad):
        if value != "0":  # the default of a dropout
            message = error_of(**{name: value})
            assert f"error: --{name} is " in message
            if value not in bad:
                assert f"give --{next(iter(needs))}" in message
    for value in bad:
        assert f"error: --{name} is " in error_of(**{name: value, **needs})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kd_alpha", "half", "argument --kd_alpha: invalid float value: 'half'"),
        ("topk", "1.5", "argument --topk: invalid int value: '1.5'"),
        ("alignment", "dwt", "argument --alignment: invalid choice: 'dwt'"),
        ("simi_threshold", "x", "argument --simi_threshold: invalid float value: 'x'"),
        ("do_train", "maybe", "argument --do_train: Truthy value expected: got maybe"),
    ],
)
def test_values_of_another_type(error_of, name, value, message):
    assert f"error: {message}" in error_of(**{name: value})


def test_what_is_legal_and_hardly_meant_is_said_once(parse, capsys):
    parse(kd_alpha="1", disable_tqdm="true")
    said = capsys.readouterr().err
    assert said.count("--kd_alpha is 1: the teacher teaches nothing, and this is plain SFT. modeling/run_clm_sft") == 1
    parse(kd_alpha="0")
    parse(kd_alpha="0.99")
    assert "kd_alpha" not in capsys.readouterr().err


def test_which_metric_is_better_where_smaller(parse):
    for metric, greater in (("perplexity", False), ("eval_bits_per_byte", False), ("loss", False), ("aligned", True)):
        assert parse(metric_for_best_model=metric)[-1].greater_is_better is greater
    assert parse(metric_for_best_model="perplexity", greater_is_better="true")[-1].greater_is_better is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove_unused_columns": "true"}, "--remove_unused_columns is True: leave it out"),
        ({"average_tokens_across_devices": "false"}, "--average_tokens_across_devices is False: leave it out"),
        ({"use_lora": "true", "freeze_layers": "2"}, "--freeze_layers is 2: leave it out with --use_lora true"),
        ({"use_lora": "true", "freeze_emb": "true"}, "--freeze_emb is True: leave it out with --use_lora true"),
        ({"merge_lora": "true"}, "--merge_lora is True: give --use_lora true too"),
        ({"do_train": ""}, "Nothing to do: give --do_train true, --do_eval true, or both."),
        ({"train_file": ""}, "--do_train true needs --train_file FILE."),
        ({"do_eval": "true"}, "--do_eval true needs --validation_file FILE."),
        ({"eval_strategy": "epoch"}, "--eval_strategy epoch needs --validation_file FILE."),
        ({"eval_on_start": "true"}, "--eval_on_start is True: give --do_eval true and --validation_file FILE too"),
        ({"load_best_model_at_end": "true"}, "--load_best_model_at_end requires the save and eval strategy to match"),
        ({"fp16": "true", "bf16": "true"}, "At most one of fp16 and bf16 can be True"),
        ({"fp16": "true"}, "--fp16 is True: on a CPU it would be ignored, and training run in float32. Give --bf16"),
        ({"label_smoothing_factor": "0.1"}, "--label_smoothing_factor is 0.1: leave it out, no loss here smooths"),
        ({"cross_weight": "0.3"}, "--cross_weight is 0.3: give --same_tokenizer_teacher_path too"),
        ({"deepspeed": "none.json"}, "none.json"),
        ({"lr_scheduler_kwargs": "{1}"}, "--lr_scheduler_kwargs is '{1}': give a JSON object"),
        ({"lr_scheduler_kwargs": "cycles"}, "--lr_scheduler_kwargs is 'cycles': give a JSON object"),
        ({"report_to": "paper"}, "--report_to is 'paper': give none, all, or some of "),
        ({"report_to": "neptune"}, "--report_to is 'neptune': it is not installed here"),
        ({"use_liger_kernel": "true"}, "--use_liger_kernel is True: liger-kernel is not installed"),
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"optim": "sgd", "optim_args": "momentum"}, "--optim sgd --optim_args momentum: "),
        ({"fsdp": "full_shard"}, "--fsdp (or accelerate's FSDP) is not in force on a CPU"),
        ({"push_to_hub": "true"}, "--push_to_hub is True: the hub cannot be written to (HF_HUB_OFFLINE is set)"),
        ({"teacher_zero3": "true"}, "--teacher_zero3 is True: give --deepspeed CONFIG too"),
        ({"teacher_cache_topk": "128"}, "--teacher_cache_topk is 128: give --teacher_cache DIR too"),
        ({"teacher_cache_dtype": "float16"}, "--teacher_cache_dtype is 'float16': give --teacher_cache DIR too"),
        ({"teacher_to_student_id_mapping": "M", "mapper_dir": "D"}, "--mapper_dir is 'D': leave it out with"),
        ({"teacher_cache": "C", "teacher_cache_topk": "0"}, "--teacher_cache_topk is 0: give 1 or more"),
        (
            {"teacher_cache": "C", "teacher_cache_topk": "99"},
            "--teacher_cache_topk is 99: the loss reads the 100 most probable tokens (--topk). Give at least as many",
        ),
        (
            {"teacher_zero3": "true", "teacher_device": "cpu"},
            "--teacher_device is 'cpu': leave it out with --teacher_zero3 true",
        ),
    ],
)
def test_contradictions(error_of, arguments, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for absent in ("is_liger_kernel_available", "transformers.trainer_optimizer.is_bitsandbytes_available"):
        module = "" if "." in absent else f"{TrainingArguments.__module__}."
        monkeypatch.setattr(f"{module}{absent}", lambda: False)
    assert message in error_of(**arguments)


def test_liger_kernels_on_a_cpu(error_of, monkeypatch):
    monkeypatch.setattr(f"{TrainingArguments.__module__}.is_liger_kernel_available", lambda: True)
    assert "--use_liger_kernel is True: leave it out on a CPU" in error_of(use_liger_kernel="true")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("cosine", '{"num_cycles": 0.5}', None),
        ("constant", None, None),
        ("warmup_stable_decay", '{"num_decay_steps": 10}', None),
        ("cosine_with_min_lr", '{"min_lr_rate": 0.1}', None),
        ("reduce_lr_on_plateau", '{"factor": 0.5}', None),
        ("warmup_stable_decay", None, "num_decay_steps"),
        ("cosine_with_min_lr", None, "min_lr or min_lr_rate should be set"),
        ("cosine", '{"min_lr_rate": 0.1}', "min_lr_rate"),
        ("constant", '{"num_cycles": 2}', "num_cycles"),  # transformers would pass over it
        ("reduce_lr_on_plateau", '{"factr": 0.5}', "factr"),
        ("cosine", '{"num_cycles": "many"}', "many"),
        ("polynomial", '{"lr_end": 1}', "lr_end (1) must be smaller"),
    ],
)
def test_a_schedule_has_the_settings_that_it_needs(parse, error_of, kind, settings, message):
    given = {"lr_scheduler_type": kind, "eval_strategy": "epoch", "validation_file": "F", "warmup_steps": "0.1"}
    words = ["--lr_scheduler_kwargs", settings] if settings else []
    if message is None:
        parse(*words, **given)
    else:
        said = error_of(*words, **given)
        assert f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings or '{}'}: " in said and message in said


def test_fsdp_is_refused_on_a_cpu_and_warned_of_elsewhere(parse, error_of, monkeypatch):
    groups = parse()
    assert not notes(*groups)
    groups[-1].fsdp = True
    (note,) = notes(*groups)
    assert "not tested with FSDP" in note and "--deepspeed" in note
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP) is not in force on a CPU" in error_of()


@pytest.mark.parametrize("answer", [401, httpx.ConnectError("Name or service not known")])
def test_the_hub_is_asked_before_the_work(error_of, monkeypatch, answer):
    def respond(request):
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, request=request)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: httpx.Client(transport=httpx.MockTransport(respond)))
    huggingface_hub.close_session()
    said = error_of(push_to_hub="true", hub_token="hf_x")
    huggingface_hub.close_session()
    assert "--push_to_hub is True: the hub cannot be written to" in said and "hf auth login" in said


def test_a_teacher_spread_over_the_devices_is_for_one_process(parse, monkeypatch):
    groups = parse(teacher_device="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--teacher_device is 'auto': every rank would spread a copy"):
        check_together(*groups)


def test_a_teacher_is_not_saved_over(error_of, tmp_path):
    (tmp_path / "T").mkdir()
    for name in ("teacher_path", "same_tokenizer_teacher_path"):
        message = error_of(**{name: f"{tmp_path}/T", "output_dir": f"{tmp_path}/T/../T"})
        assert f"the trained student would be saved over the teacher, --{name}. Give another folder" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kd_alhpa", "1"], "unknown argument --kd_alhpa. Did you mean --kd_alpha?"),
        (["--kd_alhpa=1"], "unknown argument --kd_alhpa. Did you mean --kd_alpha?"),
        (["--learning_rat3", "1"], "unknown argument --learning_rat3. Did you mean --learning_rate?"),
        (["--xyzzy", "1"], "unknown argument --xyzzy. --help lists all."),
        (["--xyzzy"], "unknown argument --xyzzy. --help lists all."),
        # Abbreviations are not taken: they would change their meaning with the next flag.
        (["--kd_temp", "2"], "unknown argument --kd_temp. Did you mean --kd_temperature?"),
        (["--max_grad=1"], "unknown argument --max_grad. Did you mean --max_grad_norm?"),
        (
            ["--kd_alhpa", "1", "--topk", "5", "--blok_size=9", "--kd_alhpa", "2"],
            "unknown argument --kd_alhpa. Did you mean --kd_alpha? unknown argument --blok_size. "
            "Did you mean --block_size?",
        ),
        # An unknown flag is named before what would be wrong because of it, and before other faults.
        (["--topk", "0", "--blok_size", "9"], "unknown argument --blok_size."),
        (["--topk", "5", "6"], "unexpected '6': in front of every value stands its flag."),
        (["extra"], "unexpected 'extra': in front of every value stands its flag."),
        (["run.json"], "unexpected 'run.json': in front of every value stands its flag. A JSON file of arguments"),
    ],
)
def test_unknown_flags_are_named_with_the_nearest(error_of, words, message):
    assert f"error: {message}" in error_of(*words)


def test_what_takes_the_place_of_an_argument_that_is_no_more(error_of, parse):
    parser = ArgumentParser(GROUPS, allow_abbrev=False)
    for name, instead in REPLACED.items():
        if f"--{name}" not in parser._option_string_actions:  # a release of transformers may still have it
            assert f"error: unknown argument --{name}. {instead}.\n" in error_of(f"--{name}", "1")
        for flag in re.findall(r"--\w+", instead):
            assert flag in parser._option_string_actions
    said = error_of("--warmup_ratio=0.1", "--kd_alhpa", "1")
    assert "Give --warmup_steps a number below 1" in said and "Did you mean --kd_alpha?" in said
    # What is named is taken.
    parse(train_sampling_strategy="group_by_length", warmup_steps="0.1")


def test_a_misspelt_flag_that_is_required_is_not_called_missing(error_of):
    message = error_of("--model_name_or_pth", "S", model_name_or_path="")
    assert "error: unknown argument --model_name_or_pth. Did you mean --model_name_or_path?" in message


def test_missing_arguments_are_named(error_of):
    message = error_of(model_name_or_path="", teacher_path="")
    assert message.endswith("error: the following arguments are required: --model_name_or_path, --teacher_path\n")


def test_the_published_spelling(parse):
    assert parse(simi_threadshold="0.2")[2].simi_threshold == 0.2


def test_several_target_modules(parse):
    assert parse(lora_target_modules="q_proj v_proj", use_lora="true")[0].lora_target_modules == ["q_proj", "v_proj"]


def test_the_rank_that_a_launcher_adds_is_passed_over(required):
    words = [word for name, value in required.items() for word in (f"--{name}", value)]
    parse_arguments(GROUPS, "", ["--local_rank=0", *words])


def test_one_json_file(required, tmp_path):
    file = tmp_path / "run.json"
    values = {
        "kd_alpha": 0.25,
        "simi_threadshold": 0.2,
        "use_lora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_train_samples": None,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }
    file.write_text(json.dumps({**required, **values}))
    student, distillation, cdm, data, training = parse_arguments(GROUPS, "", [str(file)])
    assert student.use_lora and student.lora_target_modules == ["q_proj", "v_proj"]
    assert (distillation.kd_alpha, cdm.simi_threshold, data.max_train_samples) == (0.25, 0.2, None)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kd_alpha": 0.5,\n nothing}', "line 2 is not valid JSON ("),
        (b"\xff\xfe\xff", "it is not UTF-8"),
        ("[1]", "it must hold one JSON object of argument names and values"),
        ('{"kd_alhpa": 0.5}', "unknown argument --kd_alhpa. Did you mean --kd_alpha?"),
        ('{"kd_alpha": 2}', "--kd_alpha is 2.0: give a number from 0"),
        ('{"kd_alpha": [0.5]}', "--kd_alpha is [0.5]: give one value, not a list"),
        ('{"kd_alpha": {"a": 1}}', "argument --kd_alpha: invalid float value: "),
        ("{}", "the following arguments are required: --model_name_or_path"),
        ("folder", "it cannot be read (Is a directory)"),
        (None, "it cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_json_file(required, tmp_path, capsys, content, message):
    """Every message names the file."""
    file = tmp_path / "run.json"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        rest = content.startswith("{") and content != "{}"
        file.write_text(content.replace("{", json.dumps(required)[:-1] + ", ", 1) if rest else content)
    with pytest.raises(SystemExit) as exit:
        parse_arguments(GROUPS, "", [str(file)])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert f"error: {file}: {message}" in said


@pytest.mark.parametrize(
    ("groups", "name", "good", "bad"),
    [
        ((StrictArguments,), "topk", ("0", "16"), ("-1",)),
        ((StrictArguments,), "span_weight", ("0", "0.5"), ("-0.1", "nan", "inf")),
        ((GOLDArguments,), "beta", ("0", "1"), ("-0.1", "1.1", "nan")),
        ((GOLDArguments,), "matched_weight", ("0", "1"), ("-0.1", "1.1", "nan")),
        ((ALMArguments,), "binarization_temperature", ("0.1", "100"), ("0", "-1", "nan", "inf")),
        ((ALMArguments,), "space_threshold", ("0", "1"), ("-0.1", "1.1", "nan")),
        ((ALMDistillationArguments, ALMArguments), "kd_temperature", ("1",), ("2", "0.5")),
        ((GOLDArguments,), "hybrid false --beta", (), ("0.3",)),
        ((GOLDArguments,), "hybrid false --matched_weight", (), ("0.3",)),
        ((GOLDArguments,), "hybrid false --mapper_dir", (), ("mappers",)),
        ((ALMArguments,), "debias none --space_threshold", ("0.1",), ("0.3",)),
        ((LikelihoodArguments,), "teacher_cache D --teacher_cache_topk", (), ("100",)),
    ],
)
def test_ranges_of_each_method(required, capsys, groups, name, good, bad):
    """Also what contradicts another flag, which then stands in front."""
    distillation = () if issubclass(groups[0], DistillationArguments) else (DistillationArguments,)
    types = [StudentArguments, *distillation, *groups, DataArguments, TrainingArguments]
    given = [word for flag, value in required.items() for word in (f"--{flag}", value)]
    for value in good:
        parse_arguments(types, "", [*given, *f"--{name} {value}".split()])
    for value in bad:
        with pytest.raises(SystemExit) as exit:
            parse_arguments(types, "", [*given, *f"--{name} {value}".split()])
        assert exit.value.code == 2 and f"error: --{name.split('--')[-1]} is " in capsys.readouterr().err


def test_values_in_a_json_file_that_look_like_flags(required, tmp_path):
    file = tmp_path / "run.json"
    file.write_text("\ufeff" + json.dumps({**required, "run_name": "--topk", "max_steps": -1}), encoding="utf-8")
    assert parse_arguments(GROUPS, "", [str(file)])[-1].run_name == "--topk"


@pytest.mark.parametrize(
    ("script", "name", "temperature"),
    [
        ("sft", "SFT", None),
        ("llms_fkd", "FKD", "2.0"),
        ("llms_rkd", "RKD", "2.0"),
        ("uld", "ULD", "1.0"),
        ("MinED", "MinED", "2.0"),
        ("distill_CDM", "CDM", "1.0"),
        ("strict", "Strict", "1.0"),
        ("gold", "GOLD", "1.0"),
        ("simct", "SimCT", "1.0"),
        ("alm", "ALM", "1.0"),
        ("bpm", "BPM", "1.0"),
    ],
)
def test_help_states_the_method_and_its_defaults(monkeypatch, capsys, script, name, temperature):
    """Of each script, and without a model."""
    monkeypatch.setattr(sys, "argv", [f"run_clm_{script}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"modeling.run_clm_{script}").main()
    text = capsys.readouterr().out
    assert exit.value.code in (0, None)
    assert name in text.split("options:")[0] and "--model_name_or_path" in text and "--block_size" in text
    assert ("--simi_threadshold" in text) == (name == "CDM")
    option = text[text.rindex("--kd_temperature") :] if temperature else ""  # behind the usage lines
    assert temperature is None or re.search(r"\(default:\s+([\d.]+)\)", option)[1] == temperature
