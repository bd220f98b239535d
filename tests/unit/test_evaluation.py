"""The Python of script_eval: drawing, prompts, files that are resumed, scores, and the summary of runs."""

import argparse
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from modeling.text.chat import ChatTemplate
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.messages import ChatRows
from modeling.text.rows import alpaca_prompt, examples_of_row
from tests.unit.tokenizer_zoo import byte_level_bpe, load_real, real_dir, sentencepiece_bpe

# Its scripts import each other as scripts do: from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "script_eval"))
import collect_results
import eval_records
import generate
import score_rouge
import summarize

# ---------------------------------------------------------------------------------------------------------- sampling


def grid(n: int) -> torch.Tensor:
    """[n * n, 2]: the midpoints of n × n equal cells of the unit square."""
    middles = (torch.arange(n) + 0.5) / n
    return torch.cartesian_prod(middles, middles)


def test_tokens_are_drawn_with_their_probabilities(monkeypatch):
    # Three blocks, one of them empty. On a grid of numbers the shares are exact but for the grid's step.
    monkeypatch.setattr(generate, "BLOCK", 8)
    torch.manual_seed(0)
    probabilities = torch.rand(20)
    probabilities[8:16] = 0
    numbers = grid(500)
    tokens = generate.draw(probabilities.expand(len(numbers), -1), numbers)
    shares = torch.bincount(tokens, minlength=20) / len(numbers)
    torch.testing.assert_close(shares, probabilities / probabilities.sum(), atol=2 / 500, rtol=0)
    assert not shares[8:16].any() and shares[16:].all()


def test_rare_tokens_are_not_lost_behind_a_frequent_one():
    # 20,000 tokens of 5e-8 each: none of them would change a running float32 sum that has reached 1.
    probabilities = torch.full((20_000,), 5e-8)
    probabilities[0] = 0.999
    numbers = generate.random_numbers(1, [0], 20_000)[0]
    drawn = torch.cat([generate.draw(probabilities.expand(len(n), -1), n) for n in numbers.split(500)])
    assert 5 <= (drawn > 512).sum() <= 45  # 20 are expected


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24, np.nextafter(np.float32(1), np.float32(0))])
def test_a_token_without_probability_is_never_drawn(number):
    numbers = torch.full((1, 2), float(number))
    for place in (0, 511, 512, 1234, 1999):
        probabilities = torch.zeros(1, 2000)
        probabilities[0, place] = 1e-20
        assert generate.draw(probabilities, numbers).tolist() == [place]


def test_the_numbers_of_a_row_do_not_depend_on_its_batch():
    alone = generate.random_numbers(10, [7], 5)
    together = generate.random_numbers(10, [3, 7, 123_456], 9)
    assert torch.equal(alone[0], together[1, :5])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, generate.random_numbers(20, [7], 5))
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() < 1


def test_batches_hold_every_row_once_whatever_their_lengths():
    prompts = [([0] * length, False) for length in (5, 9, 5, 1, 9, 30, 2)]
    batches = generate.batches_of(prompts, 3)
    assert batches == [[5, 1, 4], [0, 2, 6], [3]]


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe])
def test_a_prompt_is_cut_on_the_left_by_default_and_keeps_bos(make):
    tokenizer = make()
    prompt = alpaca_prompt("dogs and foxes " * 20)
    whole, cut = generate.prompt_ids(tokenizer, prompt, 10_000, cut_right=False)
    assert not cut
    left, cut = generate.prompt_ids(tokenizer, prompt, 60, cut_right=False)
    assert cut and len(left) == 60
    assert tokenizer.decode(left).endswith("### Response:\n")
    right, cut = generate.prompt_ids(tokenizer, prompt, 60, cut_right=True)
    assert cut and right == whole[:60]
    n_front = int(tokenizer.bos_token_id is not None and whole[0] == tokenizer.bos_token_id)
    assert left == whole[:n_front] + whole[len(whole) - 60 + n_front :]


@pytest.mark.parametrize("name", ["phi-3", "qwen2", "gemma-2", "opt"])
def test_a_prompt_begins_as_in_training(name):
    tokenizer = load_real(name)
    ids, cut = generate.prompt_ids(tokenizer, alpaca_prompt("Name a colour."), 256, cut_right=False)
    assert not cut
    assert ids == tokenizer(alpaca_prompt("Name a colour."))["input_ids"]


@pytest.mark.parametrize("name", ["phi-3", "qwen2", "llama-3", "smollm2"])
def test_a_chat_is_asked_as_it_was_taught(name):
    """The tokens in front of the response are those of training, for the template and for the question in it."""
    tokenizer = load_real(name)
    encoder = Encoder(tokenizer, chat=ChatTemplate(tokenizer, "student"))
    args = generate.parse(["--model", "m", "--data", "d", "--output", "o", "--chat", "--system", "Be brief."])
    asked = generate.asked(alpaca_prompt("Name a colour.", "red, 7"), tokenizer, args)
    ids, _ = generate.prompt_ids(tokenizer, asked, 512, cut_right=False)
    row = {"instruction": "Name a colour.", "input": "red, 7", "output": "Red.", "system": "Be brief."}
    (example,) = examples_of_row(row, ChatRows(any_row=True))
    example = prepare_example({"row": 1, **example}, [encoder], 512)
    assert ids == example["input_ids"][: example["response_start"]].tolist()
    with pytest.raises(ValueError, match="the tokenizer of m has no chat template"):
        generate.asked("Hello", byte_level_bpe(), args)

    # Messages are asked as they were taught, too.
    talk = [("user", "Hi."), ("assistant", "Hello."), ("user", "A colour?"), ("assistant", "Red.")]
    messages = [{"role": role, "content": text} for role, text in talk]
    (example,) = examples_of_row({"messages": messages}, ChatRows(system="Be brief."))
    example = prepare_example({"row": 1, **example}, [encoder], 512)
    ids, _ = generate.prompt_ids(tokenizer, generate.asked(messages[:-1], tokenizer, args), 512, cut_right=False)
    assert ids == example["input_ids"][: example["response_start"]].tolist()
    with pytest.raises(ValueError, match="does not end with a user's message"):
        generate.asked(messages, tokenizer, args)


def test_prompts_that_are_messages_need_the_template(tmp_path):
    file, prompt = tmp_path / "asked.jsonl", [{"role": "user", "content": "Hi."}]
    base = ["--model", "m", "--data", str(file), "--output", str(tmp_path / "out.jsonl"), "--use_cpu"]
    for row, flags, words in (
        ({"prompt": prompt}, [], "its prompts are messages. Give --chat"),
        ({"prompt": 7}, ["--chat"], "every row needs a prompt, a string"),
        ({"text": "Hi."}, [], "every row needs a prompt, a string"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=words):
            generate.run(generate.parse([*base, *flags]))


def test_each_process_takes_the_accelerator_of_its_rank(monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert generate.this_device(use_cpu=False) == torch.device("xpu:3")
    assert generate.this_device(use_cpu=True) == torch.device("cpu")
    assert chosen == [3]


def test_padding_is_on_the_left():
    batch = generate.padded_left([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_wrong_arguments_are_named(capsys):
    base = ["--model", "m", "--data", "d", "--output", "o"]
    for wrong in (
        ["--temperature", "0"],
        ["--top_p", "0"],
        ["--top_k", "-1"],
        ["--max_prompt_length", "512"],
        ["--seed", "1", "2"],
    ):
        with pytest.raises(SystemExit):
            generate.parse([*base, *wrong])
        assert wrong[0].strip("-").split("_")[0] in capsys.readouterr().err
    args = generate.parse(base)
    assert (args.max_length, args.max_prompt_length, args.no_repeat_ngram_size) == (512, 256, 0)
    assert (args.temperature, args.top_p, args.top_k, args.greedy) == (1.0, 1.0, 0, False)
    assert generate.parse([*base, "--dskd_compat"]).no_repeat_ngram_size == 6
    # The flag is spelt as in training, or stands alone.
    for words, trusted in (([], False), (["--trust_remote_code"], True), (["--trust_remote_code", "true"], True)):
        assert generate.parse([*base, *words]).trust_remote_code is trusted
    assert generate.parse([*base, "--trust_remote_code=False"]).trust_remote_code is False


# ------------------------------------------------------------------------------------------------------------- files


def test_a_torn_line_is_dropped_and_the_finished_file_is_sorted(tmp_path):
    file = eval_records.RowFile(tmp_path / "some folder" / "rows.jsonl")
    assert file.done() == set()
    assert not file.finish(3)  # before anything was written
    file.append([{"row": 2, "response": "ü"}, {"row": 0, "response": "a\nb"}])
    with file.path.open("a") as torn:
        torn.write('{"row": 1, "resp')
    assert file.done() == {0, 2}
    assert not file.finish(3)
    with file.path.open("a") as torn:  # by another process, after this one has looked
        torn.write('{"row": 1, "resp')
    file.append([{"row": 1, "response": ""}])
    assert file.finish(3)
    assert [row["row"] for row in eval_records.read_lines(file.path)] == [0, 1, 2]
    assert eval_records.read_lines(file.path)[0]["response"] == "a\nb"


def test_processes_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: eval_records.RowFile(path).append([{"row": i, "text": "x" * 5000}]), range(200)))
    assert eval_records.RowFile(path).done() == set(range(200))


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "a.settings.json"
    eval_records.require_same_settings(path, {"seed": 10, "top_p": 1.0}, "a.jsonl")
    eval_records.require_same_settings(path, {"seed": 10, "top_p": 1.0}, "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl was started with other settings.*\n  top_p: 1\.0 then, 0\.9 now"):
        eval_records.require_same_settings(path, {"seed": 10, "top_p": 0.9}, "a.jsonl")


def test_a_retrained_folder_has_another_fingerprint(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    before = eval_records.model_fingerprint(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")
    assert eval_records.model_fingerprint(str(tmp_path)) == before
    weights.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert eval_records.model_fingerprint(str(tmp_path)) != before
    assert eval_records.model_fingerprint("some/hub-name") is None


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("name", ["dolly", "self-inst", "vicuna", "sinst"])
def test_rouge_is_that_of_rouge_score_on_every_row_of_the_real_sets(name):
    rows = eval_records.read_lines(real_dir() / "data" / name / "valid.jsonl")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    responses, expected = [], []
    for i, row in enumerate(rows):
        references = [row["output"]] if isinstance(row["output"], str) else row["output"]
        words = references[-1].split()
        other = rows[i - 1]["output"]
        # In turn: the beginning of a reference, another row's answer, a whole reference, nothing.
        response = (
            " ".join(words[: (len(words) + 1) // 2]),
            other if isinstance(other, str) else other[0],
            f"  {references[0]}\n",
            "",
        )[i % 4]
        responses.append(response)
        if row["output"] == "- 😌😊":  # the only reference of all without a letter or digit: rouge_score makes it 0
            assert score_rouge.rouge_l(response.strip(), row["output"]) is None
            continue
        expected.append(max(scorer.score(r, response.strip())["rougeL"].fmeasure for r in references))
        assert score_rouge.rouge_l(response.strip(), row["output"]) == 100 * expected[-1]
    scores = score_rouge.score(responses, [row["output"] for row in rows])
    assert scores["without_rouge_l"] == len(rows) - len(expected) == (name == "self-inst")
    assert scores["count"] == len(rows) == {"dolly": 500, "self-inst": 242, "vicuna": 80, "sinst": 1694}[name]
    assert scores["rouge_l"] == pytest.approx(100 * np.mean(expected), abs=1e-9)
    assert scores["exact_match"] >= 100 / 4 - 1  # the whole references


def test_the_best_of_several_references_counts():
    assert score_rouge.rouge_l("the cats", ["a dog", "The cat"]) == 100  # stemmed
    assert score_rouge.exact_match("An answer: forty-two!", ["x", "an answer  fortytwo"]) == 100
    assert score_rouge.exact_match("An answer", "Another answer") == 0
    assert score_rouge.rouge_l("", "something") == 0


EQUAL = {  # a text in each kind of script, how many words or characters it has, and another with so many in common
    "Han": ("天空是蓝色的。", 6, "天空很蓝", 3),
    "kana": ("ラーメンを食べる", 8, "ラーメンだ", 4),
    "Thai": ("ท้องฟ้าสีฟ้า", 8, "ท้องฟ้า", 5),
    "Khmer": ("ភាសា", 2, "ភា", 1),
    "Burmese": ("ကော င်း", 2, "ကော", 1),
    "Lao": ("ລາວ", 3, "ລາ", 2),
    "Cyrillic": ("Небо синее.", 2, "небо КРАСНОЕ!", 1),
    "Greek": ("Ο ουρανός είναι μπλε", 4, "ο ουρανός", 2),
    "Hangul": ("하늘은 파랗다", 2, "하늘은 높다", 1),
    "Devanagari": ("आसमान नीला है", 3, "आसमान", 1),
    "Arabic": ("السماء زرقاء", 2, "السماء", 1),
    "composed": ("un cafe\u0301 noir", 3, "caf\xe9", 1),
    "Latin": ("The cats’ 2 toys", 4, "the cat", 1),  # no stemmer
}


@pytest.mark.parametrize("script", EQUAL)
def test_text_of_any_script_is_scored(script):
    text, n_tokens, other, n_common = EQUAL[script]
    tokens = score_rouge.UnicodeTokenizer().tokenize
    assert len(tokens(text)) == n_tokens
    assert score_rouge.rouge_l(text.upper(), text, "unicode") == 100
    f_measure = 200 * n_common / (n_tokens + len(tokens(other)))
    assert score_rouge.rouge_l(other, ["…?! 1", text], "unicode") == pytest.approx(f_measure)
    assert score_rouge.rouge_l("一", text, "unicode") == 0
    default = score_rouge.rouge_l(text, text)
    assert default == (100 if script in ("composed", "Latin") else None)


def test_what_cannot_be_scored_is_missing_and_no_zero(tmp_path):
    outputs = ["The sky.", "天空是蓝色的。", ["Blue.", "Синий."], "В 1961 году", "🙂!"]
    for tokenizer, missing in (("rouge_score", 4), ("unicode", 1)):
        scores = score_rouge.score(["the sky", *["x"] * 4], outputs, tokenizer)
        assert (scores["count"], scores["without_rouge_l"], scores["rouge_tokenizer"]) == (5, missing, tokenizer)
        assert scores["rouge_l"] == 100 / (5 - missing)
        assert (f"{missing} of 5 rows have no ROUGE-L" in score_rouge.not_scored(scores)) == bool(missing)
    assert score_rouge.score(["x"], ["🙂"])["rouge_l"] is None
    assert score_rouge.not_scored(score_rouge.score(["x"], ["the sky"])) == ""
    assert score_rouge.rouge_l("天空", "The sky is blue.") == 0  # the response can be wrong


def collected(folder: Path, **sets: dict) -> tuple[str, dict]:
    """The table and the results of sets with these scores, of one seed."""
    for name, scores in sets.items():
        common = {"exact_match": 0.0, "count": 5, "tokens": 3.0, "unfinished": 0, "cut_prompts": 0}
        eval_records.write_json(folder / name / "10.scores.json", {**common, **scores})
        settings = {"data": name, "data_sha256": "0", "limit": None, "dskd_compat": False, "greedy": False}
        eval_records.write_json(folder / name / "10.settings.json", {**settings, "prompts_cut_on": "left"})
        eval_records.write_json(folder / name / "10.environment.json", {"device": "cpu"})
    table = collect_results.instructions(folder, "m", list(sets), [10])
    return table, eval_records.read_json(folder / "results.json")


def test_the_report_says_what_is_not_scored(tmp_path):
    some = {"rouge_l": 20.0, "without_rouge_l": 2, "rouge_tokenizer": "rouge_score"}
    table, results = collected(tmp_path, dolly=some, mine={**some, "rouge_l": None, "without_rouge_l": 5})
    assert "dolly: 2 of 5 rows have no ROUGE-L" in table and "mine: 5 of 5 rows have no ROUGE-L" in table
    assert re.search(r"^dolly +20.00 ", table, re.MULTILINE) and re.search(r"^mine +missing +0.00", table, re.MULTILINE)
    assert results["settings"]["rouge_tokenizer"] == "rouge_score"
    assert results["without_rouge_l"] == {"dolly": 2, "mine": 5}
    assert "rouge_l" in results["scores"]["dolly"] and "rouge_l" not in results["scores"]["mine"]
    (run,), _ = summarize.find_runs([tmp_path])
    assert list(run.scores) == ["Dolly"]

    every = {"rouge_l": 20.0, "without_rouge_l": 0, "rouge_tokenizer": "unicode"}
    table, results = collected(tmp_path, dolly=every, mine=every)
    assert "have no ROUGE-L" not in table and "any script, without a stemmer" in table
    assert results["settings"]["rouge_tokenizer"] == "unicode"
    with pytest.raises(ValueError, match="scored with different tokenizers"):
        collected(tmp_path, dolly=some, mine=every)
    with pytest.raises(ValueError, match="mine unknown"):  # scored before the tokenizer was a choice
        collected(tmp_path, dolly=some, mine={"rouge_l": 1.0})


def test_a_missing_response_is_an_error_and_no_zero(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "output": "b"}\n{"prompt": "c", "output": ["d"]}\n')
    (tmp_path / "made.jsonl").write_text('{"row": 0, "response": "b", "tokens": 1, "ended": true, "cut": false}\n')
    with pytest.raises(ValueError, match="1 of 2 rows are missing, the first is 1"):
        score_rouge.score_files(tmp_path / "made.jsonl", tmp_path / "data.jsonl")
    assert score_rouge.score_files(tmp_path / "made.jsonl", tmp_path / "data.jsonl", limit=1)["rouge_l"] == 100


def test_generations_with_unlike_settings_make_no_mean(tmp_path):
    for name, top_p in (("10", 1.0), ("20", 0.9)):
        eval_records.write_json(tmp_path / f"{name}.settings.json", {"seed": int(name), "top_p": top_p})
    files = [tmp_path / "10.settings.json", tmp_path / "20.settings.json"]
    with pytest.raises(ValueError, match="not comparable"):
        collect_results.one_for_all(files)


# -------------------------------------------------------------------------------------------------------------- code


def test_code_is_asked_for_and_read_in_every_form(monkeypatch):
    pytest.importorskip("evalplus")
    # evalplus takes the names of local files when it is imported.
    import evalplus.data.humaneval
    import evalplus.data.mbpp

    data = real_dir() / "data/evalplus"
    monkeypatch.setattr(evalplus.data.humaneval, "HUMANEVAL_OVERRIDE_PATH", str(data / "HumanEvalPlus.jsonl.gz"))
    monkeypatch.setattr(evalplus.data.mbpp, "MBPP_OVERRIDE_PATH", str(data / "MbppPlus.jsonl.gz"))
    import code_task

    asked = code_task.prompts("mbpp", 3)
    assert asked[0]["task_id"] == "Mbpp/2"
    assert asked[0]["prompt"] == alpaca_prompt(
        "Write a function to find the shared elements from the given two lists.\n\n"
        "The Python code has to pass these tests:\n"
        "assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))"
    )
    tasks = code_task.TASKS["humaneval"]()
    for name in ("HumanEval/0", "HumanEval/32", "HumanEval/53"):  # an import, a helper and an import, neither
        task = tasks[name]
        function = task["prompt"] + task["canonical_solution"]
        alone = function[function.index(f"def {task['entry_point']}") :]
        for response in (
            function,
            alone,
            task["canonical_solution"],
            f"Here it is:\n```python\n{function}\n```\nThat is all.",
            f"```\n{alone}\n```",
        ):
            program: dict = {}
            exec(code_task.solution(task, response), program)  # written in the data set
            for inputs in task["base_input"][:2]:
                expected: dict = {}
                exec(function, expected)
                assert program[task["entry_point"]](*inputs) == expected[task["entry_point"]](*inputs)


# ----------------------------------------------------------------------------------------------------------- summary


def make_run(folder: Path, rouge: float, bits: float | None = None, steps: int = 30, **settings) -> None:
    scores = {"dolly": {"rouge_l": {"mean": rouge, "std": 0.5, "values": {"10": rouge}}}}
    eval_records.write_json(
        folder / "evaluation/instructions/results.json",
        {
            "task": "instructions",
            "scores": scores,
            "counts": {"dolly": 500},
            "seeds": [10, 20],
            "settings": {"top_p": 1.0, "model_fingerprint": str(folder), **settings},
        },
    )
    if bits is not None:
        log = [{"step": s, "loss": 3.0 / s, "ce_loss": 2.0 / s, "kd_loss": 1.0 / s, "epoch": 1} for s in (10, 20, 30)]
        eval_records.write_json(
            folder / "trainer_state.json",
            {"log_history": log, "max_steps": steps, "num_train_epochs": 3, "train_batch_size": 4},
        )
        eval_records.write_json(folder / "eval_results.json", {"eval_bits_per_byte": bits, "eval_runtime": 2.5})


def summarised(tmp_path: Path, *given: Path) -> str:
    printed: list[str] = []
    summarize.summarise(given, tmp_path / "summary", printed.append)
    return printed[0]


def test_training_seeds_are_averaged_and_the_best_is_bold(tmp_path):
    for seed, rouge, bits in ((1, 20.0, 0.9), (2, 22.0, 0.8)):
        make_run(tmp_path / "runs" / f"cdm_seed{seed}", rouge, bits)
        make_run(tmp_path / "runs" / "sft" / f"seed_{seed}", rouge - 3, bits - 0.1)
    make_run(tmp_path / "runs" / "cdm_seed1" / "checkpoint-30", 99.0, 0.1)  # passed over
    text = summarised(tmp_path, tmp_path / "runs")
    assert "| cdm | 2 | **21.00 ± 1.41** | 0.850 ± 0.071 |" in text
    assert "| sft | 2 | 18.00 ± 1.41 | **0.750 ± 0.071** |" in text
    assert "\n- " not in text
    for picture in ("curves.png", "scores.png"):
        assert (tmp_path / "summary" / picture).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "summary" / "table.csv").read_text().splitlines()
    assert len(table) == 1 + 4 * 2
    assert table[1].startswith("cdm,1,Dolly,20.0,0.5,500,")


def test_what_is_not_comparable_is_not_averaged(tmp_path):
    make_run(tmp_path / "cdm_seed1", 20.0, 0.9)
    make_run(tmp_path / "cdm_seed2", 22.0, 0.8, dskd_compat=True)
    make_run(tmp_path / "sft_seed1", 19.0, 0.7)
    make_run(tmp_path / "sft_seed2", 19.5, 0.7, steps=60)
    text = summarised(tmp_path, tmp_path)
    assert "| cdm | 2 | not averaged | 0.850 ± 0.071 |" in text  # nobody is best alone
    assert "the runs of cdm are not averaged, they differ in dskd_compat None and True" in text
    assert "| sft | 2 | not averaged | not averaged |" in text
    assert "Dolly, bits per byte: the runs of sft are not averaged, they differ in max_steps 30 and 60" in text


def test_methods_with_unlike_settings_have_no_best(tmp_path):
    make_run(tmp_path / "cdm", 20.0)
    make_run(tmp_path / "sft", 19.0, top_k=50)
    text = summarised(tmp_path, tmp_path / "cdm", tmp_path / "sft")
    assert "| cdm | 1 | 20.00 ± 0.50 |" in text and "**" not in text
    assert "Dolly: the methods are not comparable, they differ in top_k None and 50" in text


def test_what_is_missing_is_said(tmp_path):
    make_run(tmp_path / "cdm_seed1", 20.0, 0.9)
    make_run(tmp_path / "cdm_seed2", 21.0)
    make_run(tmp_path / "sft_seed1", 19.0)
    (tmp_path / "empty").mkdir()
    text = summarised(tmp_path, *(tmp_path / n for n in ("cdm_seed1", "cdm_seed2", "sft_seed1", "empty", "gone")))
    assert "0.900 (1 of 2)" in text and "| 19.00 ± 0.50 | missing |" in text
    for message in (
        "empty: no results in it.",
        "gone: no such folder.",
        "sft: there is no run with seed 2, which other methods have.",
        "bits per byte: missing for cdm, seed 2.",
        "bits per byte: missing for sft.",
    ):
        assert message in text
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarised(tmp_path, tmp_path / "empty")


def test_folders_of_one_name_stay_apart(tmp_path):
    for place, rouge in (("a", 20.0), ("b", 10.0)):
        make_run(tmp_path / place / "student", rouge)
    text = summarised(tmp_path, tmp_path / "a/student", tmp_path / "b/student")
    assert f"| {tmp_path}/a/student | 1 | **20.00 ± 0.50** |" in text
    assert f"| {tmp_path}/b/student | 1 | 10.00 ± 0.50 |" in text


def test_a_common_teachers_figures_count_before_a_methods_own(tmp_path):
    make_run(tmp_path / "uld", 20.0, 0.9)
    eval_records.write_json(tmp_path / "uld/eval_results.json", {"eval_kd_loss": 7.0, "eval_bits_per_byte": 0.9})
    common = {"eval_kd_loss": 0.5, "eval_bits_per_byte": 0.9, "eval_mapped_rate": 0.7}
    eval_records.write_json(tmp_path / "uld/evaluation/held_out/eval_results.json", common)
    assert "0.900 | 0.500 |" in summarised(tmp_path, tmp_path / "uld")


def test_references_stand_apart(tmp_path):
    """Above the methods; never the best, never missed, and not held to their budget."""
    for seed, bits in ((1, 0.9), (2, 0.7)):
        make_run(tmp_path / "runs/cdm" / f"seed_{seed}", 20.0, bits)
        make_run(tmp_path / "runs/sft" / f"seed_{seed}", 10.0, bits + 0.1)
    make_run(tmp_path / "teacher", 99.0, 0.1, steps=7)
    make_run(tmp_path / "untrained", 98.0)
    printed: list[str] = []
    table = summarize.summarise(
        [tmp_path / "runs"],
        tmp_path / "summary",
        printed.append,
        references=[tmp_path / "teacher", tmp_path / "untrained"],
    )
    assert list(table.methods) == ["teacher", "untrained", "cdm", "sft"]
    assert "| teacher | 1 | 99.00 ± 0.50 | 0.100 |\n| untrained | 1 | 98.00 ± 0.50 | – |\n" in printed[0]
    assert (
        "| cdm | 2 | **20.00 ± 0.00** | **0.800 ± 0.141** |\n| sft | 2 | 10.00 ± 0.00 | 0.900 ± 0.141 |" in printed[0]
    )
    assert "For reference, and never the best: teacher, untrained" in printed[0] and "\n- " not in printed[0]
    assert list(table.competing) == ["cdm", "sft"]


def test_differences_are_paired_by_seed_and_costs_are_never_the_best(tmp_path):
    """The seeds differ by more than the methods: seed by seed the difference is plain."""
    for seed, bits in ((1, 0.9), (2, 0.7), (3, 0.5)):
        make_run(tmp_path / "runs/sft" / f"seed_{seed}", 20.0 + seed, bits)
        if seed < 3:
            make_run(tmp_path / "runs/cdm" / f"seed_{seed}", 22.0 + 2 * seed, bits - 0.01 * seed)
            costs = {"train_seconds_per_step": 0.5 * seed, "train_peak_memory_gib": 2.0, "train_runtime": 9.0}
            eval_records.write_json(tmp_path / "runs/cdm" / f"seed_{seed}/train_results.json", costs)
    make_run(tmp_path / "runs/fkd", 22.0, 0.9, top_k=50)  # not measured alike, and of no seed
    eval_records.write_json(tmp_path / "columns.json", {"α": {"cdm": "0.9"}})
    printed: list[str] = []
    options = {"against": "sft", "columns": tmp_path / "columns.json"}
    summarize.summarise([tmp_path / "runs"], tmp_path / "summary", printed.append, **options)
    assert "|  | runs | α | Dolly ↑ | bits per byte ↓ | s/step ↓ | GiB ↓ |" in printed[0]
    assert "| cdm | 2 | 0.9 | 25.00 ± 1.41 | 0.785 ± 0.148 | 0.75 ± 0.35 | 2.00 ± 0.00 |" in printed[0]
    assert "| minus sft | pairs | Dolly ↑ | bits per byte ↓ |\n|" in printed[0]
    assert "\n| cdm | 2 | +3.50 ± 0.71 | -0.015 ± 0.007 |\n\n" in printed[0]
    assert (tmp_path / "summary/table.md").read_text() == printed[0]
    assert (tmp_path / "summary/differences.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--against gkd: there is no such method, but"):
        summarize.summarise([tmp_path / "runs"], tmp_path / "summary", printed.append, against="gkd")


@pytest.mark.parametrize(
    ("margin", "best", "words"),
    [(0.05, "cdm sft", "cdm and sft differ by less than 0.05"), (0.01, "cdm", "cdm is the best by 0.01")],
)
def test_who_is_ahead_by_less_than_the_margin_does_not_win(tmp_path, margin, best, words):
    for method, bits in (("sft", 0.83), ("uld", 0.90), ("cdm", 0.80)):
        make_run(tmp_path / method, 20.0, bits)
    printed: list[str] = []
    table = summarize.summarise([tmp_path], tmp_path / "summary", printed.append, margin=margin)
    assert table.best["bits per byte"] == set(best.split()) and words in printed[0]
    assert "differ by" not in summarised(tmp_path, tmp_path)


def test_a_methods_curve_is_the_mean_over_its_seeds(tmp_path, monkeypatch):
    for seed, losses in ((1, {5: 4.0, 10: 3.0, 15: 2.5}), (2, {5: 2.0, 10: 2.0})):
        make_run(tmp_path / "runs/cdm" / f"seed_{seed}", 20.0, 0.9)
        state = tmp_path / "runs/cdm" / f"seed_{seed}" / "trainer_state.json"
        log = [{"step": step, "loss": loss} for step, loss in losses.items()]
        log += [{"step": 10, "eval_loss": 2.75}] if seed == 1 else []  # the held-out rows: a dot
        eval_records.write_json(state, {**eval_records.read_json(state), "log_history": log})
    figures = []
    monkeypatch.setattr(summarize.plt, "close", figures.append)
    summarised(tmp_path, tmp_path / "runs")
    (axis,) = figures[0].axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert drawn == [([5, 10, 15], [4.0, 3.0, 2.5]), ([5, 10], [2.0, 2.0]), ([5, 10], [3.0, 2.5]), ([10], [2.75])]
    assert axis.lines[2].get_linewidth() > axis.lines[0].get_linewidth()


def test_a_legend_of_long_names_lies_inside_the_picture(tmp_path, monkeypatch):
    for i in range(5):
        make_run(tmp_path / f"a method with quite a long name, number {i}", 20.0)
    figures = []
    monkeypatch.setattr(summarize.plt, "close", figures.append)
    summarised(tmp_path, tmp_path)
    (legend,) = figures[0].legends
    figures[0].canvas.draw()
    box, whole = legend.get_window_extent(), figures[0].bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and len(legend.get_texts()) == 5


def test_a_set_of_another_name_has_its_own_column(tmp_path):
    path = tmp_path / "evaluation/here/runs/cdm/seed_3/evaluation/instructions/results.json"
    make_run(path.parents[2], 20.0, 0.9)
    results = eval_records.read_json(path)
    results["scores"]["my set"] = {"rouge_l": {"mean": 33.0, "std": None, "values": {"10": 33.0}}}
    results["counts"]["my set"] = 4
    eval_records.write_json(path, results)
    text = summarised(tmp_path, tmp_path / "evaluation/here/runs")  # itself in a folder called `evaluation`
    assert "|  | runs | Dolly ↑ | my set ROUGE-L ↑ | bits per byte ↓ |" in text
    assert "| cdm | 1 | 20.00 ± 0.50 | 33.00 | 0.900 |" in text


def test_the_settings_hold_every_argument_that_changes_the_text(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a"}\n')
    flags = ["--model", "m", "--data", str(data), "--output", "o"]
    args = generate.parse(flags)
    settings = generate.settings_of(args, 10)
    places = {"output", "use_cpu", "trust_remote_code"}  # where it goes, and how; not what it is
    assert set(vars(args)) - places <= set(settings) and settings["seed"] == 10
    greedy = generate.settings_of(generate.parse([*flags, "--greedy"]), 10)
    assert set(settings) - set(greedy) == {"temperature", "top_p", "top_k"} and greedy["seed"] is None
    assert json.loads(json.dumps(settings)) == settings
    assert isinstance(args, argparse.Namespace)
