"""What is wrong with the files of a model, said in one line before its weights are read.

Weights come from safetensors files alone: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
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
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from modeling.errors import InputError, first_line

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_files(path: str, what: str) -> None:
    """Raises InputError where a folder is no model's, or neither a folder nor the hub has a model of that name."""
    if Path(path).is_dir():
        _require_model_folder(Path(path), what)
    else:
        _require_on_hub(path, what)


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
            raise InputError(
                f"{what}: its weights are a pickle ({pickles[0]}), which can run code; only safetensors files are "
                "read. Where you trust its source, convert it once: AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER), and the same with AutoTokenizer."
            )
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
    except RepositoryNotFoundError as error:
        gated = isinstance(error, GatedRepoError)
        why = "is gated: ask for access there" if gated else "does not show it to this account: check the spelling"
        raise InputError(
            f"{no_folder}, and {constants.ENDPOINT}/{name} {why}, and log in with `hf auth login`, or set HF_TOKEN."
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


def require_causal(config: PreTrainedConfig, what: str) -> None:
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


def require_packages(config: PreTrainedConfig, what: str, attn_implementation: str | None) -> None:
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
    if attn_implementation and isinstance(model_class, type):
        config = copy.deepcopy(config)
        config._attn_implementation = attn_implementation
        try:
            with torch.device("meta"):
                model_class(config)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--attn_implementation {attn_implementation}: {what} cannot be run with it here: "
                f"{first_line(error)}. Leave it out, or give sdpa or eager."
            ) from error


@contextlib.contextmanager
def told(what: str, path: str) -> Iterator[None]:
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
        elif isinstance(error, (json.JSONDecodeError, KeyError, SafetensorError)) or type(error) is Exception:
            reason = f"a file is damaged, or no more than a pointer of Git LFS ({error}). Copy the files again"
        elif isinstance(error, (OSError, ValueError, ImportError)):
            reason = first_line(error)
        else:
            raise
        raise InputError(f"{what}: {reason}.") from error
