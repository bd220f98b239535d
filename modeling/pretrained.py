"""Models and tokenizers from a folder or the hub, and what is wrong with them, said before the weights are read.

Weights come from safetensors files alone: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import gather_params_ctx
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file, find_adapter_config_file

from modeling.arguments import StudentArguments
from modeling.errors import InputError, first_line, user_input
from modeling.examples import Encoder

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS_ONLY = (
    "weights are read from safetensors files alone, as a pickle can run code. Where you trust its source, convert it "
    'once: AutoModelForCausalLM.from_pretrained("FOLDER").save_pretrained("NEW_FOLDER"), and the same with '
    "AutoTokenizer"
)


def load_config(path: str, flag: str, args: StudentArguments) -> PreTrainedConfig:
    """The configuration of a model, after a look at its files; of an adapter, that of the model below it.

    Args:
        path: hub name or folder.
        flag: the argument that named it, for messages.

    Raises InputError where there is no such model, its weights are not in safetensors files, or it does not predict the
    next token.
    """
    what = f"--{flag} {path}"
    if Path(path).is_dir():
        _require_model_folder(Path(path), what)
    else:
        _require_on_hub(path, what)
    adapter = adapter_config(path, flag)
    if adapter is not None:
        return load_config(adapter.base_model_name_or_path, flag, args)
    with _told(f"{what}: its configuration cannot be loaded", path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    _require_causal(config, what)
    _require_packages(config, what, args)
    return config


def adapter_config(path: str, flag: str) -> PeftConfig | None:
    """The configuration of an adapter (LoRA, …); None of a whole model.

    Raises InputError where it cannot be read, names no model below it, or adds tokens in front of the prompt instead of
    changing weights.
    """
    what = f"--{flag} {path}: its adapter_config.json"
    with _told(f"{what} cannot be loaded", path):
        config = PeftConfig.from_pretrained(path) if find_adapter_config_file(path) else None
    if config is not None and config.base_model_name_or_path is None:
        raise InputError(f"{what} has no base_model_name_or_path, the model that it adapts. Write its path there.")
    if config is not None and config.is_prompt_learning:
        raise InputError(f"{what} is one of {config.peft_type.value}. Give an adapter of weights, such as LoRA.")
    return config


def load_encoder(path: str, flag: str, args: StudentArguments) -> Encoder:
    """The tokenizer of a model. Raises InputError where it cannot be loaded, or used (see `Encoder`)."""
    with _told(f"--{flag} {path}: its tokenizer cannot be loaded", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    with user_input(f"--{flag} {path}"):
        return Encoder(tokenizer)


def load_model(
    path: str, flag: str, dtype: str, args: StudentArguments, n_tokens: int, merge: bool = True, **options
) -> PreTrainedModel | PeftModel:
    """A model with room for as many tokens as its tokenizer has, in training or for good: the one way to load any.

    Args:
        path: hub name or folder, of a whole model or of an adapter. The model below it may be one with an adapter too,
            which is merged.
        flag: the argument that named it, for messages.
        n_tokens: the length of its tokenizer.
        merge: whether an adapter becomes part of the weights. Otherwise a `PeftModel` keeps it apart, to be trained.
        options: further ones of `from_pretrained`.

    Raises InputError where weights are missing, or the tokenizer is longer than the embeddings of an adapter.
    """
    what = f"--{flag} {path}"
    adapter = adapter_config(path, flag)
    if adapter is not None:
        if merge and is_deepspeed_zero3_enabled():
            raise InputError(f"{what} is an adapter, and is not merged under ZeRO-3. Train with ZeRO-2, or --use_lora.")
        model = load_model(adapter.base_model_name_or_path, flag, dtype, args, 0, **options)
        model = _with_adapter(model, path, what, adapter, n_tokens, merge, options.get("device_map"))
        return merged(model) if merge else model
    with _told(f"{what}: its weights cannot be loaded", path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=args.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({"attn_implementation": args.attn_implementation} if args.attn_implementation else {}),
            **options,
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{what}: {len(missing)} of the model's weights are not in its files, and would be random numbers: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Give a model that was saved whole, with the "
            "head that predicts the next token."
        )
    _make_room(model, n_tokens, what)
    return model


def _with_adapter(
    model: PreTrainedModel, path: str, what: str, adapter: PeftConfig, n_tokens: int, merge: bool, device_map: object
) -> PeftModel:
    with _told(f"{what}: the weights of its adapter cannot be loaded", path):
        file = cached_file(path, SAFETENSORS_WEIGHTS_NAME)  # peft would read a pickle where this is not there
    n_adapted = _embeddings_beside(file, model)
    if 0 < n_adapted < n_tokens:
        raise InputError(
            f"{what}: the tokenizer has {n_tokens} tokens, and the adapter was trained with {n_adapted} embeddings. "
            "Give it the tokenizer that it was trained with."
        )
    if n_adapted:
        _resize(model, n_adapted)
    else:
        _make_room(model, n_tokens, what)
    weights = list(dict.fromkeys(layer.weight for layer in _embeddings(model)))
    with (
        _told(f"{what}: its adapter cannot be loaded", path),
        gather_params_ctx(weights, modifier_rank=0),  # which it may hold; they lie apart under ZeRO-3
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(
                *(model, path),
                config=adapter,
                is_trainable=not merge,
                torch_device="cpu",
                # Where the model is: peft would spread one anew that has a part on the CPU.
                device_map="auto" if device_map in (None, "auto") else {"": device_map},
            )
        except (RuntimeError, UserWarning) as error:
            if not re.search("size mismatch|missing adapter keys", str(error)):
                raise
            raise InputError(
                f"{what}: the weights of its adapter do not fit its adapter_config.json, or the model that this names "
                f"({adapter.base_model_name_or_path}). Give the files of one adapter, and the model it was trained on."
            ) from error


def _make_room(model: PreTrainedModel, n_tokens: int, what: str) -> None:
    n_embeddings = model.get_input_embeddings().num_embeddings
    if n_tokens > n_embeddings:
        logger.warning(
            "%s: the tokenizer has %d tokens and the model %d embeddings; the model is resized to the tokenizer. The "
            "new embeddings are untrained.",
            *(what, n_tokens, n_embeddings),
        )
        _resize(model, n_tokens)


def _resize(model: PreTrainedModel, n_tokens: int) -> None:
    """The new embeddings are drawn alike each time: an adapter that was trained beside them need not hold them."""
    if n_tokens != model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(n_tokens)


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


# --------------------------------------------------------------------------------------------------- what is not there


def _require_model_folder(folder: Path, what: str) -> None:
    names = sorted(file.name for file in folder.iterdir())
    configs = {"config.json", "adapter_config.json"} & set(names)
    if not configs:
        checkpoints = [name for name in names if (folder / name / "config.json").is_file()]
        _refuse_gguf(what, folder, names)
        hint = f" There is a model in its folder {checkpoints[-1]}." if checkpoints else ""
        raise InputError(
            f"{what}: the folder has no config.json, so it is no model's: it holds {', '.join(names[:6]) or 'nothing'}"
            f"{', …' if len(names) > 6 else ''}. Give the folder that save_pretrained wrote.{hint}"
        )
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_gguf(what, folder, names)
        pickles = [name for name in names if name.endswith(PICKLES) and name != "training_args.bin"]
        if pickles:
            raise InputError(f"{what}: its weights are a pickle ({pickles[0]}), and {SAFETENSORS_ONLY}.")
        raise InputError(f"{what}: the folder has no weights (no .safetensors file). Was it copied whole?")


def _refuse_gguf(what: str, folder: str | Path, names: Iterable[str]) -> None:
    """Raises InputError where a file of these is in GGUF, saying how it becomes a model that is taken."""
    for name in names:
        if name.lower().endswith(".gguf"):
            raise InputError(
                f"{what}: its weights are in GGUF ({name}), which is no format to train with or to teach from. Convert "
                f'them once: AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{name}")'
                '.save_pretrained("NEW_FOLDER"), and the same with AutoTokenizer; then give NEW_FOLDER.'
            )


def _require_on_hub(name: str, what: str) -> None:
    """Raises InputError where the name is neither a folder nor that of a model that the hub, or its cache, gives out.

    One quick question, so that a wrong name or a missing network is told at once: transformers asks for many files, and
    for each of them again and again.
    """
    if Path(name).exists():
        _refuse_gguf(what, Path(name).parent, [Path(name).name])
        raise InputError(f"{what} is a file. Give the folder that it is in.")
    no_folder = f"{what}: there is no such folder"
    try:
        url = hf_hub_url(name, "config.json")
        if name.count("/") > 1 or name.startswith("~"):
            raise HFValidationError
        get_hf_file_metadata(url)
    except HFValidationError:
        raise InputError(f"{no_folder}. Check the path; a relative one starts at {Path.cwd()}.") from None
    except EntryNotFoundError:
        # The model is there, without this file: an adapter, or GGUF files, which are by custom in the name.
        if "gguf" in name.lower():
            _refuse_gguf(what, name, ["FILE.gguf"])
    except GatedRepoError as error:
        raise InputError(
            f"{what}: the model is gated, and this account has no access to it. Ask for access at "
            f"{constants.ENDPOINT}/{name}, then log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{no_folder}, and the hub has no model of this name that this account may see. Check the spelling; for a "
            "private model log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            if not offline:
                logger.warning(
                    "%s: the hub cannot be reached (%s); the copy in its cache will do. HF_HUB_OFFLINE=1 saves the "
                    "waiting.",
                    *(what, error),
                )
            return
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({error})"
        raise InputError(
            f"{no_folder}, {why}, and the hub's cache has no copy. Check the path; or fetch the model where there is a "
            f"network (hf download {name} --local-dir FOLDER), and give that folder."
        ) from error
    except httpx.HTTPError as error:
        logger.warning("%s: the hub answers %s; trying on.", what, error)


def _require_causal(config: PreTrainedConfig, what: str) -> None:
    """Raises InputError for a model that does not predict a token from those in front of it."""
    kind = None
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        kind = "an encoder, which sees the token that it is to predict"  # BERT's kind, which can be either
    if kind:
        raise InputError(
            f"{what} is {kind} ({config.model_type}). Give a causal language model, one that AutoModelForCausalLM is "
            "meant for."
        )


def _require_packages(config: PreTrainedConfig, what: str, args: StudentArguments) -> None:
    """Raises InputError where the weights' quantisation, or the attention that was asked for, is not to be had here.

    transformers itself is asked, as it asks itself when it loads the weights.
    """
    quantization = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if quantization is not None:
        try:
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
            quantizer.validate_environment(device_map="auto", weights_only=True)
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"{what}: its weights are quantised, and that cannot be read here: {first_line(error)}. Install what "
                "is missing, or give the model that was not quantised."
            ) from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None where the model brings code of its own
    if args.attn_implementation and isinstance(model_class, type):
        config = copy.deepcopy(config)
        config._attn_implementation = args.attn_implementation
        try:
            with torch.device("meta"):
                model_class(config)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--attn_implementation {args.attn_implementation}: {what} cannot be run with it here: "
                f"{first_line(error)}. Leave it out, or give sdpa or eager."
            ) from error


@contextlib.contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    """What transformers raises for bad files becomes an InputError of a line; other exceptions stay what they are."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{what}: it needs Python code that comes with the model, which is not run unasked. Read the code "
                f"({path}); where you trust it, give --trust_remote_code true."
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            reason = "they do not have the shapes that config.json says (listed above). Give the files of one model"
        elif isinstance(error, OSError) and "safetensors" in str(error) and not Path(path).is_dir():
            reason = f"the hub has no safetensors file of it; {SAFETENSORS_ONLY}"
        elif str(error).startswith("Couldn't instantiate the backend tokenizer"):
            reason = "it has no tokenizer.json, and none can be made of what is there. Copy the tokenizer's files to it"
        elif isinstance(error, (json.JSONDecodeError, KeyError, SafetensorError)) or type(error) is Exception:
            reason = f"a file is damaged, or no more than a pointer of Git LFS ({error}). Copy the files again"
        elif isinstance(error, (OSError, ValueError, ImportError)):
            reason = first_line(error)
        else:
            raise
        raise InputError(f"{what}: {reason}.") from error
