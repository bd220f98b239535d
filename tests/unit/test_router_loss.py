"""A mixture-of-experts student is trained with its router loss where its configuration asks for it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, MixtralConfig, Qwen3MoeConfig

from modeling.training.trainer import router_coefficient
from tests.methods import METHODS
from tests.unit.helpers import loss_of, make_trainer, small_model

COEFFICIENT = 10.0
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "output_router_logits": True,
}
ROUTED = {**SIZES, "router_aux_loss_coef": COEFFICIENT}
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        {**ROUTED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "mixtral": (MixtralConfig, {**ROUTED, "num_local_experts": 4}),
    "jetmoe": (JetMoeConfig, {**SIZES, "num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": COEFFICIENT}),
    "dbrx": (
        DbrxConfig,
        {
            **{"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 512, "output_router_logits": True},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_loss_weight": COEFFICIENT},
        },
    ),
}


def make_moe(pair, family="qwen3_moe", **changes):
    config_class, sizes = FAMILIES[family]
    torch.manual_seed(3)
    config = config_class(vocab_size=len(pair.student.forms) + 5, **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config)


def with_student(trainer, model):
    trainer.model = model
    return trainer


def loss_and_gradients(trainer, examples):
    trainer.model.zero_grad()
    loss = loss_of(trainer, examples)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def router_loss(trainer, examples):
    """The model's own figure, from its plain forward, and its gradients."""
    trainer.model.zero_grad()
    side = trainer.data_collator(examples).student
    loss = trainer.model(input_ids=side.input_ids, attention_mask=side.attention_mask).aux_loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, len(side.labels)


def assert_router_loss_is_added(trainer, plain, examples):
    """Against the same trainer whose student's configuration asks for no router loss."""
    expected, expected_gradients = loss_and_gradients(plain, examples)
    got, gradients = loss_and_gradients(trainer, examples)
    logged = trainer.train_means.reduce(trainer.accelerator)
    router, router_gradients, n_tokens = router_loss(trainer, examples)
    assert router_gradients and router > 1
    assert logged["router_loss"] == pytest.approx(router * n_tokens, rel=1e-5)  # of a step of one token, here
    assert got == pytest.approx(expected + COEFFICIENT * router * n_tokens, rel=1e-5)
    for name, gradient in gradients.items():
        want = expected_gradients.get(name, 0) + COEFFICIENT * n_tokens * router_gradients.get(name, 0)
        torch.testing.assert_close(gradient, want + torch.zeros_like(gradient), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("method", METHODS)
def test_in_training_alone(pair, tmp_path, method, chunk):
    """Of the student, whatever the teacher's configuration asks for; evaluation's figures do not change."""
    trainer, plain = (
        with_student(make_trainer(method, pair, tmp_path, logits_chunk=chunk), make_moe(pair, **changes))
        for changes in ({}, {"output_router_logits": False})
    )
    examples = pair.prepared(method, slice(3))
    assert_router_loss_is_added(trainer, plain, examples)
    losses = [loss_of(t, examples, training=False).item() for t in (trainer, plain)]
    evaluated, expected = (t.eval_means.reduce(t.accelerator) for t in (trainer, plain))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and evaluated == pytest.approx(expected, rel=1e-6)
    assert "router_loss" not in evaluated


@pytest.mark.parametrize("kind", [*FAMILIES, "LoRA", "gradient checkpointing"])
def test_in_every_family_and_wrapper(pair, tmp_path, kind):
    trainers = []
    for wants in (True, False):
        model = make_moe(pair, kind if kind in FAMILIES else "qwen3_moe", output_router_logits=wants)
        if kind == "LoRA":
            torch.manual_seed(4)
            lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = get_peft_model(model, lora)
        if kind == "gradient checkpointing":
            model.gradient_checkpointing_enable()
        trainers.append(with_student(make_trainer("SFT", pair, tmp_path), model))
    assert_router_loss_is_added(*trainers, pair.prepared("SFT", slice(3)))


def test_the_weights_of_a_step_sum_to_one_however_it_is_split(pair, tmp_path):
    """Two equal examples are routed alike: together, or each in a micro-batch of its own."""
    trainer = with_student(make_trainer("SFT", pair, tmp_path), make_moe(pair))
    (example,) = pair.prepared("SFT", slice(1))
    together, gradients = loss_and_gradients(trainer, [example, example])
    apart, halves = loss_and_gradients(trainer, [example])
    assert 2 * apart == pytest.approx(together, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(2 * halves[name], gradient, rtol=1e-3, atol=2e-3)


def test_a_router_loss_without_coefficient_is_told(pair):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*router_aux_loss_coef"):
        router_coefficient(small_model(pair.student.tokenizer, 5, seed=1))
