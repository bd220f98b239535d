"""The evaluations as users run them, offline: generation, instruction sets, lm_eval and EvalPlus on a tiny model."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling.text.rows import alpaca_prompt
from tests.end_to_end import rig
from tests.end_to_end.rig import ROOT, environment, flags, launcher, run_script, tiny_llama
from tests.unit.tokenizer_zoo import load_real, real_dir

GENERATE = "script_eval/generate.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("a model") / "tiny smollm", load_real("smollm2"), 49_216, layers=1)


@pytest.fixture(scope="module")
def data() -> Path:
    return real_dir() / "data"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> dict[int, str]:
    return {row["row"]: row["response"] for row in read(path)}


def evaluate(script: str, model: Path, *arguments: str, fails: bool = False, **settings: object):
    """Runs `NAME=… bash script_eval/SCRIPT …` on the CPU."""
    env = environment(PYTHON=rig.PYTHON, DEVICE="cpu", MODEL=str(model), **{k: str(v) for k, v in settings.items()})
    command = ["bash", str(ROOT / "script_eval" / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, f"{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    return done


def needs(module: str) -> None:
    assert importlib.util.find_spec(module), f"{module} is not installed: pip install -r requirements-eval.txt"


# --------------------------------------------------------------------------------------------------------- generation


def test_an_interrupted_run_gives_the_same_file_on_any_number_of_processes(model, data, tmp_path):
    common = flags(model=model, data=data / "dolly/valid.jsonl", seed=10, limit=11, max_length=192)
    whole, stopped, alone = (tmp_path / f"{name}.jsonl" for name in ("whole", "stopped", "one by one"))
    run_script(GENERATE, *common, *flags(output=whole, batch_size=2))
    assert sorted(texts(whole)) == list(range(11))
    assert all(0 < row["tokens"] <= 96 for row in read(whole))

    # Ended after the first batches, in the middle of a line.
    run_script(GENERATE, *common, *flags(output=stopped, batch_size=2))
    lines = stopped.read_text().splitlines(keepends=True)
    stopped.write_text("".join(lines[:3]) + '{"row": 10, "respon')
    run_script(GENERATE, *common, *flags(output=stopped, batch_size=2), launch=launcher(ranks=2))
    assert stopped.read_bytes() == whole.read_bytes()

    # Once more changes nothing; other settings are refused.
    run_script(GENERATE, *common, *flags(output=stopped, batch_size=2))
    assert stopped.read_bytes() == whole.read_bytes()
    refused = run_script(GENERATE, *common, *flags(output=stopped, batch_size=2, top_p=0.9), fails=True)
    assert "top_p: 1.0 then, 0.9 now" in refused.stderr and "Traceback" not in refused.stderr

    # Neither the neighbours nor the padding matter to a row's draws; only rounding could.
    run_script(GENERATE, *common, *flags(output=alone, batch_size=1))
    assert sum(texts(alone)[row] == text for row, text in texts(whole).items()) >= 10


def test_seeds_share_one_loading_and_differ(model, data, tmp_path):
    common = flags(model=model, data=data / "vicuna/valid.jsonl", limit=4, max_length=64)
    run_script(GENERATE, *common, "--seed", "10", "20", "--output", str(tmp_path / "{seed}.jsonl"))
    run_script(GENERATE, *common, *flags(seed=20, output=tmp_path / "again.jsonl"))
    assert texts(tmp_path / "20.jsonl") == texts(tmp_path / "again.jsonl") != texts(tmp_path / "10.jsonl")


def test_greedy_is_that_of_transformers_and_dskd_repeats_no_6_gram(model, data, tmp_path):
    rows = read(data / "dolly/valid.jsonl")[:3]
    common = ("--greedy", *flags(model=model, data=data / "dolly/valid.jsonl", limit=3, max_length=512))
    run_script(GENERATE, *common, *flags(output=tmp_path / "greedy.jsonl"))
    run_script(GENERATE, *common, "--dskd_compat", *flags(output=tmp_path / "dskd.jsonl"))
    tokenizer, llama = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for row, made in zip(rows, read(tmp_path / "greedy.jsonl")):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"][:, -256:]
        with torch.inference_mode():
            sequence = llama.generate(ids, do_sample=False, max_new_tokens=256, pad_token_id=0)
        assert made["response"] == tokenizer.decode(sequence[0, ids.shape[1] :], skip_special_tokens=True)

    def repeats(text: str) -> bool:
        tokens = tokenizer(text)["input_ids"]
        grams = [tuple(tokens[i : i + 6]) for i in range(len(tokens) - 5)]
        return len(set(grams)) < len(grams)

    assert any(repeats(text) for text in texts(tmp_path / "greedy.jsonl").values())
    assert not any(repeats(text) for text in texts(tmp_path / "dskd.jsonl").values())


# -------------------------------------------------------------------------------------------------------- instructions


def test_instruction_sets_from_one_call(model, data, tmp_path):
    output = tmp_path / "results of it"
    settings = {"DATA_DIR": data, "SEEDS": "10 20", "LIMIT": 3, "MAX_LENGTH": 64, "OUTPUT": output}
    done = evaluate("eval_dolly.sh", model, SETS="dolly uinst sinst", **settings)
    results = json.loads((output / "results.json").read_text())
    assert list(results["scores"]) == ["dolly", "sinst"] and results["missing"] == ["uinst"]
    assert results["seeds"] == [10, 20] and results["counts"] == {"dolly": 3, "sinst": 3}
    assert results["model"] == str(model) and results["versions"]["transformers"] and results["date"]
    assert results["settings"]["prompts_cut_on"] == "left" and results["settings"]["no_repeat_ngram_size"] == 0
    rouge = results["scores"]["sinst"]["rouge_l"]
    assert set(rouge["values"]) == {"10", "20"} and rouge["std"] is not None
    assert re.search(r"^uinst +missing$", done.stdout, re.MULTILINE)
    assert "n-gram blocking off, prompts cut on the left" in done.stdout

    # The other name goes on: a lost seed is made again, what is there is left alone (here: the references themselves).
    references = [row["output"] for row in read(data / "dolly/valid.jsonl")[:3]]
    made = [{**row, "response": reference} for row, reference in zip(read(output / "dolly/10.jsonl"), references)]
    (output / "dolly/10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    lost = (output / "dolly/20.jsonl").read_bytes()
    (output / "dolly/20.jsonl").unlink()
    evaluate("eval_instFollow.sh", model, SETS="dolly", **settings)
    assert read(output / "dolly/10.jsonl") == made
    assert (output / "dolly/20.jsonl").read_bytes() == lost
    again = json.loads((output / "results.json").read_text())["scores"]
    assert again["sinst"] == results["scores"]["sinst"]
    values = {"10": 100.0, "20": results["scores"]["dolly"]["rouge_l"]["values"]["20"]}
    assert again["dolly"]["rouge_l"]["values"] == values
    assert again["dolly"]["rouge_l"]["mean"] == (100 + values["20"]) / 2
    assert again["dolly"]["exact_match"]["values"]["10"] == 100.0

    # The responses are scored anew with another tokenizer, and not generated.
    done = evaluate("eval_dolly.sh", model, SETS="dolly sinst", ROUGE_TOKENIZER="unicode", **settings)
    assert "any script" in done.stdout and read(output / "dolly/10.jsonl") == made
    assert json.loads((output / "results.json").read_text())["settings"]["rouge_tokenizer"] == "unicode"
    assert "is none of rouge_score, unicode" in evaluate("eval_dolly.sh", model, ROUGE_TOKENIZER="x", fails=True).stderr

    refused = evaluate("eval_dolly.sh", model, SETS="dolly", **{**settings, "DSKD_COMPAT": 1}, fails=True)
    assert "dskd_compat: False then, True now" in refused.stderr
    settings |= {"DATA_DIR": tmp_path / "no data", "OUTPUT": tmp_path / "nothing"}
    nothing = evaluate("eval_dolly.sh", model, SETS="uinst", **settings, fails=True)
    assert "uinst: missing" in nothing.stderr and not (tmp_path / "nothing/results.json").exists()
    assert "MODEL is not set" in evaluate("eval_dolly.sh", "", fails=True).stderr


# ---------------------------------------------------------------------------------------------------------------- math


def test_gsm8k_through_the_harness(model, data, tmp_path):
    needs("lm_eval")
    output = tmp_path / "math results"
    settings = {"DATA_DIR": data, "LIMIT": 8, "MAX_NEW_TOKENS": 24, "BATCH_SIZE": 4, "OUTPUT": output}
    done = evaluate("eval_math.sh", model, **settings)
    results = json.loads((output / "results.json").read_text())
    scores = results["scores"]["GSM8K"]
    assert set(scores) == {"strict-match", "flexible-extract"} and results["counts"] == {"GSM8K": 8}
    assert results["settings"]["task_version"] == 3.0

    (samples,) = output.glob("harness/*/samples_*.jsonl")
    questions = [row["question"] for row in read(data / "gsm8k/test.jsonl")[:8]]
    for name, entry in scores.items():
        rows = sorted((row for row in read(samples) if row["filter"] == name), key=lambda row: row["doc_id"])
        assert [row["arguments"]["gen_args_0"]["arg_0"] for row in rows] == [alpaca_prompt(q) for q in questions]
        assert entry["mean"] == pytest.approx(100 * sum(row["exact_match"] for row in rows) / 8)
    for name in scores:
        assert re.search(rf"^{name} +\d+\.\d\d", done.stdout, re.MULTILINE)
    refused = evaluate("eval_math.sh", model, **{**settings, "NUM_FEWSHOT": 2}, fails=True)
    assert "num_fewshot: 0 then, 2 now" in refused.stderr


def test_a_chat_model_is_asked_in_its_template(model, data, tmp_path):
    """CHAT=1: the question alone, a system message, and the template, with the harness as with the own generator."""
    needs("lm_eval")
    settings = {"CHAT": 1, "SYSTEM": "Be brief.", "DATA_DIR": data, "LIMIT": 2, "BATCH_SIZE": 2}
    evaluate("eval_math.sh", model, MAX_NEW_TOKENS=8, OUTPUT=tmp_path / "math", **settings)
    (samples,) = (tmp_path / "math").glob("harness/*/samples_*.jsonl")
    questions = [row["question"] for row in read(data / "gsm8k/test.jsonl")[:2]]
    system, answer = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>assistant\n"
    expected = {f"{system}<|im_start|>user\n{question}<|im_end|>\n{answer}" for question in questions}
    assert {row["arguments"]["gen_args_0"]["arg_0"] for row in read(samples)} == expected
    made_with = json.loads((tmp_path / "math/results.json").read_text())["settings"]
    assert made_with["chat"] is True and "Be brief." in made_with["further_arguments"]

    evaluate("eval_dolly.sh", model, SETS="dolly", SEEDS=10, MAX_LENGTH=96, OUTPUT=tmp_path / "dolly", **settings)
    made_with = json.loads((tmp_path / "dolly/results.json").read_text())["settings"]
    assert (made_with["chat"], made_with["system"]) == (True, "Be brief.")
    refused = evaluate("eval_dolly.sh", model, **{**settings, "CHAT": 0}, fails=True)
    assert "SYSTEM and TEMPLATE_KWARGS go with CHAT=1" in refused.stderr


# ---------------------------------------------------------------------------------------------------------------- code


# EvalPlus 0.3.1 compares its answers, but does not count them as compared: not even its own solution passes.
NEVER_PASSES = "HumanEval/32"


def right_only_on_base_tests(task: dict) -> str:
    """Finds the original tests' answers, and no others."""
    name = task["entry_point"]
    function = (task["prompt"] + task["canonical_solution"]).replace(f"def {name}(", "def right(")
    known = {repr(tuple(inputs)) for inputs in task["base_input"]}
    return f"{function}\n\nknown = {known!r}\n\ndef {name}(*inputs):\n" + (
        "    return right(*inputs) if repr(inputs) in known else 'wrong'\n"
    )


def test_planted_solutions_score_exactly_that(model, data, tmp_path):
    needs("evalplus")
    with gzip.open(data / "evalplus/HumanEvalPlus.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line in file]
    for task in tasks:  # of up to a thousand further tests, which take EvalPlus a minute
        task["plus_input"] = task["plus_input"][:20]
    local = tmp_path / "local"
    local.mkdir()
    (local / "HumanEvalPlus.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    planted, expected = [], {"base": 0, "plus": 0}
    for row, task in enumerate(tasks[2:], 2):  # the model is left to do the first two, and fails
        function = task["prompt"] + task["canonical_solution"]
        kind = row % 6
        if row in (12, 42):  # neither recursive nor with tests alone in the original ones
            response, kind = right_only_on_base_tests(task), 3
        elif kind == 3:
            response = f"def {task['entry_point']}(*inputs):\n    return 'wrong'"
        elif kind == 4:
            response = "I am sorry, I do not know."
        else:
            response = (function, task["canonical_solution"], f"So:\n```python\n{function}\n```")[kind % 3]
        right = kind not in (3, 4) and task["task_id"] != NEVER_PASSES
        expected["base"] += right or row in (12, 42)
        expected["plus"] += right
        planted.append({"row": row, "response": response, "tokens": 9, "ended": True, "cut": False})

    output = tmp_path / "code results"
    (output / "humaneval").mkdir(parents=True)
    generations = output / "humaneval/generations.jsonl"
    generations.write_text("".join(json.dumps(row) + "\n" for row in planted))
    settings = {"DATA_DIR": local, "DATASETS": "humaneval", "MAX_LENGTH": 128, "OUTPUT": output, "MIN_TIME_LIMIT": 20}
    done = evaluate("eval_code.sh", model, **settings)
    results = json.loads((output / "results.json").read_text())
    assert results["counts"] == {"HumanEval": 164, "HumanEval+": 164} and results["missing"] == []
    assert len(read(generations)) == 164
    statuses = json.loads((output / "humaneval/samples_eval_results.json").read_text())["eval"]
    passed = {test: sum(r[0][f"{test}_status"] == "pass" for r in statuses.values()) for test in ("base", "plus")}
    assert passed == expected
    for name, test in (("HumanEval", "base"), ("HumanEval+", "plus")):
        assert results["scores"][name]["pass@1"]["mean"] == pytest.approx(100 * expected[test] / 164)
        assert re.search(rf"^{re.escape(name)} +{100 * expected[test] / 164:.2f} +164$", done.stdout, re.MULTILINE)


def test_the_evaluations_print_their_commands(model, tmp_path):
    """DRY_RUN shows what would run, for several devices too, and writes nothing."""
    settings = {"DRY_RUN": 1, "NPROC": 4, "DEVICE": "npu", "OUTPUT": tmp_path / "none", "DATA_DIR": real_dir() / "data"}
    env = {k: str(v) for k, v in settings.items()} | {"MODEL": str(model), "PYTHON": sys.executable}
    for script in ("eval_dolly.sh", *(["eval_math.sh"] if importlib.util.find_spec("lm_eval") else [])):
        command = ["bash", str(ROOT / "script_eval" / script)]
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "torch.distributed.run --nproc_per_node 4" in done.stdout
        assert "--use_cpu" not in done.stdout
    assert not (tmp_path / "none").exists()
