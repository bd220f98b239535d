"""A language model that an argument named: what is known of it before its weights are read, and the one way to load it.

Weights come from safetensors files alone: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import gather_params_ctx
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import cached_file, find_adapter_config_file

from modeling.errors import InputError, user_input
from modeling.models.model_files import require_causal, require_files, require_packages, told
from modeling.text.chat import ChatTemplate
from modeling.text.encoder import Encoder
from modeling.text.ends import stop_tokens

logger = logging.getLogger(__name__)

QUIETLY = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")  # `cached_file`: None


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in a folder or on the hub, whole or an adapter of another. Each part is read once.

    Attributes:
        path: hub name or folder.
        flag: the argument that named it, for messages.
        trust_remote_code: whether Python code that comes with the model is run.
        attn_implementation: attention kernel; None is the library's choice.
        chat_template: takes the place of its tokenizer's.
        template_kwargs: that its template is given where the rows are chats; None where they are not.
    """

    path: str
    flag: str
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    chat_template: str | None = None
    template_kwargs: dict | None = field(default=None, hash=False)

    def __str__(self) -> str:
        return f"--{self.flag} {self.path}"

    @cached_property
    def adapter(self) -> PeftConfig | None:
        """The configuration of an adapter (LoRA, …); None of a whole model.

        Raises InputError where it cannot be read, names no model below it, or adds tokens in front of the prompt
        instead of changing weights.
        """
        require_files(self.path, str(self))
        with told(f"{self}: its adapter_config.json cannot be loaded", self.path):
            config = PeftConfig.from_pretrained(self.path) if find_adapter_config_file(self.path) else None
        if config is not None and config.base_model_name_or_path is None:
            raise InputError(f"{self}: its adapter_config.json has no base_model_name_or_path, what it adapts.")
        if config is not None and config.is_prompt_learning:
            raise InputError(f"{self}: a {config.peft_type.value} adapter. Give one of weights, such as LoRA.")
        return config

    @cached_property
    def below(self) -> LanguageModel | None:
        """The model that an adapter adapts."""
        return self.adapter and replace(self, path=self.adapter.base_model_name_or_path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration; of an adapter, that of the model below it.

        Raises InputError where there is no such model, its weights are not in safetensors files, or it does not predict
        the next token.
        """
        if self.below is not None:
            return self.below.config
        with told(f"{self}: its configuration cannot be loaded", self.path):
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        require_causal(config, str(self))
        require_packages(config, str(self), self.attn_implementation)
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises InputError where it cannot be loaded."""
        with told(f"{self}: its tokenizer cannot be loaded", self.path):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    @property
    def side(self) -> str:
        return "teacher" if "teacher" in self.flag else "student"

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The tokenizer's chat template, where it has one."""
        return ChatTemplate(self.tokenizer, self.side, self.template_kwargs) if self.tokenizer.chat_template else None

    @cached_property
    def template_end(self) -> int | None:
        """The token that the template writes behind an assistant's message; None without a template or such a token."""
        try:
            return None if self.chat is None else self.chat.end_id
        except ValueError:  # it refuses the shortest of chats; of chat rows, the list of rows left out says so
            return None

    @cached_property
    def stop_tokens(self) -> dict[int, list[str]]:
        """The tokens that end a response in a chat, each with the places that name it (see `text.ends`)."""
        return stop_tokens(self.tokenizer, self._generation_eos, self.template_end)

    @property
    def _generation_eos(self) -> list[int]:
        """`eos_token_id` of generation_config.json, else of config.json; of an adapter without, the model's below."""

        def file(name: str) -> str | None:
            return cached_file(self.path, name, **dict.fromkeys(QUIETLY, False))

        for name in ("generation_config.json", "config.json"):
            if (path := file(name)) is not None:
                with user_input(f"{self}: its {name} cannot be read"):
                    settings = json.loads(Path(path).read_text(encoding="utf-8"))
                ids = settings.get("eos_token_id", (settings.get("text_config") or {}).get("eos_token_id"))
                return [] if ids is None else ids if isinstance(ids, list) else [ids]
        return self.below._generation_eos if file("adapter_config.json") is not None else []

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer, as training uses it: with its chat template where the rows are chats.

        Raises InputError where it cannot be used (see `Encoder`), or has no chat template and the rows are chats.
        """
        tokenizer = self.tokenizer  # whose own message names the flag already
        chats = self.template_kwargs is not None
        if chats:
            self._require_template()
        template_end = self.template_end if chats else None  # outside of a chat, no template has a say
        end = tokenizer.eos_token_id if template_end is None else template_end
        stop_ids = stop_tokens(tokenizer, self._generation_eos, template_end)
        stop_ids = sorted(stop_ids, key=lambda token: token != end)  # stable: the end, then as they are
        with user_input(str(self)):
            return Encoder(tokenizer, chat=self.chat if chats else None, stop_ids=stop_ids)

    def _require_template(self) -> None:
        if self.chat is None:
            raise InputError(
                f"{self}: the rows are chats, and the {self.side}'s tokenizer has no chat template. Give one: "
                f"--{self.side}_chat_template FILE (a Jinja template, such as chat_template.jinja of the other model)."
            )
        if self.template_end is None:
            logger.warning(
                "%s: its chat template writes no token of its tokenizer behind an answer: responses end with EOS, %r.",
                *(self, self.tokenizer.eos_token),
            )
        if self.chat.writes_the_date:
            logger.warning(
                "%s: its chat template may write the day's date, so that prompts change from day to day. Many take a "
                'date: --template_kwargs \'{"date_string": "1 Jan 2026"}\'.',
                self,
            )

    @cached_property
    def vocab_size(self) -> int:
        """How many tokens its tokenizer has; its head may be wider."""
        return max(len(self.tokenizer), max(self.tokenizer.get_vocab().values(), default=-1) + 1)

    @property
    def longest_input(self) -> int | None:
        """How many tokens the model was made for; None where its positions have no end (ALiBi, recurrent models).

        Beyond, learned positions fail, and rotary ones, which have seen no such angles, give poor predictions unsaid.
        """
        config = self.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if longest is not None and "factor" in rope:  # some families count it in, others do not
            longest = max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest)))
        return longest

    def require_room_for(self, block_size: int) -> None:
        """Raises InputError where an example of `block_size` tokens may be longer than the model reads.

        Reads the configuration and the tokenizer, and raises what is wrong with them.
        """
        longest, _ = self.longest_input, self.encoder
        if longest is not None and block_size > longest:
            raise InputError(
                f"--block_size is {block_size}: {self} reads {longest} tokens at most (max_position_embeddings in its "
                f"config.json). Give --block_size {longest} or less."
            )

    def load(self, dtype: str, merge: bool = True, **options) -> PreTrainedModel | PeftModel:
        """The model, with room for as many tokens as its tokenizer has: the one way to load any, to train or to ask.

        Args:
            dtype: of the weights; "auto" is the checkpoint's.
            merge: whether an adapter becomes part of the weights. Otherwise a `PeftModel` keeps it apart. (One that the
                model below it may have is merged.)
            options: further ones of `from_pretrained`.

        Raises InputError where weights are missing, or the tokenizer is longer than the embeddings of an adapter.
        """
        if self.below is None:
            model = self._load_whole(dtype, options)
            _make_room(model, self.vocab_size, self)
            return model
        if merge and is_deepspeed_zero3_enabled():
            raise InputError(f"{self} is an adapter, and is not merged under ZeRO-3. Train with ZeRO-2, or --use_lora.")
        model = self._with_adapter(self.below._load_any(dtype, options), merge, options.get("device_map"))
        return merged(model) if merge else model

    def _load_any(self, dtype: str, options: dict) -> PreTrainedModel:
        """As it lies there, whatever its tokenizer."""
        return self._load_whole(dtype, options) if self.below is None else self.load(dtype, **options)

    def _load_whole(self, dtype: str, options: dict) -> PreTrainedModel:
        with told(f"{self}: its weights cannot be loaded", self.path):
            model, loading = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **({"attn_implementation": self.attn_implementation} if self.attn_implementation else {}),
                **options,
            )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(
                f"{self}: {len(missing)} of the model's weights are not in its files, and would be random numbers: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Give a model that was saved whole, with "
                "the head that predicts the next token."
            )
        return model

    def _with_adapter(self, model: PreTrainedModel, merge: bool, device_map: object) -> PeftModel:
        with told(f"{self}: the weights of its adapter cannot be loaded", self.path):
            file = cached_file(self.path, SAFETENSORS_WEIGHTS_NAME)  # peft would read a pickle where this is not there
        n_adapted = _embeddings_beside(file, model)
        if 0 < n_adapted < self.vocab_size:
            raise InputError(
                f"{self}: the tokenizer has {self.vocab_size} tokens, and the adapter was trained with {n_adapted} "
                "embeddings. Give it the tokenizer that it was trained with."
            )
        if n_adapted:
            _resize(model, n_adapted)
        else:
            _make_room(model, self.vocab_size, self)
        weights = list(dict.fromkeys(layer.weight for layer in _embeddings(model)))
        with (
            told(f"{self}: its adapter cannot be loaded", self.path),
            gather_params_ctx(weights, modifier_rank=0),  # which it may hold; they lie apart under ZeRO-3
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("error", "Found missing adapter keys")
            try:
                return PeftModel.from_pretrained(
                    *(model, self.path),
                    config=self.adapter,
                    is_trainable=not merge,
                    torch_device="cpu",
                    # Where the model is: peft would spread one anew that has a part on the CPU.
                    device_map="auto" if device_map in (None, "auto") else {"": device_map},
                )
            except (RuntimeError, UserWarning) as error:
                if not re.search("size mismatch|missing adapter keys", str(error)):
                    raise
                raise InputError(
                    f"{self}: the weights of its adapter do not fit its adapter_config.json, or the model that this "
                    f"names ({self.below.path}). Give the files of one adapter, and the model it was trained on."
                ) from error


def _make_room(model: PreTrainedModel, vocab_size: int, what: object) -> None:
    n_embeddings = model.get_input_embeddings().num_embeddings
    if vocab_size > n_embeddings:
        logger.warning(
            "%s: the tokenizer has %d tokens and the model %d embeddings; the model is resized to the tokenizer. The "
            "new embeddings are untrained.",
            *(what, vocab_size, n_embeddings),
        )
        _resize(model, vocab_size)


def _resize(model: PreTrainedModel, vocab_size: int) -> None:
    """The new embeddings are drawn alike each time: an adapter that was trained beside them need not hold them."""
    if vocab_size != model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(vocab_size)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The layers whose size is that of the vocabulary: input embeddings, and head."""
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]


def _embeddings_beside(file: str, model: PreTrainedModel) -> int:
    """How many tokens a model had when an adapter was trained on it; 0 where the adapter's weights do not tell."""
    names = {module: name for name, module in model.named_modules()}
    axis = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}
    with safe_open(file, "pt") as weights:
        for layer in _embeddings(model):
            for name, place in axis.items():
                key = f"base_model.model.{names[layer]}.{name}"
                if key in weights.keys():  # noqa: SIM118
                    return weights.get_slice(key).get_shape()[place]
    return 0


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter in its weights, all of them to be trained. It takes the `PeftModel` apart.

    Where an adapter changed one of two tied matrices, the model has two: tie_word_embeddings is false from here on.
    """
    layers = _embeddings(model.get_base_model())
    if len({id(layer.weight) for layer in layers}) < len(layers):
        for layer in layers:
            if isinstance(layer, BaseTunerLayer):
                base = layer.get_base_layer()
                base.weight = nn.Parameter(base.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # that is what has been done
        return model.merge_and_unload().requires_grad_(True)
