"""The head apart from the model: the model's own logits are the oracle, family by family."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from modeling.losses.logits import ChunkedLogits
from modeling.losses.rows import StudentRows
from modeling.models.output_head import OutputHead, last_hidden_states, logits_at
from tests.unit.helpers import assert_same, inside_ddp

V = 101
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
OLD_SIZES = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5, **IDS}
OPT_SIZES = {"vocab_size": V, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.5}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2, a cap that bites": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "opt, head narrower than the body": OPTConfig(**OPT_SIZES, hidden_size=16, word_embed_proj_dim=8),
    "gpt2": GPT2Config(**OLD_SIZES),
    "gptj, a bias": GPTJConfig(**OLD_SIZES, rotary_dim=4, tie_word_embeddings=False),
    "granite, divided": GraniteConfig(**SIZES, logits_scaling=4.0),
    "hyperclovax, multiplied under the same name": HyperCLOVAXConfig(**SIZES, logits_scaling=0.3),
    "cohere, multiplied": CohereConfig(**SIZES, logit_scale=0.25),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def batch(length: int = 7) -> dict:
    """3 rows padded on the right."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, V, (3, length), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_own_logits(family, dtype):
    model = make(FAMILIES[family], dtype)
    made = []  # what the model's own head computes when only hidden states are asked for
    head, inputs = OutputHead.of(model), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape))
        hidden = last_hidden_states(model, **inputs)
        got = head(hidden)
        some = head.first(90)(hidden[0, 2:4])
    assert got.dtype == expected.dtype == dtype and got.shape == expected.shape == (3, 7, V)
    assert made == [(3, 1, V)]
    rel = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got, expected, rtol=rel, atol=rel * expected.abs().max().item())
    torch.testing.assert_close(some, expected[0, 2:4, :90], rtol=rel, atol=rel * expected.abs().max().item())
    # What stands behind the layer matters here: without it the logits are far off.
    if (head.multiplier, head.divisor, head.cap) != (1, 1, None):
        assert (OutputHead(head.weight, head.bias)(hidden) - expected).abs().max() > 0.5


def autocast(model):
    """As accelerate prepares a model for --bf16 true: bfloat16 inside, float32 outside."""
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_head_multiplies_as_the_model_does(family):
    """Chunked logits of float32 weights under --bf16 true: the whole logits' values, loss and gradients."""
    model, inputs, rows = autocast(make(FAMILIES[family])), batch(), torch.arange(21)
    head = OutputHead.of(model)
    assert head.dtype == torch.bfloat16 and head.weight.dtype == torch.float32
    whole = logits_at(model, rows, 90, **inputs)
    assert torch.equal(whole, whole.bfloat16().float())  # they were computed in bfloat16
    chunked = ChunkedLogits(last_hidden_states(model, **inputs).flatten(0, 1), head, 90, 4)
    tolerance = 1e-2 * whole.abs().max().item()
    torch.testing.assert_close(chunked[rows].float(), whole, rtol=1e-2, atol=tolerance)
    results = []
    for logits in (whole, chunked):
        loss = StudentRows(logits, rows).ce.sum()
        results.append((loss, *torch.autograd.grad(loss, model.parameters())))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-4)
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_some_positions(family):
    model, inputs = make(FAMILIES[family]), batch()
    rows = torch.tensor([0, 3, 4, 13, 20])  # of the flattened 3 · 7
    expected = model(**inputs).logits.flatten(0, 1)[rows, :90]
    made = []  # rows that the head computes
    model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape[:-1].numel()))
    got = logits_at(model, rows, 90, **inputs)
    assert made == [5]
    assert_same(got, expected, *model.parameters(), rtol=1e-4)
    assert logits_at(model, rows[:0], 90, **inputs).shape == (0, 90)


def test_logits_of_some_positions_where_the_model_does_not_call_its_head():
    model, inputs = make(FAMILIES["llama"]), batch()
    expected = model(**inputs).logits.flatten(0, 1)[[2, 9]]
    layer = model.lm_head
    model.lm_head.forward = None  # calling it would fail
    model.lm_head = nn.Identity()
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, layer.weight)
    model.get_output_embeddings = lambda: layer
    torch.testing.assert_close(logits_at(model, torch.tensor([2, 9]), V, **inputs), expected)


def test_columns_are_views():
    head = OutputHead.of(make(FAMILIES["gptj, a bias"]))
    first = head.first(90)
    assert first.weight.shape == (90, 16) and first.bias.shape == (90,)
    assert first.weight.data_ptr() == head.weight.data_ptr() and first.bias.data_ptr() == head.bias.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family):
    model, inputs = make(FAMILIES[family]), batch()
    if "tied" in family:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = OutputHead.of(model)(last_hidden_states(model, **inputs))
    assert_same(logits, model(**inputs).logits, *model.parameters(), rtol=1e-4, atol=2e-4)


def test_adapters_and_wrappers_take_part(tmp_path):
    """A LoRA student inside DDP: the adapters' work is in the hidden states, and gradients reach them."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(make(FAMILIES["qwen2"]), config)
    inputs = batch()
    expected = student(**inputs).logits
    with student.disable_adapter(), torch.no_grad():
        assert (student(**inputs).logits - expected).abs().max() > 0.1

    def compare(wrapped):
        got = OutputHead.of(wrapped)(last_hidden_states(wrapped, **inputs))
        torch.testing.assert_close(got, expected)
        got.sum().backward()

    inside_ddp(student, compare, tmp_path)
    assert all(p.grad.abs().max() > 0 for p in student.parameters() if p.requires_grad)


def test_the_head_follows_training():
    model = make(FAMILIES["llama"])
    head = OutputHead.of(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(head(last_hidden_states(model, **batch())), model(**batch()).logits)


class Twisted(nn.Module):
    """A model whose logits are something else than its configuration says."""

    def __init__(self, model, twist):
        super().__init__()
        self.model, self.twist, self.config = model, twist, model.config

    def forward(self, **inputs):
        output = self.model(**inputs)
        return self.twist(self.model, inputs, output)

    def get_output_embeddings(self):
        return self.model.lm_head

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


def with_logits(output, logits):
    output.logits = logits
    return output


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        (lambda m, i, o: with_logits(o, o.logits * 1.5), "what its linear head makes"),
        (lambda m, i, o: with_logits(o, o.logits.tanh()), "what its linear head makes"),
        (lambda m, i, o: with_logits(o, o.logits[..., :-1]), "what its linear head makes"),
        (lambda m, i, o: m(**i), "its head 2 times"),
    ],
)
def test_other_logits_are_refused(twist, message):
    with pytest.raises(ValueError, match=f"Twisted .*{message}") as error:
        OutputHead.of(Twisted(make(FAMILIES["llama"]), twist))
    assert "Leave out --teacher_cache and --logits_chunk" in str(error.value)


def test_heads_that_are_no_plain_layer_are_refused():
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    student = get_peft_model(make(FAMILIES["llama"]), adapter)
    with pytest.raises(ValueError, match=r"The head of LlamaForCausalLM is a peft\..*Linear, not a plain linear layer"):
        OutputHead.of(student)
    with pytest.raises(ValueError, match="not a plain linear layer"):
        last_hidden_states(student, **batch())


def test_a_model_with_layers_between_body_and_head():
    """BERT transforms its hidden states before the last layer: what that layer reads is what is captured."""
    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        nn.init.normal_(model.cls.predictions.decoder.bias)
        got = OutputHead.of(model)(last_hidden_states(model, **batch()))
        torch.testing.assert_close(got, model(**batch()).logits)
