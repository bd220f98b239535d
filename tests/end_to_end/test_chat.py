"""Chats as users train and ask them: step 1 by hand, students that end by themselves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.end_to_end.rig import flags, run_script, steps, tiny_llama
from tests.reference import chat_oracle as oracle
from tests.unit import chat_templates as made
from tests.unit.tokenizer_zoo import load_real

ROWS = [
    ("Be brief.", [("What is blue?", "The sky.")], "And “red”?", "Mars – 火星, in its dust 🙂"),
    (None, [], "Write a loop.", "for i in range(10):\n\tprint(i)"),
    (None, [], "Say 1234567.", "1234567"),
]


def messages(system: str | None, turns: list[tuple[str, str]], question: str, answer: str) -> list[dict]:
    front = [{"role": "system", "content": system}] if system else []
    texts = [text for turn in turns for text in turn] + [question, answer]
    return front + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def chat_file(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps({"messages": messages(*row)}) for row in rows), encoding="utf-8")
    return path


def set_generation_eos(folder: Path, ids: list[int]) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))


def train(script: str, output: Path, **arguments) -> Path:
    common = {"do_train": "true", "use_cpu": "true", "output_dir": output, "report_to": "none", "save_strategy": "no"}
    return run_script(f"modeling/{script}", *flags(**common, **arguments))


# ------------------------------------------------------------------------------------------------------ step 1 by hand


def losses_by_hand(names: tuple[str, str], folders: tuple[Path, Path], stops: list[list[int]], ends: list[int], kd):
    """`(CE, KD)` a response token, of a student and a teacher."""
    sides = [(load_real(name), LlamaForCausalLM.from_pretrained(folder)) for name, folder in zip(names, folders)]
    ce, total, n_tokens = 0.0, 0.0, 0
    for system, turns, question, answer in ROWS:
        said = [
            oracle.response_logits(
                model, tokenizer, oracle.PROMPTS[name](system, turns, question), answer, oracle.ENDS[name]
            )
            for name, (tokenizer, model) in zip(names, sides)
        ]
        ce += oracle.cross_entropy(*said[0])
        total += kd(*(oracle.with_one_end(z, own, end) for (z, _), own, end in zip(said, stops, ends)))
        n_tokens += len(said[0][1])
    return (ce / n_tokens).item(), (total / n_tokens).item()


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize(("teacher", "student"), [("phi-3", "smollm2"), ("llama-3", "qwen2")])
def test_step_1_of_two_templates(tmp_path, teacher, student, chunk):
    """Each side sees its own prompt; all of the teacher's stop tokens are one end, that of the student's another."""
    stops = {
        "phi-3": [32_000, 32_001, 32_007],
        "llama-3": [128_001, 128_009],
        "smollm2": [2, 0],
        "qwen2": [151_645, 151_643],
    }
    folders = [
        tiny_llama(tmp_path / name, load_real(name), len(load_real(name)) + 64, seed=seed)
        for seed, name in enumerate((student, teacher))
    ]
    for folder, name in zip(folders, (student, teacher)):
        set_generation_eos(folder, stops[name])
    done = train(
        "run_clm_uld.py",
        tmp_path / "out",
        **{"model_name_or_path": folders[0], "teacher_path": folders[1], "logits_chunk": chunk},
        **{"train_file": chat_file(tmp_path / "train.jsonl", ROWS), "max_steps": 1, "logging_steps": 1},
        **{"per_device_train_batch_size": 3, "learning_rate": 0},
    )
    assert ("has no system role" in done.stderr) == (teacher == "phi-3")
    ends = [load_real(name).convert_tokens_to_ids(oracle.ENDS[name]) for name in (student, teacher)]
    ce, kd = losses_by_hand((student, teacher), folders, [stops[student], stops[teacher]], ends, oracle.uld)
    (logged,) = steps(tmp_path / "out")
    assert (logged["ce_loss"], logged["kd_loss"]) == pytest.approx((ce, kd), rel=1e-5)
    taught = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert taught[0] == ends[0] and set(taught) == set(stops[student])


@pytest.mark.parametrize(("script", "order"), [("run_clm_llms_fkd.py", (1, 0)), ("run_clm_llms_rkd.py", (0, 1))])
def test_step_1_of_one_tokenizer_whose_models_stop_elsewhere(tmp_path, script, order):
    folders = [tiny_llama(tmp_path / str(seed), load_real("smollm2"), 49_216, seed=seed) for seed in (0, 1)]
    set_generation_eos(folders[1], [2, 0])
    train(
        script,
        tmp_path / "out",
        **{"model_name_or_path": folders[0], "teacher_path": folders[1], "kd_temperature": 2, "max_steps": 1},
        **{"train_file": chat_file(tmp_path / "train.jsonl", ROWS), "logging_steps": 1, "learning_rate": 0},
    )

    def divergence(*sides):
        return oracle.kl(sides[order[0]], sides[order[1]], 2.0)

    ce, kd = losses_by_hand(("smollm2", "smollm2"), folders, [[2, 0], [2, 0]], [2, 2], divergence)
    (logged,) = steps(tmp_path / "out")
    assert (logged["ce_loss"], logged["kd_loss"]) == pytest.approx((ce, kd), rel=1e-5)


# -------------------------------------------------------------------------------------------- a student that can end


COLOURS = ("blue", "red", "green", "white", "black", "grey")
QUESTIONS = [(None, [], f"Name colour {i}.", f"It is {COLOURS[i % 6]}.") for i in range(24)]


def ended(model: Path, folder: Path) -> float:
    """The share of greedy answers that end by themselves."""
    (folder / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": row[2]}) for row in QUESTIONS))
    output = folder / f"{model.name}.jsonl"
    run_script(
        "script_eval/generate.py",
        *("--use_cpu", "--greedy", "--chat"),
        *flags(model=model, data=folder / "asked.jsonl", output=output, max_length=96, batch_size=24),
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len(QUESTIONS)
    return sum(row["ended"] for row in rows) / len(rows)


def test_a_base_student_learns_to_end_as_it_was_taught(tmp_path):
    """The base student's EOS is <|endoftext|>, the template that it is given ends answers with <|im_end|>; the teacher
    knows </s> and <end_of_turn>. After 60 steps on short answers the student ends by itself."""
    student = tiny_llama(tmp_path / "base", made.chatml_tokenizer(template=None), 402, hidden=64, seed=9)
    teacher = tiny_llama(tmp_path / "teacher", made.turns_tokenizer(), 602, hidden=64, seed=4)
    (tmp_path / "chatml.jinja").write_text(made.CHATML)
    data = chat_file(tmp_path / "train.jsonl", QUESTIONS)
    common = {"train_file": data, "max_steps": 60, "learning_rate": 5e-3, "per_device_train_batch_size": 24}
    train("run_clm_sft.py", tmp_path / "tuned", model_name_or_path=teacher, **common)
    assert ended(tmp_path / "tuned", tmp_path) > 0.9

    untrained = tmp_path / "untrained"
    train(
        "run_clm_sft.py",
        untrained,
        **{"model_name_or_path": student, "student_chat_template": tmp_path / "chatml.jinja"},
        **(common | {"max_steps": 1, "learning_rate": 0}),
    )
    assert ended(untrained, tmp_path) == 0

    trained = tmp_path / "trained"
    train(
        "run_clm_distill_CDM.py",
        trained,
        **{"model_name_or_path": student, "student_chat_template": tmp_path / "chatml.jinja"},
        **{"teacher_path": tmp_path / "tuned", **common},
    )
    assert ended(trained, tmp_path) > 0.9
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.chat_template == made.CHATML
    generation = json.loads((trained / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    # As anybody asks it: transformers stops where generation_config.json says.
    prompt = tokenizer.apply_chat_template(
        messages(*QUESTIONS[0])[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = LlamaForCausalLM.from_pretrained(trained)
    (ids,) = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    assert tokenizer.decode(ids[prompt["input_ids"].shape[1] :]) == "It is blue.<|im_end|>"


# ------------------------------------------------------------------------------------------ other sources, and adapters


def test_an_adapter_trained_on_a_data_set_of_parquet_files_remembers_its_end(tmp_path):
    """Of rows without messages, which --chat true reads as chats."""
    student = tiny_llama(tmp_path / "base", made.chatml_tokenizer(), 402)
    (tmp_path / "set").mkdir()
    rows = [{"prefix": question, "text": answer} for *_, question, answer in QUESTIONS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set/train-0.parquet")
    done = train(
        "run_clm_sft.py",
        tmp_path / "out",
        **{"model_name_or_path": student, "use_lora": "true", "train_file": f"{tmp_path}/set:train", "max_steps": 1},
        chat="true",
    )
    assert "24 examples" in done.stderr
    end = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [end, 0]
    assert load_file(tmp_path / "out/adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_is_refused(tmp_path):
    student = tiny_llama(tmp_path / "base", made.chatml_tokenizer(template=None), 402)
    teacher = tiny_llama(tmp_path / "teacher", made.turns_tokenizer(), 602)
    (tmp_path / "chatml.jinja").write_text(made.CHATML)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prefix": "a", "text": "b"}\n')
    refused = chat_file(tmp_path / "refused.jsonl", [*QUESTIONS[:2], (None, [("a", "b")], "c", "d")])
    lines = refused.read_text().splitlines()
    lines[1] = json.dumps(
        {"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}
    )
    lines[2] = json.dumps({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]})
    refused.write_text("\n".join(lines))

    def run(fails: bool = True, file: Path = refused, **more):
        arguments = {
            "model_name_or_path": student,
            "teacher_path": teacher,
            "train_file": file,
            "max_steps": 1,
            "do_train": "true",
        }
        arguments |= {"use_cpu": "true", "output_dir": tmp_path / "out", "save_strategy": "no", "report_to": "none"}
        return run_script("modeling/run_clm_uld.py", *flags(**arguments, **more), fails=fails).stderr

    assert "the student's tokenizer has no chat template. Give one: --student_chat_template FILE" in run()
    said = run(file=plain, system="Be brief.")
    assert "--system is 'Be brief.': " in said and "holds no messages. Give --chat true too" in said
    assert "--student_chat_template nowhere: " in run(student_chat_template="nowhere")
    assert "--template_kwargs is 'x'" in run(template_kwargs="x")
    said = run(fails=False, student_chat_template=tmp_path / "chatml.jinja")
    assert "2 of its 3 rows cannot be used" in said
    assert "1 row: the teacher's chat template refuses it (Roles must alternate user/assistant) (row 2)" in said
    assert "1 row: message 1 calls a tool or is its answer, and tools are not read (row 3)" in said
