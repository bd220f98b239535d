"""The arguments: defaults, ranges, spellings, contradictions; a bad one exits with status 2 and says what to change."""

import json

import pytest

from modeling.arguments import (
    DataArguments,
    DistillationArguments,
    StudentArguments,
    TrainingArguments,
    check_together,
    parse_arguments,
)
from modeling.run_clm_distill_CDM import CDMArguments

GROUPS = [StudentArguments, DistillationArguments, CDMArguments, DataArguments, TrainingArguments]


@pytest.fixture
def required(tmp_path):
    return {
        "model_name_or_path": "S",
        "teacher_path": "T",
        "teacher_to_student_id_mapping": "M",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": "true",
    }


@pytest.fixture
def parse(required):
    def parse(**arguments):
        given = {**required, **arguments}
        words = {name: value.split() for name, value in given.items()}
        return parse_arguments(GROUPS, "", [word for name in words for word in (f"--{name}", *words[name])])

    return parse


@pytest.fixture
def error_of(parse, capsys):
    def error_of(**arguments):
        with pytest.raises(SystemExit) as exit:
            parse(**arguments)
        assert exit.value.code == 2
        return capsys.readouterr().err

    return error_of


def test_defaults(parse):
    student, distillation, cdm, data, training = parse()
    assert (student.dtype, student.freeze_emb, student.freeze_layers) == ("float32", False, 0)
    assert (student.use_lora, student.lora_rank, student.lora_alpha, student.lora_dropout) == (False, 16, 32, 0.0)
    assert student.lora_target_modules == ["all-linear"]
    assert (distillation.kd_alpha, distillation.kd_temperature) == (0.5, 1.0)
    assert (distillation.teacher_dtype, distillation.teacher_device) == ("auto", None)
    assert distillation.teacher_zero3 is False
    assert (cdm.topk, cdm.simi_threshold, cdm.alignment, cdm.cross_weight) == (100, 0.3, "dtw", 0.5)
    assert cdm.same_tokenizer_teacher_path is None
    assert data.block_size == 512
    assert (training.logging_nan_inf_filter, training.logging_steps, training.merge_lora) == (False, 10, False)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("kd_alpha", ("0", "1"), ("-0.1", "1.1", "nan")),
        ("kd_temperature", ("0.01",), ("0", "-1", "nan")),
        ("cross_weight", ("0", "1"), ("-0.1", "1.1", "nan")),
        ("topk", ("1",), ("0",)),
        ("simi_threshold", ("1",), ("0", "1.1", "nan")),
        ("block_size", ("2",), ("1",)),
        ("max_train_samples", ("1",), ("0",)),
        ("max_eval_samples", ("1",), ("0",)),
        ("preprocessing_num_workers", ("1",), ("0",)),
        ("freeze_layers", ("0",), ("-1",)),
        ("lora_rank", ("1",), ("0",)),
        ("lora_alpha", ("1",), ("0",)),
        ("lora_dropout", ("0", "0.99"), ("-0.1", "1", "nan")),
        ("teacher_device", ("cpu", "cpu:0", "auto"), ("gpu", "cpu:x")),
    ],
)
def test_ranges(parse, error_of, name, good, bad):
    for value in good:
        parse(**{name: value})
    for value in bad:
        message = error_of(**{name: value})
        assert f"error: --{name} is " in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove_unused_columns": "true"}, "--remove_unused_columns is True: leave it out"),
        ({"average_tokens_across_devices": "false"}, "--average_tokens_across_devices is False: leave it out"),
        ({"use_lora": "true", "freeze_layers": "2"}, "--freeze_layers is 2: leave it out with --use_lora true"),
        ({"merge_lora": "true"}, "--merge_lora is True: give --use_lora true too"),
        ({"teacher_zero3": "true"}, "--teacher_zero3 is True: give --deepspeed CONFIG too"),
        (
            {"teacher_zero3": "true", "teacher_device": "cpu"},
            "--teacher_device is 'cpu': leave it out with --teacher_zero3 true",
        ),
    ],
)
def test_contradictions(error_of, arguments, message):
    assert message in error_of(**arguments)


def test_a_teacher_spread_over_the_devices_is_for_one_process(parse, monkeypatch):
    groups = parse(teacher_device="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--teacher_device is 'auto': every rank would spread a copy"):
        check_together(*groups)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("kd_alhpa", "Did you mean --kd_alpha?"),
        ("learning_rat3", "Did you mean --learning_rate?"),
        ("xyzzy", "--help lists all."),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest(error_of, name, near):
    assert f"unknown argument --{name}. {near}" in error_of(**{name: "1"})


def test_a_missing_argument_is_named(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments([StudentArguments], "", [])
    assert exit.value.code == 2 and "--model_name_or_path" in capsys.readouterr().err


def test_the_published_spelling(parse):
    assert parse(simi_threadshold="0.2")[2].simi_threshold == 0.2


def test_several_target_modules(parse):
    assert parse(lora_target_modules="q_proj v_proj")[0].lora_target_modules == ["q_proj", "v_proj"]


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
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }
    file.write_text(json.dumps({**required, **values}))
    student, distillation, cdm, data, training = parse_arguments(GROUPS, "", [str(file)])
    assert student.use_lora and student.lora_target_modules == ["q_proj", "v_proj"]
    assert (distillation.kd_alpha, cdm.simi_threshold, data.max_train_samples) == (0.25, 0.2, None)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kd_alpha": 0.5,\n}', "line 2: not valid JSON"),
        ("[1]", "it must hold one JSON object"),
        ('{"kd_alhpa": 0.5}', "Did you mean --kd_alpha?"),
        ('{"kd_alpha": 2}', "--kd_alpha is 2.0: give a number from 0"),
        (None, "No such file"),
    ],
)
def test_a_bad_json_file(required, tmp_path, capsys, text, message):
    file = tmp_path / "run.json"
    if text is not None:
        complete = text.replace("{", json.dumps(required)[:-1] + ", ") if text.startswith("{") else text
        file.write_text(complete)
    with pytest.raises(SystemExit) as exit:
        parse_arguments(GROUPS, "", [str(file)])
    assert exit.value.code == 2 and message in capsys.readouterr().err
