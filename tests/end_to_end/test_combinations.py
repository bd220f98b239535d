"""What users put together: a resized chat student, adapters, chunks, stored signals, a resumed run, a merged folder."""

import json
from types import SimpleNamespace

import pytest

from script_train.methods import methods
from tests.end_to_end.rig import flags, run_script, tiny_llama
from tests.unit.chat_templates import CHATML
from tests.unit.tokenizer_zoo import SAMPLE_TEXTS, byte_level_bpe, sentencepiece_bpe

METHODS = {method.name: method for method in methods()}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A student with two columns fewer than tokens, teachers for each `PAIR`, and rows with two answers each."""
    folder, tokenizers = tmp_path_factory.mktemp("chats"), (byte_level_bpe(), sentencepiece_bpe())
    for tokenizer in tokenizers:
        tokenizer.add_tokens(["<|im_end|>", "<|im_start|>"], special_tokens=True)
        tokenizer.chat_template = CHATML
    student, teacher = tokenizers
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": text},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": text[:40].strip()},
            ]
        }
        for i, text in enumerate(SAMPLE_TEXTS[:8])
    ]
    for name, part in (("train", rows), ("validation", rows[:3])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Say 1"}), encoding="utf-8")
    return SimpleNamespace(
        student=tiny_llama(folder / "student", student, len(student) - 2, layers=1, seed=1),
        none=None,
        any=tiny_llama(folder / "any", teacher, len(teacher) + 7, layers=1, seed=2),
        same=tiny_llama(folder / "same", student, len(student) + 9, layers=1, seed=3),
        folder=folder,
        end=student.convert_tokens_to_ids("<|im_end|>"),
    )


@pytest.mark.parametrize("method", METHODS)
def test_all_at_once(chats, main, tmp_path, method):
    output, validation = tmp_path / "output", chats.folder / "validation.json"
    script, teacher = METHODS[method].script.stem.removeprefix("run_clm_"), getattr(chats, METHODS[method].pair)
    settings = {
        **{"model_name_or_path": chats.student, "teacher_path": teacher, "train_on": "all"},
        **{"train_file": chats.folder / "train.json", "validation_file": validation, "output_dir": output},
        **{"do_train": True, "do_eval": True, "use_lora": True, "merge_lora": True, "learning_rate": 1e-3},
        **{"logits_chunk": 7, "teacher_cache": teacher and tmp_path / "cache", "per_device_train_batch_size": 4},
        **{"save_strategy": "steps", "save_steps": 1},
    }
    assert main(script, **settings, max_steps=2).status == 0
    resumed = main(script, **settings, max_steps=4)
    assert resumed.status == 0 and "Resuming from" in resumed.stderr
    trained = json.loads((output / "eval_results.json").read_text())
    evaluation = {"model_name_or_path": output, "validation_file": validation, "train_on": "all"}
    evaluation |= {"do_train": False, "do_eval": True}
    assert main("sft", **evaluation, output_dir=tmp_path / "evaluated").status == 0
    evaluated = json.loads((tmp_path / "evaluated/eval_results.json").read_text())
    assert evaluated["eval_ce_loss"] == pytest.approx(trained["eval_ce_loss"], rel=1e-6)
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert ends[0] == chats.end
    run_script(
        "script_eval/generate.py",
        *("--chat", "--greedy", "--use_cpu"),
        *flags(model=output, data=chats.folder / "prompts.jsonl", output=tmp_path / "said.jsonl", max_length=64),
    )
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 1
