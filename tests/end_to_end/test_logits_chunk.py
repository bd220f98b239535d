"""Training without whole logits: the same losses and the same student."""

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.rig import ROOT, launcher, run_script, steps
from tests.end_to_end.test_teacher_cache import SCRIPTS, arguments, assert_equal, bench, train  # noqa: F401


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_losses_are_those_of_whole_logits(train, method):  # noqa: F811
    # Sums over the vocabulary in another order, a dozen Adam steps long: gradients' norms drift by some 1e-5.
    assert_equal(train(method), train(method, logits_chunk=7), rel=1e-4)


@pytest.mark.parametrize("method", ["CDM", "FKD"])
def test_in_bfloat16_with_stored_signals(train, tmp_path, method):  # noqa: F811
    """Float32 weights under --bf16 true: both ways multiply in bfloat16, and evaluation too."""
    chunked = train(method, bf16=True, logits_chunk=7, teacher_cache=tmp_path / "cache")
    # In so coarse numbers, one of CDM's choices (a path, a candidate) may fall the other way in another order of sums.
    assert_equal(train(method, bf16=True), chunked, rel=5e-3)


def test_with_adapters_and_stored_signals(train, tmp_path):  # noqa: F811
    settings = {"use_lora": True, "learning_rate": 1e-2}
    assert_equal(
        train("CDM", **settings), train("CDM", **settings, logits_chunk=64, teacher_cache=tmp_path / "cache"), rel=1e-4
    )


def test_two_ranks_under_zero_2(bench, tmp_path):  # noqa: F811
    """The weights of the head get their gradient outside of the model's forward: DeepSpeed must see it all the same."""
    settings = {"max_steps": 3, "do_eval": False, "gradient_accumulation_steps": 2}
    plain = {**settings, "per_device_train_batch_size": 4}
    halves = {**settings, "per_device_train_batch_size": 2, "logits_chunk": 16}
    halves["deepspeed"] = ROOT / "config/deepspeed_config.json"
    run_script("modeling/run_clm_distill_CDM.py", *arguments(bench, "CDM", tmp_path / "plain", **plain))
    run_script(
        "modeling/run_clm_distill_CDM.py",
        *arguments(bench, "CDM", tmp_path / "chunked", **halves),
        launch=launcher(ranks=2, deepspeed=True),
    )
    for want, got in zip(steps(tmp_path / "plain"), steps(tmp_path / "chunked")):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("plain", "chunked")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
