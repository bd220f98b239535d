"""Adapters, new tokens, tied matrices, casts in evaluation: what is saved is what was trained, wherever it is loaded.

A script's own `main` runs in this process; the trained model's logits are noted when its training begins and ends.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from modeling.models.language_model import LanguageModel
from tests.end_to_end.rig import ROOT, steps, tiny_llama
from tests.unit.tokenizer_zoo import byte_level_bpe

N_TOKENS = {"tied": 400, "untied": 400, "longer": 403}
ROWS = [
    {"prefix": "Say: ", "text": "The quick fox jumps."},
    {"prefix": "Q: dogs?\n", "text": "The <tool> dog sleeps, and the fox runs on.\n\nSo it is."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def models(folder):
    """A tied model, an untied one, and a tied one with 400 embeddings whose tokenizer has three tokens more."""
    tokenizer = byte_level_bpe()
    paths = {n: tiny_llama(folder / n, tokenizer, 400, hidden=16, layers=2, tied=n != "untied") for n in N_TOKENS}
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.add_tokens(["<tool>", "<result>"])
    tokenizer.save_pretrained(paths["longer"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return paths


def logits_of(model):
    """float32 [2, 10, V] of tokens of all kinds; the model's mode is left as it is."""
    n_tokens = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, n_tokens - 1, 20, device=model.device).long().view(2, 10)
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float().cpu()
    model.train(training)
    return logits


def assert_same(got, expected, atol=1e-4):
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.fixture
def train(main, models, folder, tmp_path, monkeypatch):
    """`train(output, method, flag=value, …)`: exit status, stderr, and logits when training began and ended."""
    noted = []
    begin, whole = Trainer._inner_training_loop, Trainer.train

    def begin_and_note(self, *args, **kwargs):
        noted.append(logits_of(self.model))
        return begin(self, *args, **kwargs)

    def train_and_note(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        noted.append(logits_of(self.model))
        return output

    monkeypatch.setattr(Trainer, "_inner_training_loop", begin_and_note)
    monkeypatch.setattr(Trainer, "train", train_and_note)

    def train(output, method="sft", **changes):
        given = {
            "train_file": folder / "rows.jsonl",
            "validation_file": folder / "rows.jsonl",
            "output_dir": tmp_path / output,
            "do_eval": True,
            "block_size": 64,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
        }
        noted.clear()
        run = main(method, **{**given, **changes})
        begun, trained = noted if len(noted) == 2 else (None, None)
        return SimpleNamespace(**vars(run), folder=tmp_path / output, begun=begun, trained=trained)

    return train


def loaded(path: Path, merge: bool = True):
    return LanguageModel(str(path), "model").load("auto", merge)


def generators_model(path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "script_eval"))
    import generate

    args = generate.parse(["--model", str(path), "--data", "x", "--output", "y"])
    return generate.load_model(args, torch.device("cpu"))[0]


def eval_loss(folder: Path) -> float:
    return json.loads((folder / "eval_results.json").read_text())["eval_loss"]


# ------------------------------------------------------------------------------------------- what is saved was trained


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("model", N_TOKENS)
def test_an_adapter_is_loaded_everywhere_as_it_was_trained(train, models, monkeypatch, model, targets):
    run = train("out", model_name_or_path=models[model], use_lora=True, merge_lora=True, lora_target_modules=targets)
    assert run.status == 0, run.stderr
    assert (run.trained - run.begun).abs().max() > 0.1
    assert run.trained.shape[-1] == N_TOKENS[model]
    adapter = run.folder / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[model])
    assert_same(logits_of(loaded(adapter, merge=False)), run.trained)
    saved = AutoModelForCausalLM.from_pretrained(run.folder)
    assert_same(logits_of(saved), run.trained)
    # As before, unless one of two tied matrices was changed alone.
    assert saved.config.tie_word_embeddings == (model != "untied" and targets == ["q_proj"])
    for path in (adapter, run.folder):
        assert_same(logits_of(generators_model(path, monkeypatch)), run.trained)
        evaluated = train("evaluated", model_name_or_path=path, do_train=False)
        assert eval_loss(evaluated.folder) == pytest.approx(eval_loss(run.folder), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_lora": True}, {"use_lora": True, "merge_lora": True}])
@pytest.mark.parametrize("cast", [{"bf16_full_eval": True}, {"fp16_full_eval": True}, {"bf16": True}])
def test_evaluation_does_not_change_what_is_saved(train, models, cast, settings):
    """Evaluated within training and after it."""
    run = train("out", model_name_or_path=models["tied"], eval_strategy="steps", eval_steps=1, **cast, **settings)
    assert run.status == 0, run.stderr
    for file in run.folder.rglob("*.safetensors"):
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}, file
    assert_same(logits_of(loaded(run.folder)), run.trained, atol=0.2 if "bf16" in cast else 1e-4)
    plain = train("plain", model_name_or_path=models["tied"], **settings, **({"bf16": True} if "bf16" in cast else {}))
    assert_same(run.trained, plain.trained, atol=1e-6)


# ------------------------------------------------------------------------------------------------ an adapter as student


@pytest.fixture
def first(train, models):
    """Runs and returns a first training with LoRA."""

    def first(model="tied", **changes):
        run = train("first", model_name_or_path=models[model], use_lora=True, lora_rank=4, **changes)
        assert run.status == 0, run.stderr
        return run

    return first


@pytest.mark.parametrize("model", ["tied", "longer"])
def test_an_adapter_is_trained_further(train, models, first, model):
    """With --use_lora true it stays an adapter of the first model; without, it becomes part of the weights."""
    earlier = first(model)
    path = earlier.folder
    for settings in ({"lora_rank": 4}, {"merge_lora": True}):
        run = train("further", model_name_or_path=path, use_lora=True, **settings)
        assert run.status == 0, run.stderr
        assert "is trained further" in run.stderr
        assert_same(run.begun, earlier.trained)
        assert (run.trained - run.begun).abs().max() > 0.1
        assert_same(logits_of(loaded(run.folder)), run.trained)
        saved = run.folder / "adapter" if "merge_lora" in settings else run.folder
        config = json.loads((saved / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(models[model]) and config["r"] == 4
        assert not (run.folder / "model.safetensors").exists() or "merge_lora" in settings
    whole = train("whole", model_name_or_path=path)
    assert whole.status == 0 and "is merged into it" in whole.stderr
    assert_same(whole.begun, earlier.trained)
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(whole.folder)), whole.trained)
    earlier, trained = (dict(loaded(path).named_parameters()) for path in (path, whole.folder))
    assert not any(torch.equal(earlier[name], weight) for name, weight in trained.items())  # every weight is trained


@pytest.mark.parametrize(
    ("flag", "value", "own"),
    [("rank", 8, "4"), ("alpha", 4, "32"), ("dropout", 0.5, "0.0"), ("target_modules", ["q_proj"], "down_proj gate")],
)
def test_settings_that_contradict_the_adapter_are_refused(train, first, flag, value, own):
    path = first().folder
    run = train("further", model_name_or_path=path, use_lora=True, **{f"lora_{flag}": value})
    assert run.status == 2 and not run.folder.exists()
    message = run.stderr.splitlines()[-1]
    assert f"--lora_{flag} is " in message and str(path) in message and f"has {own}" in message


def test_an_interrupted_run_on_an_adapter_is_resumed(train, first):
    """On a model that was resized, and merged at the end: the uninterrupted run's adapter and logits."""
    path = first("longer").folder
    settings = {"model_name_or_path": path, "use_lora": True, "merge_lora": True, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 1}
    whole = train("whole", **settings)
    shutil.copytree(whole.folder / "checkpoint-2", whole.folder.with_name("stopped") / "checkpoint-2")
    resumed = train("stopped", **settings)
    assert "Resuming from" in resumed.stderr
    for got, expected in zip(steps(resumed.folder), steps(whole.folder), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    assert_same(resumed.trained, whole.trained, atol=1e-5)
    assert_same(logits_of(loaded(resumed.folder)), whole.trained)


def test_an_adapter_on_an_adapter(train, models, first):
    """The model below an adapter may itself be an adapter's folder: both are in what is loaded."""
    lower = first().folder
    upper = train("upper", model_name_or_path=lower, use_lora=True).folder
    config = upper / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(lower)}))
    layer = "model.layers.0.self_attn.q_proj"
    expected = AutoModelForCausalLM.from_pretrained(models["tied"]).get_submodule(layer).weight.detach()
    for path in (lower, upper):
        weights = load_file(path / "adapter_model.safetensors")
        a, b = (weights[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        expected = expected + 32 / 4 * b @ a
    torch.testing.assert_close(loaded(upper).get_submodule(layer).weight.detach(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "PROMPT_TUNING"),
        ({"r": 8}, "files of one adapter"),  # other shapes than its weights have
        ({"target_modules": ["q_proj", "lm_head"]}, "files of one adapter"),  # more than its weights are of
        ({"target_modules": ["query"]}, "query"),
    ],
)
def test_a_bad_adapter_is_told(train, first, changes, message):
    path = first(lora_target_modules=["q_proj"]).folder
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    run = train("further", model_name_or_path=path)
    told = run.stderr.splitlines()[-1]
    assert run.status == 2 and f"--model_name_or_path {path}: " in told and message in told, run.stderr
    assert not run.folder.exists()


def test_a_tokenizer_longer_than_an_adapters_embeddings_is_refused(first):
    path = first("longer").folder
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens("<answer>")
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"404 tokens, .* 403 embeddings"):
        loaded(path)


# ------------------------------------------------------------------------------------------------ an adapter as teacher


@pytest.mark.parametrize("model", N_TOKENS)
def test_an_adapter_teaches_as_it_was_trained(train, models, first, model, tmp_path):
    """Also from stored signals, where its head is a plain layer; a student equal to it has nothing to learn."""
    teacher = first(model, lora_target_modules=["q_proj", "embed_tokens"]).folder
    same = {"model_name_or_path": teacher, "teacher_path": teacher, "max_steps": 1, "kd_alpha": 0}
    for settings in ({}, {"use_lora": True, "logits_chunk": 3, "teacher_cache": tmp_path / "cache"}):
        run = train("same", "llms_fkd", **same, **settings)
        assert run.status == 0, run.stderr
        assert steps(run.folder)[0]["kd_loss"] == pytest.approx(0, abs=1e-6)
    run = train("base", "llms_fkd", **{**same, "model_name_or_path": models[model]})
    assert steps(run.folder)[0]["kd_loss"] > 1e-2


# ----------------------------------------------------------------------------------------------------- the evaluations


@pytest.mark.parametrize("adapted", [False, True])
def test_padding_beyond_the_models_embeddings(models, first, monkeypatch, adapted):
    """The pad token of a lengthened tokenizer: prompts of unlike lengths are generated from together as alone."""
    path = first("longer").folder if adapted else models["longer"]
    tokenizer, model = AutoTokenizer.from_pretrained(path), generators_model(path, monkeypatch)
    import generate

    assert tokenizer.pad_token_id == 400
    prompts = [tokenizer(text)["input_ids"] for text in ("Say: The quick fox", "Q", "The dog sleeps")]
    args = generate.parse(["--model", "m", "--data", "x", "--output", "y", "--greedy", "--max_length", "24"])
    made = generate.generate_batch(model, tokenizer, args, 0, [0, 1, 2], [(ids, False) for ids in prompts])
    expected = [generate.generate_batch(model, tokenizer, args, 0, [0], [(ids, False)])[0] for ids in prompts]
    assert [row["response"] for row in made] == [row["response"] for row in expected]

    harness = pytest.importorskip("harness", reason="lm_eval is not installed")  # beside generate.py
    from lm_eval.api.instance import Instance
    from math_task import model_arguments

    wrapped = harness.LoadedModel(**model_arguments(str(path), "auto"), device="cpu", batch_size=3)
    assert_same(logits_of(wrapped.model), logits_of(model), atol=1e-5)
    asked = [(tokenizer.decode(ids), {"until": [], "max_gen_toks": 12}) for ids in prompts]
    requests = [Instance("generate_until", {}, question, index) for index, question in enumerate(asked)]
    assert len(wrapped.generate_until(requests, disable_tqdm=True)) == 3
