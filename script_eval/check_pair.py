"""What can be known of a pair of models before any training: whether the two can meet, and what would go wrong.

    python script_eval/check_pair.py --teacher TEACHER --student STUDENT --file rows.json
    python script_eval/check_pair.py --teacher TEACHER --student STUDENT --file chats.json --with_models

With tokenizers and configurations alone it takes less than a minute on a CPU. --with_models loads both models: how well
each predicts the responses (a teacher that is worse cannot teach), and how much of the teacher's probability lies on
tokens that both sides have.

It ends with findings: `ok`, `note` (worth knowing), or `problem` (training would fail, or teach something else), each
with what to do, and with the methods that fit, the likeliest first. The exit status is 1 where there is a problem, and
2 where the files cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from eval_records import text_table, write_json
from show_alignment import encoders_of, predicting_logits, side_of
from transformers import AutoModelForCausalLM

from get_vocab_mapper.builders import Matches, exact_matches
from modeling.errors import InputError, one_message, user_input
from modeling.losses.rows import StudentRows
from modeling.models.language_model import LanguageModel
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.ends import fold_ends
from modeling.text.messages import ChatRows
from modeling.text.pair import PairFigures
from modeling.text.rows import are_chat_rows, read_rows
from modeling.training.datasets import list_faults

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "script_train"))
from methods import methods

SIDES = {"student": "", "teacher": "teacher_"}  # and the columns of an example
PROBES = {"a number": "12345", "four spaces": "a    b", "two line ends": "a\n\nb", "a tab": "a\tb", "a word": " house"}
DTW_ROWS = 50
FEW = 0.5  # below: little of the data is taught by what needs exact positions


@dataclass
class Findings:
    """What was found, in the order of finding."""

    found: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, what: str) -> None:
        self.found.append({"kind": kind, "what": what})

    def ok(self, what: str) -> None:
        self.add("ok", what)

    def note(self, what: str) -> None:
        self.add("note", what)

    def problem(self, what: str) -> None:
        self.add("problem", what)

    @property
    def problems(self) -> int:
        return sum(finding["kind"] == "problem" for finding in self.found)


# --------------------------------------------------------------------------------------------------------- the models


def parameters(side: LanguageModel) -> int:
    """Of a model of this configuration, without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(side.config, trust_remote_code=side.trust_remote_code).num_parameters()


def describe_sides(sides: dict[str, LanguageModel], encoders: dict[str, Encoder], findings: Findings) -> dict:
    """A figure or a text a side: sizes, contexts, what stands in front, what ends a response."""
    described = {}
    for name, side in sides.items():
        encoder, tokens = encoders[name], len(encoders[name].forms)
        try:
            columns, context, n_parameters = (
                side.config.get_text_config().vocab_size,
                side.longest_input,
                parameters(side),
            )
        except InputError as error:
            columns = context = n_parameters = None
            findings.note(f"Sizes and memory are left out: {error}")
        if columns is None:
            pass
        elif tokens > columns and name == "teacher":
            findings.problem(
                f"The teacher's tokenizer has {tokens:,} tokens, and its model {columns:,} columns: what it says of "
                "the last ones is not trained. Name the tokenizer that belongs to it."
            )
        elif tokens > columns:
            findings.note(f"The student's model will be resized from {columns:,} to {tokens:,} tokens.")
        described[name] = {
            "model": side.path,
            "parameters": n_parameters,
            "tokens": tokens,
            "columns": columns,
            "context": context,
            "in front": encoder.tokenizer.decode(encoder.encode("", "a").input_ids[:-2]) or "nothing",
            "ends": {
                encoder.tokenizer.convert_ids_to_tokens(token): places for token, places in side.stop_tokens.items()
            },
            "ends a response with": encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id),
            "chat template": side.chat is not None,
        }
    return described


def check_ends(described: dict, is_chat: bool, findings: Findings) -> None:
    ends = {name: of_side["ends a response with"] for name, of_side in described.items()}
    findings.ok(
        f"The end of a response is one event: {ends['teacher']} of the teacher and {ends['student']} of the student."
    )
    for name, of_side in described.items():
        others = [token for token in of_side["ends"] if token != ends[name]]
        if others and is_chat:
            findings.ok(f"The {name} also stops at {', '.join(others)}: the probability of ending is their sum.")
        elif others:
            findings.note(
                f"The {name} ends with {ends[name]} here, and its own settings also stop at {', '.join(others)}. If it "
                "is a chat model, give rows with messages, or --chat true: then it is asked as it was taught."
            )


def check_splitting(encoders: dict[str, Encoder], findings: Findings) -> dict[str, dict[str, int]]:
    """Into how many tokens each side splits some texts."""
    counts = {
        what: {name: len(encoder.encode("(", text, eos=False).byte_ends) for name, encoder in encoders.items()}
        for what, text in PROBES.items()
    }
    number = counts["a number"]
    if number["student"] != number["teacher"]:
        findings.note(
            f"Numbers split differently (12345: {number['teacher']} teacher and {number['student']} student tokens). "
            "On data with many digits, dynamic time warping errs there: take --alignment byte for CDM."
        )
    return counts


# ----------------------------------------------------------------------------------------------------------- the rows


def prepared_rows(
    file: str, rows: list[dict], encoders: dict[str, Encoder], block_size: int, findings: Findings
) -> list[dict]:
    """The examples that training would use; what it would leave out or cut is found."""
    examples = [prepare_example(row, list(encoders.values()), block_size) for row in rows]
    usable = [example for example in examples if not example["fault"]]
    left_out = [(example["row"], example["fault"]) for example in examples if example["fault"]]
    if not usable:
        findings.problem(f"{file}: none of {len(rows)} rows can be used. {list_faults(left_out)}")
    elif left_out:
        add = findings.problem if len(left_out) > len(rows) / 10 else findings.note
        add(f"{len(left_out)} of {len(rows)} rows would be left out: {list_faults(left_out)}")
    else:
        findings.ok(f"All {len(rows)} rows can be used.")
    cut = sum(bool(example["cut"]) for example in usable)
    if cut:
        add = findings.problem if cut > len(usable) / 2 else findings.note
        add(f"{cut} of {len(usable)} rows are cut at --block_size {block_size}: their ends are not taught. Raise it.")
    return usable


def longest_rows(described: dict, examples: list[dict], block_size: int, findings: Findings) -> dict[str, int]:
    """Tokens of the longest row on each side."""
    for name, of_side in described.items():
        if of_side["context"] is not None and block_size > of_side["context"]:
            findings.problem(
                f"--block_size {block_size}: the {name} reads {of_side['context']:,} tokens at most. Give no more."
            )
    return {name: max(len(example[f"{column}input_ids"]) for example in examples) for name, column in SIDES.items()}


def check_alignment(
    encoders: dict[str, Encoder], matches: Matches, examples: list[dict], findings: Findings
) -> tuple[PairFigures, float]:
    """The pair's figures, and the share of student tokens that dynamic time warping aligns exactly."""
    figures = PairFigures.of(*encoders.values(), matches, examples)
    batch = ResponseCollator(*encoders.values(), "dtw")(examples[:DTW_ROWS])
    aligned = batch.groups.aligned / len(batch.student.labels)
    alone = figures.one_to_one[0]
    what = f"{alone:.0%} of the student's tokens correspond to one teacher's token"
    if alone < FEW:
        findings.note(
            f"{what}: MinED and Strict would teach little. CDM, BPM and ALM use groups of several tokens too."
        )
    else:
        findings.ok(f"{what}.")
    if aligned < 0.9:
        findings.note(f"Dynamic time warping aligns {aligned:.0%} exactly: --alignment byte aligns all.")
    return figures, aligned


# ----------------------------------------------------------------------------------------------------- with the models


@torch.no_grad()
def measure_models(
    sides: dict[str, LanguageModel],
    encoders: dict[str, Encoder],
    matches: Matches,
    examples: list[dict],
    dtype: str,
    findings: Findings,
) -> dict[str, dict[str, float]]:
    """Bits a byte of the responses on each side, and the probability of the tokens that both sides have."""
    shared = {"student": matches.to_teacher >= 0, "teacher": matches.to_student >= 0}
    collate, measured = ResponseCollator(*encoders.values()), {}
    for name, side in sides.items():
        model, columns = side.load(dtype).eval(), torch.from_numpy(shared[name])
        nats = mass = tokens = n_bytes = 0.0
        for example in examples:
            batch = collate([example])
            tokens_of = getattr(batch, name)
            logits = fold_ends(predicting_logits(side, model, tokens_of).float(), tokens_of.stop_ids)
            nats += StudentRows(logits, tokens_of.labels).ce.sum().item()
            mass += logits.softmax(-1)[:, columns].sum().item()
            tokens += len(tokens_of.labels)
            n_bytes += sum(batch.n_bytes)
        measured[name] = {"bits per byte": nats / math.log(2) / n_bytes, "shared mass": mass / tokens}
        del model
    bits = {name: of_side["bits per byte"] for name, of_side in measured.items()}
    if bits["teacher"] >= bits["student"]:
        findings.problem(
            f"The teacher predicts these responses worse than the student ({bits['teacher']:.3f} and "
            f"{bits['student']:.3f} bits per byte): it cannot teach them. Fine-tune it first (run_clm_sft.py), or "
            "check that its prompts are as it knows them."
        )
    else:
        findings.ok(
            f"The teacher predicts the responses better: {bits['teacher']:.3f} to {bits['student']:.3f} bits per byte."
        )
    return measured


def memory_of(described: dict, longest: dict, batch_size: int) -> dict[str, float] | None:
    """GB that the default script takes on a device: float32 student with AdamW, bfloat16 teacher, whole logits."""
    student, teacher = described["student"], described["teacher"]
    if student["columns"] is None or teacher["columns"] is None:
        return None
    rows = {name: batch_size * length for name, length in longest.items()}
    logits = 2 * (2 * rows["student"] * student["columns"] + rows["teacher"] * teacher["columns"])  # and the gradient
    gb = {"student": 16 * student["parameters"], "teacher": 2 * teacher["parameters"], "logits": logits}
    return {name: value / 1e9 for name, value in gb.items()}


def fitting(encoders: dict[str, Encoder], figures: PairFigures | None) -> list[str]:
    """Names of the methods that take the pair, the likeliest first."""
    same = encoders["student"].forms.forms == encoders["teacher"].forms.forms
    names = [method.name for method in methods() if method.pair == "any" or (same and method.pair == "same")]
    by_position = {"MinED", "Strict"} if figures is not None and figures.one_to_one[0] < FEW else set()
    first = ["FKD", "RKD"] if same else ["CDM", "ALM", "BPM"]

    def place(name: str) -> tuple[bool, int]:
        return name in by_position or name == "ULD", first.index(name) if name in first else len(first)

    return sorted(names, key=place)


# ---------------------------------------------------------------------------------------------------------- the report


def report(result: dict) -> str:
    sides = result["sides"]
    rows = [["", "student", "teacher"]]
    for what in ("model", "parameters", "tokens", "columns", "context", "in front", "ends a response with"):
        values = [sides[name][what] for name in SIDES]
        rows.append([what, *(f"{v:,}" if isinstance(v, int) else "unknown" if v is None else v for v in values)])
    rows += [[f"tokens of {what}", *(str(n[name]) for name in SIDES)] for what, n in result["splitting"].items()]
    if "longest" in result:
        rows.append(["longest row", *(f"{result['longest'][name]:,}" for name in SIDES)])
    for what, of_side in (("bits per byte", ".3f"), ("shared mass", ".1%")):
        if "models" in result:
            rows.append([what, *(format(result["models"][name][what], of_side) for name in SIDES)])
    lines = [text_table(rows)]
    for name, tokens in ((name, sides[name]["ends"]) for name in SIDES):
        lines.append(f"The {name} stops at " + "; ".join(f"{t} ({', '.join(p)})" for t, p in tokens.items()) + ".")
    if "summary" in result:
        lines += ["", f"The responses of {result['rows']} rows: {result['summary']}.", result["group_sizes"]]
        lines.append(f"Exactly aligned by dynamic time warping: {result['aligned']:.1%}; by bytes: 100 %.")
        if memory := result["memory"]:
            parts = ", ".join(f"{name} {gb:.1f}" for name, gb in memory.items())
            lines.append(f"Memory of the default script, without activations: {sum(memory.values()):.1f} GB ({parts}).")
        for name in SIDES:
            lines += ["", f"The first prompt, as the {name} sees it:", *result["prompts"][name].splitlines()]
    lines += ["", *(f"{finding['kind']:8} {finding['what']}" for finding in result["findings"])]
    return "\n".join([*lines, "", f"Methods that fit, the likeliest first: {', '.join(result['methods'])}."])


def check(args: argparse.Namespace) -> tuple[dict, int]:
    """All figures and findings, and the number of problems."""
    findings, chat = Findings(), None
    if args.chat or are_chat_rows(args.file):
        chat = ChatRows(args.chat, args.train_on, args.system)
    sides = {name: side_of(name, args, chats=chat is not None) for name in SIDES}
    encoders = dict(zip(SIDES, encoders_of(sides)))
    described = describe_sides(sides, encoders, findings)
    check_ends(described, chat is not None, findings)
    result = {"sides": described, "splitting": check_splitting(encoders, findings), "rows": 0}
    rows = list(islice(read_rows(args.file, chat), args.rows))
    examples = prepared_rows(args.file, rows, encoders, args.block_size, findings)
    figures = None
    if examples:
        first = next(row for row in rows if row["row"] == examples[0]["row"])
        matches = exact_matches(encoders["teacher"].forms, encoders["student"].forms)
        figures, aligned = check_alignment(encoders, matches, examples, findings)
        longest = longest_rows(described, examples, args.block_size, findings)
        groups = ", ".join(f"{t}–{s} {n:,}" for (t, s), n in figures.groups.most_common(6))
        result |= {
            "rows": len(examples),
            "figures": {**asdict(figures), "groups": {f"{t}-{s}": n for (t, s), n in figures.groups.items()}},
            "summary": str(figures),
            "group_sizes": f"Groups of so many teacher–student tokens: {groups}.",
            "aligned": aligned,
            "longest": longest,
            "memory": memory_of(described, longest, args.batch_size),
            "prompts": {name: encoder.prefix(first) for name, encoder in encoders.items()},
        }
        if args.with_models:
            few = examples[: args.model_rows]
            result["models"] = measure_models(sides, encoders, matches, few, args.dtype, findings)
    result |= {"findings": findings.found, "methods": fitting(encoders, figures)}
    return result, findings.problems


@one_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="Folder or hub name.")
    add("--student", required=True, help="Folder or hub name.")
    add("--file", default=str(Path(__file__).parents[1] / "data/dolly_train.sample.json"), help="Rows to train on.")
    add("--rows", type=int, default=200, help="The first so many rows. Default 200.")
    add("--block_size", type=int, default=512, help="As in training. Default 512.")
    add("--batch_size", type=int, default=8, help="Examples a device, for the memory. Default 8.")
    add("--chat", action="store_true", help="Ask with both chat templates whatever the rows are.")
    add("--train_on", default="last", choices=("last", "all"), help="As in training.")
    add("--system", help="As in training.")
    add("--template_kwargs", type=json.loads, help="As in training, a JSON object.")
    for name in SIDES:
        add(f"--{name}_chat_template", type=Path, metavar="FILE", help="As in training.")
    add("--with_models", action="store_true", help="Load both models, and measure them on the first rows.")
    add("--model_rows", type=int, default=16, help="With --with_models: so many rows. Default 16.")
    add("--dtype", default="auto", help="With --with_models, of the weights.")
    add("--trust_remote_code", action="store_true", help="Run the Python code that a hub model carries.")
    add("--json", type=Path, help="Write all figures and findings there as well.")
    args = parser.parse_args()
    with user_input():
        result, problems = check(args)
    print(report(result))
    if args.json is not None:
        write_json(args.json, result)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
