"""One HTML page on which a person sees how a teacher and a student meet on a text.

    python script_eval/show_alignment.py --teacher outputs/teacher --student outputs/student \\
        --mapper outputs/em.safetensors --file data/dolly_train.sample.json --row 7 --output page.html

The page shows both tokenisations of the response one above the other: once as dynamic time warping aligns them, once
exactly, by bytes. Groups that do not cover the same bytes on both sides are marked. Pointing at a group shows both
sides' most probable tokens in it, which pairs the mapper finds between them, and how much of the teacher's probability
these hold. The page needs nothing but itself, and no network.

Rows with messages, and with `--chat true` all rows, are chats: each side's prompt is in its own template, and the page
shows both.

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
from pathlib import Path

import numpy as np
import torch
from eval_records import add_loading_arguments, write_text
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from get_vocab_mapper.builders import build_em, exact_matches
from get_vocab_mapper.mapper import DEFAULT_THRESHOLD, VocabMapper
from get_vocab_mapper.mapper_file import load_mapper
from modeling.losses.alignment import entropy_weights
from modeling.losses.logits import entropy
from modeling.losses.mapping import contextual_kl, group_topk, match_pairs
from modeling.losses.rows import StudentRows
from modeling.models.language_model import LanguageModel
from modeling.models.output_head import logits_at
from modeling.text.alignment import Groups, byte_groups, dtw_groups, exact_groups
from modeling.text.batch import ResponseCollator, Side
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.ends import fold_ends, shared_ends
from modeling.text.messages import ChatRows
from modeling.text.rows import are_chat_rows, examples_of_row, read_rows

TEMPLATE = Path(__file__).with_name("alignment_page.html")
SIDES = ("teacher", "student")
OTHER = {"teacher": "student", "student": "teacher"}
COLUMNS = {"teacher": "teacher_", "student": ""}  # how the columns of each side begin in a prepared example
SHOWN = 10  # of each side's top tokens
Sides = dict[str, LanguageModel]  # by these names
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


# ------------------------------------------------------------------------------------------------ models and the text


def has_weights(name: str) -> bool:
    """Whether a folder holds a model, not only a tokenizer. A hub name is taken to."""
    folder = Path(name)
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in patterns)


def example_of(args: argparse.Namespace) -> tuple[dict, str]:
    """The row to show, and where it is from. Raises ValueError naming the file and the row."""
    chat = ChatRows(args.chat, system=args.system) if args.chat or (args.file and are_chat_rows(args.file)) else None
    if args.text is not None:
        (example,) = examples_of_row({"prefix": args.prefix, "text": args.text}, chat)
        return {"row": 1, **example}, "--text"
    for row in read_rows(args.file, chat):
        if row["row"] == args.row:
            return row, f"{args.file}, row {args.row}"
    raise ValueError(f"{args.file}: there is nothing in row {args.row}. Give --row the number of another.")


def side_of(name: str, args: argparse.Namespace, chats: bool) -> LanguageModel:
    file = getattr(args, f"{name}_chat_template")
    template = None if file is None else file.read_text(encoding="utf-8")
    kwargs = (args.template_kwargs or {}) if chats else None
    path = getattr(args, name)
    return LanguageModel(path, name, args.trust_remote_code, chat_template=template, template_kwargs=kwargs)


def encoders_of(sides: Sides) -> list[Encoder]:
    """Of the student and the teacher, as in training."""
    return shared_ends(sides["student"].encoder, sides["teacher"].encoder)


def prepare(row: dict, source: str, sides: Sides, block_size: int | None, with_models: bool) -> dict:
    """The columns of `prepare_example`. Raises ValueError where no response is left or a model reads no such length."""
    encoders = encoders_of(sides)
    example = prepare_example(row, encoders, sys.maxsize if block_size is None else block_size)
    if example["fault"]:
        fault = example["fault"] if row.get("fault") or block_size is not None else "no token is left of its text"
        raise ValueError(f"{source}: {fault}. Training leaves such a row out.")
    for name, side in sides.items():
        length, longest = len(example[f"{COLUMNS[name]}input_ids"]), side.longest_input if with_models else None
        if longest is not None and length > longest:
            raise ValueError(
                f"{source}: prompt and text have {length} {name} tokens, and {side.path} reads {longest} at most. "
                f"Give a shorter text, or --block_size {longest}, which cuts it as in training."
            )
    return example


# --------------------------------------------------------------------------------------------------------- the figures


@torch.no_grad()
def predicting_logits(side: LanguageModel, model: PreTrainedModel, tokens: Side) -> torch.Tensor:
    """[R, V] on the host: the logits that predict the response tokens, in the model's dtype."""
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = logits_at(model, tokens.predictor_rows, side.vocab_size, **inputs).cpu()
    if not logits.isfinite().all():
        raise ValueError(f"{side.path} gives logits that are not finite in {logits.dtype}. Try --dtype float32.")
    return logits


def page_data(
    sides: Sides, models: dict[str, PreTrainedModel], mapper: VocabMapper | None, example: dict, topk: int
) -> dict:
    """What the page shows of one prepared example, as JSON values; without a mapper no models are needed."""
    collate = ResponseCollator(*encoders_of(sides), alignment="entropy_dtw")
    batch = collate([example])
    (distances,) = batch.token_distances
    ends = tuple(getattr(batch, name).byte_ends[0] for name in SIDES)
    ids = {name: getattr(batch, name).labels for name in SIDES}
    used = {name: set(ids[name].tolist()) for name in SIDES}
    data = {
        name: {"name": sides[name].path, "ids": ids[name].tolist(), "ends": end.tolist()}
        for name, end in zip(SIDES, ends)
    }

    logits = {}
    weights = {name: np.ones(len(ids[name]), dtype=np.int64) for name in SIDES}
    if mapper is not None:
        for name in SIDES:
            side = getattr(batch, name)
            z = predicting_logits(sides[name], models[name], side)
            ce = StudentRows(z, side.input_ids.flatten()[side.predictor_rows + 1]).ce  # of the tokens themselves
            logits[name] = fold_ends(z.clone(), side.stop_ids)
            h = entropy(logits[name])
            weights[name] = entropy_weights(h, side.example, 1).numpy()
            data[name] |= {
                "entropy": rounded(h),
                "weight": weights[name].tolist(),
                "probability": rounded((-ce).exp()),
                "bits_per_byte": rounded(ce.sum() / math.log(2) / batch.n_bytes[0]),
            }

    aligned = {
        "dtw": dtw_groups(distances.table, distances.teacher_index, distances.student_index, *weights.values()),
        "byte": byte_groups(*ends),
    }
    for name, pair in aligned.items():
        groups, n_tokens = Groups.of([ends], [pair], same_start=batch.same_start), len(pair[1])
        data[name] = {
            "teacher_size": groups.teacher.host_size.tolist(),
            "student_size": groups.student.host_size.tolist(),
            "same_bytes": exact_groups(*ends, *pair, *batch.same_start).tolist(),
            "one_to_one": rounded(groups.one_to_one / n_tokens),
            "aligned": rounded(groups.aligned / n_tokens),
        }
        if mapper is not None:
            rows = StudentRows(logits["student"], ids["student"])
            forms = [sides[side].encoder.forms for side in SIDES]
            data[name] |= mapping(rows, logits, groups, mapper, forms, topk, used)
    data["tokens"] = {
        name: {token: visible_token(sides[name].encoder, token) for token in sorted(used[name])} for name in SIDES
    }
    data["n_bytes"] = int(batch.n_bytes[0])
    return data


def mapping(
    rows: StudentRows,
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
    directions = {"teacher": mapper.to_student, "student": mapper.to_teacher}
    exact = dict(zip(SIDES, exact_matches(*forms)))
    k = min(topk, *(z.shape[1] for z in logits.values()))
    top = {name: group_topk(logits[name], getattr(groups, name), k, with_logsumexp=True) for name in SIDES}

    shown = {}
    for name in SIDES:
        own, other = top[name].ids.numpy(), top[OTHER[name]].ids.numpy()
        matches = match_pairs(own, other, directions[name], logits[OTHER[name]].shape[1])
        kinds = np.select(
            [matches < 0, directions[name].static[own] < 0, matches == exact[name][own]],
            ["none", "similar", "exact"],
            default="static",
        )
        probabilities = (top[name].values - top[name].logsumexp[:, None]).exp()
        columns = (own, np.array(rounded(probabilities)), matches, kinds)
        shown[name] = [list(zip(*(part[:SHOWN].tolist() for part in group))) for group in zip(*columns)]
        used[name].update(own[:, :SHOWN].flatten().tolist())
        used[OTHER[name]].update(u for u in matches[:, :SHOWN].flatten().tolist() if u >= 0)

    cdm = contextual_kl(rows, logits["teacher"], groups, mapper, topk)
    return {
        "top": shown,
        "group_mapped_rate": rounded(cdm.mapped_rate),
        "group_teacher_mass": rounded(cdm.teacher_mass),
        "group_kd": rounded(cdm.kd),
        "mapped_rate": rounded(cdm.mapped_rate.mean()),
        "teacher_mass": rounded(cdm.teacher_mass.mean()),
        "kd_loss": rounded((cdm.kd * groups.student.size).sum() / len(rows)),
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
        "parts": visible(form) if form else [[f"id {token}", ""]],  # an id without text
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


def notes(prompts: dict[str, str], example: dict, sides: Sides, why_no_models: str | None) -> list[str]:
    """What a reader must know to read the figures right."""
    lines = []
    if why_no_models:
        lines.append(f"Tokenizers only ({why_no_models}): equal weights in dynamic time warping, and no predictions.")
    if example["cut"]:
        lines.append("The text is cut to --block_size tokens, and so has no end-of-sequence token.")
    for name, side in sides.items():
        first = int(example[f"{COLUMNS[name]}input_ids"][-len(example[f"{COLUMNS[name]}byte_ends"])])
        if not prompts[name] and example[f"{COLUMNS[name]}byte_ends"][0] > len(side.encoder.forms.forms[first]):
            lines.append(f"The {name}'s first token is left out: there is nothing before it that could predict it.")
    return lines


def page(data: dict) -> str:
    """The whole HTML page. No text of the data can end the script element that holds it."""
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
    sides = {name: side_of(name, args, chats="messages" in row) for name in SIDES}
    example = prepare(row, source, sides, args.block_size, with_models=not why_no_models)
    forms = [side.encoder.forms for side in sides.values()]
    mapper, models, description = None, {}, {}
    if not why_no_models:
        if args.mapper:
            mapper, origin = load_mapper(args.mapper, *forms, args.simi_threshold), args.mapper
        else:
            mapper, origin = build_em(*forms, args.simi_threshold), "built for this page"
        student, teacher = encoders_of(sides)
        mapper = mapper.with_ends(teacher.stop_ids, student.stop_ids)
        k = min(args.topk, *map(len, forms))
        description = {"mapper": f"{origin} ({mapper.kind}, θ = {mapper.threshold})", "topk": k}
        models = {name: side.load(args.dtype).to(args.device).eval() for name, side in sides.items()}

    data = page_data(sides, models, mapper, example, args.topk) | description
    prompts = {name: side.encoder.prefix(row) for name, side in sides.items()}
    data |= {"source": source, "prompts": prompts, "notes": notes(prompts, example, sides, why_no_models)}
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
    yes_or_no = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--chat", **yes_or_no, help="Read rows without messages as chats, too, as in training.")
    add("--system", help="The system message of a chat without one, as in training.")
    add("--template_kwargs", type=json.loads, help="What chat templates are given besides, a JSON object.")
    for name in SIDES:
        add(f"--{name}_chat_template", type=Path, help=f"A file with the {name}'s chat template, as in training.")
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
    add_loading_arguments(parser)
    args = parser.parse_args(argv)
    for wrong, message in (
        ((args.file is None) != (args.row is None), "--file and --row, the number of the row to show, go together"),
        (args.file is not None and args.prefix is not None, "--prefix goes with --text; a row of --file has its own"),
        (args.text is not None and not args.text.strip(), "--text is empty, or white space alone"),
        (args.topk < 1, "--topk must be 1 or more"),
        (not 0 < args.simi_threshold <= 1, "--simi_threshold must be above 0, and at most 1"),
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
