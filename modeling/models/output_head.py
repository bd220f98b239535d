"""A causal language model as body and head: its logits as a function of its last hidden states.

The head is one linear layer, and what some families put behind it:

    logits = cap · tanh(z / cap),   z = (W·h + b) · multiplier / divisor

so that logits can be had for some positions, or some columns, without the others: `head(hidden[rows])`. What stands
behind the layer is read from the model's configuration, and checked against the model's own logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate.utils import align_module_device, extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.errors import InputError
from modeling.text.ends import fold_ends

# What configurations call a factor of the logits. `logits_scaling` divides in some families and multiplies in others:
# the one that gives the model's own logits is meant.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")

Head = Callable[[Tensor], Tensor]  # makes logits [r, V] of what stands for them, [r, D]


@dataclass(frozen=True)
class OutputHead:
    """A function of last hidden states: `head(hidden [..., H]) -> logits [..., V]`, in `product_dtype`.

    The weight is the model's own, so that the head follows training and gradients reach it. It is a copy only of a
    frozen model whose weights are sharded over the ranks, or fetched when their layer runs.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    multiplier: float = 1.0
    divisor: float = 1.0
    cap: float | None = None
    dtype: torch.dtype | None = None  # that autocast multiplies in; None: the weight's
    stop_ids: tuple[int, ...] = ()  # stop tokens that are one event (`text.ends.fold_ends`)

    def __call__(self, hidden: Tensor) -> Tensor:
        head = self.cast()
        return head.finish(F.linear(hidden.to(self.product_dtype), head.weight, head.bias))

    @property
    def product_dtype(self) -> torch.dtype:
        """Of W·h, and of the logits."""
        return self.dtype or self.weight.dtype

    def cast(self) -> OutputHead:
        """The head with its weights in `product_dtype`; the same weights where they are."""
        bias = None if self.bias is None else self.bias.to(self.product_dtype)
        return replace(self, weight=self.weight.to(self.product_dtype), bias=bias)

    def finish(self, logits: Tensor) -> Tensor:
        """What stands behind the linear layer."""
        if self.multiplier != 1:
            logits = logits * self.multiplier
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return fold_ends(logits, self.stop_ids)

    def first(self, vocab_size: int) -> OutputHead:
        """The head of the first `vocab_size` columns: views of the weights, nothing is copied or computed twice."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def columns(self, ids: list[int]) -> OutputHead:
        """The head of chosen columns: copies of their weights, through which gradients reach the head's own."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias, stop_ids=())

    def to(self, device: torch.device) -> OutputHead:
        """The head with its weights on the device; the same head where they are there."""
        if self.weight.device == torch.device(device):
            return self
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> OutputHead:
        """The head of a model, held to the model's own logits on a few tokens.

        Args:
            model: a causal language model, also inside DDP, a DeepSpeed engine or a `PeftModel`. Where its weights
                are sharded over the ranks, every rank must call.

        Raises InputError where the model's logits are not such a function of its last hidden states, or where its
        head is to be trained and its weights are not whole.
        """
        inner, layer = unwrapped(model), output_layer(model)
        config = inner.config.get_text_config()
        probe = torch.linspace(0, config.vocab_size - 1, 16, device=input_device(inner)).long()[None]
        made: list[torch.dtype] = []  # by the layer itself: outside of autocast, its logits may be float32 again
        handle = layer.register_forward_hook(lambda _, __, product: made.append(product.dtype))
        try:
            with _reaching(layer) as reached:
                logits = model(input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False).logits
        finally:
            handle.remove()
        hidden = _the_one(reached, inner)
        weight, bias = _whole(layer)
        expected, hidden = logits.float().to(weight.device), hidden.to(weight.device)
        dtype = None if made[0] == weight.dtype else made[0]
        tolerance = max(1e-4, 4 * torch.finfo(made[0]).eps) * expected.abs().max()
        for factors in _factors(config):
            head = cls(weight, bias, *factors, dtype)
            got = head(hidden).float()
            if got.shape == expected.shape and (got - expected).abs().max() <= tolerance:
                return head
        raise InputError(
            f"The logits of {type(inner).__name__} are not what its linear head makes of its last hidden states, with "
            f"a factor or a soft-cap that its configuration names. {WITHOUT}"
        )


WITHOUT = "Leave out --teacher_cache and --logits_chunk: they need the head apart from the model."


def last_hidden_states(model: nn.Module, **inputs: Tensor) -> Tensor:
    """[B, L, H]: what the model's head reads, without the logits of all positions. Keeps the autograd graph.

    The whole model is called, so that hooks and wrappers around it do their work; but the head, once reached, is given
    the last position alone.

    Args:
        model: as for `OutputHead.of`.
        inputs: `input_ids` and `attention_mask`, int64 [B, L], and whatever else its forward takes.

    Raises InputError where the model has no head of its own module, or does not call it once.
    """
    inner = unwrapped(model)
    with _reaching(output_layer(model), lambda hidden: hidden[..., -1:, :]) as reached:
        model(**inputs, use_cache=False)
    return _the_one(reached, inner)


def response_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """[R, H]: the given rows of flattened [B, L, H] hidden states."""
    return hidden.flatten(0, 1).index_select(0, rows)


def logits_at(model: nn.Module, rows: Tensor, vocab_size: int, **inputs: Tensor) -> Tensor:
    """[R, vocab_size]: the model's own logits at some positions, the first columns of them. Keeps the autograd graph.

    Its head is given these positions alone: prompts and padding cost no logits.

    Args:
        model: as for `OutputHead.of`, with any head.
        rows: int64 [R], places in the flattened [B * L].
        inputs: as for `last_hidden_states`.
    """

    def chosen(values: Tensor) -> Tensor:
        return response_rows(values, rows.to(values.device))

    layer = unwrapped(model).get_output_embeddings()
    if layer is None:
        return chosen(model(**inputs, use_cache=False).logits)[:, :vocab_size]
    with _reaching(layer, lambda hidden: chosen(hidden)[None]) as reached:
        logits = model(**inputs, use_cache=False).logits
    # Not reached: a model that multiplies with the layer's weight itself, or one that was compiled without the hook.
    return (logits[0] if reached else chosen(logits))[:, :vocab_size]


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside DDP, a DeepSpeed engine, a compiled module or a `PeftModel`."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def output_layer(model: nn.Module) -> nn.Linear:
    """The linear layer that makes logits. Raises InputError where it is none, or no plain one."""
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    # A subclass with a forward of its own (quantised), or a wrapper (an adapter), computes something else.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        found = "no output embeddings" if layer is None else f"a {type(layer).__module__}.{type(layer).__qualname__}"
        raise InputError(
            f"The head of {type(inner).__name__} is {found}, not a plain linear layer (an adapter on the head is not "
            f"supported here). {WITHOUT}"
        )
    return layer


@contextlib.contextmanager
def _reaching(layer: nn.Module, choose: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Collects what the layer is given, and gives it what `choose` makes of that."""
    reached: list[Tensor] = []

    def hook(_, args: tuple) -> tuple | None:
        reached.append(args[0])
        return None if choose is None else (choose(args[0]), *args[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield reached
    finally:
        handle.remove()


def _the_one(reached: list[Tensor], model: nn.Module) -> Tensor:
    if len(reached) != 1:
        raise InputError(
            f"{type(model).__name__} calls its head {len(reached)} times in a forward, not once. {WITHOUT}"
        )
    return reached[0]


def input_device(model: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Where a model reads its input; `otherwise` where its weights are fetched when their layer runs."""
    device = model.get_input_embeddings().weight.device
    return torch.device(otherwise) if device.type == "meta" else device


def _whole(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """`(weight, bias)` of a layer; copies of what is sharded, or fetched when it is needed."""
    sharded, fetched = hasattr(layer.weight, "ds_id"), layer.weight.is_meta
    if not (sharded or fetched):
        return layer.weight, layer.bias
    if layer.weight.requires_grad:
        where = "sharded over the ranks (ZeRO-3)" if sharded else "fetched when they are needed"
        raise InputError(f"The weights of the head that is trained are {where}. {WITHOUT}")
    with contextlib.ExitStack() as stack:
        if sharded:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(layer.parameters())))
        else:
            stack.enter_context(align_module_device(layer))
        return layer.weight.clone(), None if layer.bias is None else layer.bias.clone()


def _factors(config) -> list[tuple[float, float, float | None]]:
    """`(multiplier, divisor, cap)`: what the configuration may mean, the most likely first."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, (int, float)) and value]

    caps = [*numbers(CAPS), None]
    scales = [(1.0, d) for d in numbers(DIVISORS)] + [(m, 1.0) for m in numbers(MULTIPLIERS)] + [(1.0, 1.0)]
    return [(*scale, cap) for cap in caps for scale in scales]
