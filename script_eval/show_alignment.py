"""One HTML page on which a person sees how a teacher and a student meet on a text.

    python script_eval/show_alignment.py --teacher outputs/teacher --student outputs/student \\
        --mapper outputs/em.safetensors --file data/dolly_train.sample.json --row 7 --output page.html

Both tokenisations of the response stand one above the other, group by group: once as dynamic time warping aligns them,
once exactly, by bytes. Groups that do not cover the same bytes on both sides are marked. Pointing at a group shows both
sides' most probable tokens in it, which pairs the mapper finds between them, and how much of the teacher's probability
these hold. The page needs nothing but itself, and no network.

All figures are those of training with `run_clm_distill_CDM.py`, by the same functions, at temperature 1. Where a folder
holds no weights, only a tokenizer, the page shows the alignments alone: dynamic time warping then has equal weights.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from eval_records import write_text
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from get_vocab_mapper.vocab_mapper import DEFAULT_THRESHOLD, VocabMapper, build_em, exact_matches, load_mapper
from modeling.alignment import (
    Groups,
    aligned_tokens,
    alignment_counts,
    byte_groups,
    concatenate_groups,
    dtw_groups,
    entropy,
    entropy_weights,
)
from modeling.arguments import StudentArguments
from modeling.contextual_mapping import contextual_kl, direction_maps, group_topk, match_pairs
from modeling.divergences import cross_entropy
from modeling.examples import Encoder, ResponseCollator, prefix_and_text, prepare_example, read_rows
from modeling.experiment import longest_input
from modeling.pretrained import load_config, load_encoder, load_model

TEMPLATE = Path(__file__).with_name("alignment_page.html")
SIDES = ("teacher", "student")
OTHER = {"teacher": "student", "student": "teacher"}
COLUMNS = {"teacher": "teacher_", "student": ""}  # how the collator's names of each side begin
SHOWN = 10  # of each side's top tokens
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


# ------------------------------------------------------------------------------------------------ models and the text


@dataclass
class Side:
    """One of the two models; without weights, only its tokenizer."""

    name: str
    encoder: Encoder
    longest: int | None = None  # tokens that the model reads
    model: PreTrainedModel | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.encoder.forms)


def has_weights(name: str) -> bool:
    """Whether a folder holds a model, not only a tokenizer. A hub name is taken to."""
    folder = Path(name)
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in patterns)


def look_at(flag: str, name: str, with_model: bool, args: argparse.Namespace) -> Side:
    """A side without its weights, which may take minutes to load. Raises ValueError naming the flag."""
    options = StudentArguments(name, trust_remote_code=args.trust_remote_code)
    longest = longest_input(load_config(name, flag, options)) if with_model else None
    return Side(name, load_encoder(name, flag, options), longest)


def load_weights(flag: str, side: Side, args: argparse.Namespace) -> None:
    options = StudentArguments(side.name, trust_remote_code=args.trust_remote_code)
    model = load_model(side.name, flag, args.dtype, options, side.n_tokens)
    side.model = model.to(args.device).eval()


def example_of(args: argparse.Namespace) -> tuple[dict, str]:
    """The row to show, and where it is from. Raises FileNotFoundError, or ValueError naming the file and the row."""
    if args.text is not None:
        prefix, text = prefix_and_text({"prefix": args.prefix, "text": args.text})
        return {"row": 1, "prefix": prefix, "text": text}, "--text"
    last = 0
    for row in read_rows(args.file):
        last = row["row"]
        if last == args.row:
            return row, f"{args.file}, row {args.row}"
    if last < args.row:
        raise ValueError(f"{args.file} has {last} rows, --row is {args.row}.")
    raise ValueError(f"{args.file}: line {args.row} is empty, --row must name another.")


def prepare(row: dict, source: str, sides: dict[str, Side], block_size: int | None) -> dict:
    """The columns of `prepare_example`. Raises ValueError where no response is left or a model reads no such length."""
    encoders = [sides["student"].encoder, sides["teacher"].encoder]
    example = prepare_example(row, encoders, block_size or sys.maxsize)
    if example["fault"]:
        fault = example["fault"] if row.get("fault") or block_size else "no token is left of its text"
        raise ValueError(f"{source}: {fault}. Training leaves such a row out.")
    for name, side in sides.items():
        length = len(example[f"{COLUMNS[name]}input_ids"])
        if side.longest is not None and length > side.longest:
            raise ValueError(
                f"{source}: prompt and text have {length} {name} tokens, and {side.name} reads {side.longest} at most. "
                f"Give a shorter text, or --block_size {side.longest}, which cuts it as in training."
            )
    return example


# --------------------------------------------------------------------------------------------------------- the figures


@torch.no_grad()
def predicting_logits(side: Side, side_name: str, batch: dict) -> torch.Tensor:
    """[R, n_tokens] on the host: the logits that predict the response tokens, in the model's dtype."""
    column = COLUMNS[side_name]
    ids, mask = (batch[f"{column}{name}"].to(side.model.device) for name in ("input_ids", "attention_mask"))
    logits = side.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits.flatten(0, 1)[batch[f"{column}positions"].to(logits.device), : side.n_tokens].cpu()
    if not logits.isfinite().all():
        raise ValueError(f"{side.name} gives logits that are not finite in {logits.dtype}. Try --dtype float32.")
    return logits


def page_data(sides: dict[str, Side], mapper: VocabMapper | None, example: dict, topk: int) -> dict:
    """What the page shows of one prepared example, as JSON values; with a mapper the sides must have their models."""
    collate = ResponseCollator(sides["student"].encoder, sides["teacher"].encoder, edit_distances=True)
    batch = collate([example])
    response = batch["responses"][0]
    ends = {"teacher": response.teacher_ends, "student": response.ends}
    ids = {name: example[f"{COLUMNS[name]}input_ids"][-len(ends[name]) :] for name in SIDES}
    used = {name: set(ids[name].tolist()) for name in SIDES}
    data = {
        name: {"name": sides[name].name, "ids": ids[name].tolist(), "ends": ends[name].tolist()} for name in SIDES
    }

    logits = {}
    weights = {name: np.ones(len(ids[name]), dtype=np.int64) for name in SIDES}
    if mapper is not None:
        for name in SIDES:
            z = logits[name] = predicting_logits(sides[name], name, batch)
            h, ce = entropy(z), cross_entropy(z, torch.from_numpy(ids[name]))
            weights[name] = entropy_weights(h, [len(h)]).numpy()
            data[name] |= {
                "entropy": rounded(h),
                "weight": weights[name].tolist(),
                "probability": rounded((-ce).exp()),
                "bits_per_byte": rounded(ce.sum() / math.log(2) / response.n_bytes),
            }

    aligned = {
        "dtw": dtw_groups(response.distance, response.teacher_index, response.student_index, *weights.values()),
        "byte": byte_groups(response.teacher_ends, response.ends),
    }
    for name, (teacher_group, student_group) in aligned.items():
        groups = concatenate_groups([(teacher_group, student_group)])
        counts = alignment_counts([(response.teacher_ends, response.ends)], [(teacher_group, student_group)])
        same = aligned_tokens(response.teacher_ends, response.ends, teacher_group, student_group)
        data[name] = {
            "teacher_size": groups.teacher_size.tolist(),
            "student_size": groups.student_size.tolist(),
            "same_bytes": same[np.unique(student_group, return_index=True)[1]].tolist(),
            **{count: rounded(n / len(student_group)) for count, n in counts.items()},
        }
        if mapper is not None:
            data[name] |= mapping(logits, groups, mapper, [sides[s].encoder.forms for s in SIDES], topk, used)
    data["tokens"] = {
        name: {token: visible_token(sides[name].encoder, token) for token in sorted(used[name])} for name in SIDES
    }
    data["n_bytes"] = int(response.n_bytes)
    return data


def mapping(
    logits: dict[str, torch.Tensor],
    groups: Groups,
    mapper: VocabMapper,
    forms: Sequence,
    topk: int,
    used: dict[str, set[int]],
) -> dict:
    """Step 4 of CDM on every group: the top tokens `[id, probability, the other side's id or -1, kind]`, and the means.

    Adds the ids that occur to `used`.
    """
    maps = dict(zip(SIDES, direction_maps(mapper)))
    exact = dict(zip(SIDES, exact_matches(*forms)))
    k = min(topk, *(z.shape[1] for z in logits.values()))
    sizes = {"teacher": groups.teacher_size, "student": groups.student_size}
    top = {name: group_topk(logits[name], sizes[name], k, with_logsumexp=True) for name in SIDES}

    shown = {}
    for name in SIDES:
        own, other = top[name].ids.numpy(), top[OTHER[name]].ids.numpy()
        matches = match_pairs(own, other, maps[name], logits[OTHER[name]].shape[1])
        kinds = np.select(
            [matches < 0, maps[name].static[own] < 0, matches == exact[name][own]],
            ["none", "similar", "exact"],
            default="static",
        )
        probabilities = (top[name].values - top[name].logsumexp[:, None]).exp()
        columns = (own, np.array(rounded(probabilities)), matches, kinds)
        shown[name] = [list(zip(*(part[:SHOWN].tolist() for part in group))) for group in zip(*columns)]
        used[name].update(own[:, :SHOWN].flatten().tolist())
        used[OTHER[name]].update(u for u in matches[:, :SHOWN].flatten().tolist() if u >= 0)

    cdm = contextual_kl(logits["student"], logits["teacher"], groups, maps["teacher"], maps["student"], topk)
    per_token = torch.from_numpy(groups.student_size) / groups.student_size.sum()
    return {
        "top": shown,
        "group_mapped_rate": rounded(cdm.mapped_rate),
        "group_teacher_mass": rounded(cdm.teacher_mass),
        "group_kd": rounded(cdm.kd),
        "mapped_rate": rounded(cdm.mapped_rate.mean()),
        "teacher_mass": rounded(cdm.teacher_mass.mean()),
        "kd_loss": rounded((cdm.kd * per_token).sum()),
    }


def rounded(values: torch.Tensor | float) -> list | float:
    """Six significant digits are enough for a page."""
    if isinstance(values, torch.Tensor):
        return rounded(values.tolist())
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.6g}")


# ------------------------------------------------------------------------------------------------------------ the page


def visible_token(encoder: Encoder, token: int) -> dict:
    form = encoder.forms.forms[token]
    return {
        "parts": visible(form) if form else [[f"id {token}", ""]],  # an id that stands for no text
        "special": bool(encoder.forms.is_special[token]),
    }


def visible(form: bytes) -> list[str | list[str]]:
    """A token's text in parts: a string, or `[mark, its bytes in hexadecimal]` for what cannot be seen by itself.

    That is white space, control characters, and the bytes of a character that the token does not hold whole.
    """
    parts: list[str | list[str]] = []
    for character in form.decode("utf-8", "surrogateescape"):
        raw = character.encode("utf-8", "surrogateescape")
        if "\udc80" <= character <= "\udcff":
            parts.append([f"{raw[0]:02X}", raw.hex()])
        elif character in MARKS:
            parts.append([MARKS[character], raw.hex()])
        elif not character.isprintable():
            parts.append([f"U+{ord(character):04X}", raw.hex()])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def notes(row: dict, example: dict, sides: dict[str, Side], why_no_models: str | None) -> list[str]:
    """What a reader must know to read the figures right."""
    lines = []
    if why_no_models:
        lines.append(f"Tokenizers only ({why_no_models}): equal weights in dynamic time warping, and no predictions.")
    if example["cut"]:
        lines.append("The text is cut to --block_size tokens, and so has no end-of-sequence token.")
    for name, side in sides.items():
        first = int(example[f"{COLUMNS[name]}input_ids"][-len(example[f"{COLUMNS[name]}ends"])])
        if not row["prefix"] and example[f"{COLUMNS[name]}ends"][0] > len(side.encoder.forms.forms[first]):
            lines.append(f"The {name}'s first token is left out: nothing stands before it that could predict it.")
    return lines


def page(data: dict) -> str:
    """The whole HTML page. No text of the data can end the script element that it stands in."""
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{DATA}}")
    title = html.escape(f"{data['teacher']['name']} → {data['student']['name']}")
    return before.replace("{{TITLE}}", title) + embedded + after


# ------------------------------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> None:
    names = {"teacher": args.teacher, "student": args.student}
    without = [name for name in names.values() if not has_weights(name)]
    why_no_models = "--tokenizers_only" if args.tokenizers_only else None
    if without and not args.tokenizers_only:
        why_no_models = f"no weights in {' and '.join(without)}"
    if args.mapper and why_no_models:
        raise ValueError(f"--mapper {args.mapper}: a mapping needs both models' predictions ({why_no_models}).")

    # All that can be wrong is found before the weights are loaded.
    row, source = example_of(args)
    sides = {flag: look_at(flag, name, not why_no_models, args) for flag, name in names.items()}
    example = prepare(row, source, sides, args.block_size)
    forms = [side.encoder.forms for side in sides.values()]
    if why_no_models:
        mapper, description = None, {}
    else:
        if args.mapper:
            mapper, origin = load_mapper(args.mapper, *forms, args.simi_threshold), args.mapper
        else:
            mapper, origin = build_em(*forms, args.simi_threshold), "built for this page"
        k = min(args.topk, *map(len, forms))
        description = {"mapper": f"{origin} ({mapper.kind}, θ = {mapper.threshold})", "topk": k}
        for flag, side in sides.items():
            load_weights(flag, side, args)

    data = page_data(sides, mapper, example, args.topk) | description
    data |= {"source": source, "prefix": row["prefix"], "notes": notes(row, example, sides, why_no_models)}
    write_text(args.output, page(data))
    print(f"written: {args.output}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--teacher", required=True, help="A folder, a hub name, or the folder of a LoRA adapter.")
    add("--student", required=True, help="Likewise.")
    add("--mapper", help="The mapper file of the pair. Without it, an EM mapper is built for this page: some seconds.")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="The response to show.")
    text.add_argument("--file", help="A training file; --row says which of its rows to show.")
    add("--row", type=int, help="The row of --file: its place in the array, or its line, from 1.")
    add("--prefix", help="The prompt in front of --text. Default none.")
    add("--output", type=Path, required=True, help="The HTML file to write.")
    add("--topk", type=int, default=100, help="Candidates a side and group, as in training. Default 100.")
    add(
        *("--simi_threshold", "--simi_threadshold"),
        type=float,
        default=DEFAULT_THRESHOLD,
        help="Normalised distance below which strings are similar, as in training. Default 0.3.",
    )
    add("--block_size", type=int, help="Cut the text to so many tokens, as in training. By default it is not cut.")
    add("--tokenizers_only", action="store_true", help="Show the alignments alone, and load no weights.")
    add("--device", help="Where the models run: cpu, cuda:1, npu:0, … By default the accelerator that torch sees.")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: the checkpoint's.")
    add(
        "--trust_remote_code",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="true: run the Python code that a hub model carries. Default false.",
    )
    args = parser.parse_args(argv)
    for wrong, message in (
        (args.file is not None and args.row is None, "--file needs --row, the number of the row to show"),
        (args.file is None and args.row is not None, "--row is a row of --file; leave it out with --text"),
        (args.file is not None and args.prefix is not None, "--prefix goes with --text; a row of --file has its own"),
        (args.text is not None and not args.text.strip(), "--text is empty, or white space alone"),
        (args.row is not None and args.row < 1, "--row must be 1 or more"),
        (args.topk < 1, "--topk must be 1 or more"),
        (not 0 < args.simi_threshold <= 1, "--simi_threshold must be above 0, and at most 1"),
        (args.block_size is not None and args.block_size < 2, "--block_size must be 2 or more"),
        (args.output.is_dir(), f"--output {args.output} is a folder; name a file in it"),
    ):
        if wrong:
            parser.error(message)
    args.prefix = args.prefix or ""
    try:
        default = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        args.device = torch.device(args.device or default)
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {args.device}: {error}")
    return args


if __name__ == "__main__":
    try:
        run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
