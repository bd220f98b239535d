"""Makes a student of a pretrained model: the same network with another tokenizer, and fewer layers if wanted.

    python script_train/make_transfer_pair.py --model MODEL --tokenizer TOKENIZER --output FOLDER [--layers 15]
    python script_train/make_transfer_pair.py --model MODEL --train_tokenizer rows.json --output FOLDER

Tokenizer transfer is the pair on which cross-tokenizer methods can be told apart at small cost: pretrained weights on
both sides, and a student that has to learn to use its new vocabulary alone. The embedding of each new token, and its
row of the head, is the mean of the old ones of its text (Gee et al., arXiv 2402.09977): of the tokens that the old
tokenizer makes of it, or, where a token is no whole text, of the longest old tokens that its bytes consist of, one
after another. Special tokens take over the row of the same role. With --layers N, of all layers N are kept, at even
distances, the first and the last among them.

The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from get_vocab_mapper.builders import preferred_ids
from get_vocab_mapper.prefix_search import PrefixSearch
from get_vocab_mapper.token_forms import ROLES, TokenForms, token_forms
from modeling.errors import InputError, one_message, user_input
from modeling.models.language_model import LanguageModel
from modeling.text.json_files import read_json
from modeling.training.student import transformer_layers


def pieces_of(old: TokenForms, old_tokenizer, new: TokenForms) -> list[list[int]]:
    """Of each new token the old ids whose rows make its own; none where nothing stands for it."""
    search, exact = PrefixSearch(old), preferred_ids(old, ~old.is_special)
    roles = {new.roles[role]: old.roles[role] for role in reversed(ROLES) if role in new.roles and role in old.roles}
    pieces = []
    for i, form in enumerate(new.forms):
        if i in roles:
            pieces.append([roles[i]])
        elif form in exact and not new.is_special[i]:
            pieces.append([exact[form]])
        else:
            pieces.append(_tokens_of_text(form, old, old_tokenizer) or _longest_tokens(form, search, old))
    return pieces


def _tokens_of_text(form: bytes, old: TokenForms, tokenizer) -> list[int]:
    """What the old tokenizer makes of a token's text; nothing where that is not its bytes again."""
    try:
        ids = tokenizer(form.decode(), add_special_tokens=False)["input_ids"]
    except UnicodeDecodeError:
        return []
    return ids if b"".join(old.forms[i] for i in ids) == form else []


def _longest_tokens(form: bytes, search: PrefixSearch, old: TokenForms) -> list[int]:
    ids = []
    while form and (token := search.longest(form)) >= 0:
        ids.append(token)
        form = form[len(old.forms[token]) :]
    return ids


def mean_rows(weight: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    """`[len(pieces), H]`: of each token the mean of its pieces' rows of `[V, H]`; without pieces, of all rows."""
    rows = torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int64) for p in pieces]))
    token = torch.repeat_interleave(torch.tensor([len(p) for p in pieces]))
    count = torch.bincount(token, minlength=len(pieces))
    sums = torch.zeros(len(pieces), weight.shape[1]).index_add_(0, token, weight.float()[rows])
    means = sums / count.clamp(min=1)[:, None]
    return torch.where(count[:, None] > 0, means, weight.float().mean(0)).to(weight.dtype)


@torch.no_grad()
def give_vocabulary(model: PreTrainedModel, pieces: list[list[int]], tokenizer) -> None:
    """Replaces the model's embeddings and head by those of another tokenizer."""
    layers = [model.get_input_embeddings()]
    tied = model.get_output_embeddings().weight is layers[0].weight
    made = [mean_rows(layer.weight, pieces) for layer in (*layers, *([] if tied else [model.get_output_embeddings()]))]
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(made[0])
    if not tied:
        model.get_output_embeddings().weight.copy_(made[1])
    for role in ("eos", "bos", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        setattr(model.config.get_text_config(), f"{role}_token_id", token)
        setattr(model.generation_config, f"{role}_token_id", token)


def keep_layers(model: PreTrainedModel, count: int) -> list[int]:
    """Keeps so many of the model's layers, at even distances; returns their places.

    Raises InputError where the model has not so many, or keeps its layers elsewhere than others do.
    """
    config = model.config.get_text_config()
    with user_input(f"--layers {count}"):
        layers = transformer_layers(model)
    if not 1 <= count <= len(layers):
        raise InputError(f"--layers {count}: give 1 to {len(layers)}, which the model has.")
    kept = np.linspace(0, len(layers) - 1, count).round().astype(int).tolist() if count > 1 else [0]
    for i in reversed(range(len(layers))):
        if i not in kept:
            del layers[i]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    return kept


def trained_tokenizer(old_tokenizer, file: str, vocab_size: int):
    """A tokenizer of the old one's kind, trained on the texts of a data file. Raises InputError where it holds none."""
    rows = (row for _, row in read_json(file) if isinstance(row, dict))
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    if not any(texts):
        raise InputError(f"--train_tokenizer {file}: no column of its rows holds text. Give rows with prefix and text.")
    return old_tokenizer.train_new_from_iterator(texts, vocab_size)


@one_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or hub name of the pretrained model.")
    parser.add_argument("--tokenizer", help="Folder or hub name of the student's tokenizer.")
    parser.add_argument("--train_tokenizer", metavar="FILE", help="Or train one on the texts of a data file.")
    parser.add_argument("--vocab_size", type=int, default=8192, help="With --train_tokenizer. Default 8192.")
    parser.add_argument("--layers", type=int, help="So many of the model's layers, at even distances. Default: all.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the student.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the folder if it is there.")
    args = parser.parse_args()
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        parser.error("give either --tokenizer or --train_tokenizer")
    if args.output.exists() and not args.overwrite:
        raise InputError(f"--output {args.output} is there already. Give --overwrite, or name another folder.")
    source = LanguageModel(args.model, "model")
    model = source.load("auto")
    if args.tokenizer is not None:
        with user_input("--tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = trained_tokenizer(source.tokenizer, args.train_tokenizer, args.vocab_size)
    pieces = pieces_of(source.encoder.forms, source.tokenizer, token_forms(tokenizer))
    if args.layers is not None:
        print(f"layers kept: {keep_layers(model, args.layers)}")
    give_vocabulary(model, pieces, tokenizer)
    counts = [len(p) for p in pieces]
    report = {"tokens": len(counts), "copied": counts.count(1), "mean of several": sum(n > 1 for n in counts)}
    report["without a text"] = counts.count(0)
    unfinished = args.output.with_name(args.output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "transfer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(args.output, ignore_errors=True)
    unfinished.rename(args.output)
    print(f"{args.output}: " + ", ".join(f"{n} {what}" for what, n in report.items()))


if __name__ == "__main__":
    sys.exit(main())
