"""How well dynamic time warping aligns real responses, measured against the exact alignment by bytes.

    CDM_REAL_DIR=... python tests/benchmarks/alignment_quality.py [--pairs phi-3:qwen2 ...] [--rows 1000] [--json FILE]

For pairs of real tokenizers, on Dolly, GSM8K and MBPP responses: `aligned`, the share of student tokens whose group
covers exactly the same bytes on both sides, and `one_to_one`, for `--alignment byte` and for `dtw` with three kinds of
entropy weights: equal ones, random ones (what an untrained model gives), and a stand-in for a trained model, which is
less certain where a word begins. Then where dtw errs: the commonest groups that do not cover the same bytes.

First of all `strict coverage`, the share of each side's tokens that are alone with one token of the other side for the
same bytes (end of sequence left out), and the shared vocabulary: pairs of tokens that are each other's exact match,
special ones left out. Where a published pair has these tokenizers, its figures stand beside them.
"""

import argparse
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from get_vocab_mapper.builders import exact_matches
from modeling.text.alignment import aligned_tokens, byte_groups, dtw_groups, one_to_one_tokens
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.rows import alpaca_prompt

PAIRS = ("phi-3:qwen2", "llama-3:gemma-2", "llama-3:opt", "qwen2:opt", "qwen2:llama-3")
DATA = {"dolly": "dolly/databricks-dolly-15k.jsonl", "gsm8k": "gsm8k/train.jsonl", "mbpp": "mbpp/mbpp.jsonl"}
PUBLISHED = {
    "qwen2:llama-3": "Qwen2.5 to Llama-3.2, which have these tokenizers, on sampled mathematics and code: "
    "student 0.9356, teacher 0.8591 (arXiv 2610.08448)"
}


def rows(folder: Path, name: str, count: int) -> list[dict]:
    with (folder / "data" / DATA[name]).open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, count)]
    if name == "dolly":
        examples = [(alpaca_prompt(row["instruction"], row["context"]), row["response"]) for row in lines]
    else:
        prompt, response = {"gsm8k": ("question", "answer"), "mbpp": ("text", "code")}[name]
        examples = [(alpaca_prompt(row[prompt]), row[response]) for row in lines]
    return [{"row": i, "prefix": prefix, "text": text} for i, (prefix, text) in enumerate(examples, 1)]


def weights(kind: str, encoder: Encoder, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if kind == "random":
        return random.integers(3, 6, len(ids))
    if kind == "word starts":
        return np.array([5 if encoder.forms.forms[i][:1] == b" " else 3 for i in ids])
    return np.ones(len(ids), dtype=np.int64)


def shared_vocabulary(teacher: Encoder, student: Encoder) -> int:
    """Pairs of tokens that are each other's exact match, special ones left out."""
    to_student, to_teacher = exact_matches(teacher.forms, student.forms)
    matched = np.flatnonzero((to_student >= 0) & ~teacher.forms.is_special)
    return int((to_teacher[to_student[matched]] == matched).sum())


def strict_coverage(teacher: Encoder, student: Encoder, examples: list[dict]) -> tuple[float, float]:
    """The shares of student and of teacher tokens in byte groups of exactly one token a side, EOS left out."""
    covered, totals = 0, np.zeros(2)
    for example in examples:
        sides = prepare_example(example, [student, teacher], 1024)
        ends = [np.asarray(sides[f"{side}byte_ends"]) for side in ("", "teacher_")]
        if sides["fault"]:
            continue
        has_eos = sides["input_ids"][-1] == student.eos_id
        groups, same = byte_groups(ends[1], ends[0]), sides["byte_start"] == sides["teacher_byte_start"]
        alone = one_to_one_tokens(*groups) & aligned_tokens(ends[1], ends[0], *groups, same)
        covered += int(alone[: len(alone) - has_eos].sum())
        totals += [len(side) - has_eos for side in ends]
    return tuple(covered / totals)


def measure(teacher: Encoder, student: Encoder, examples: list[dict], errors: Counter) -> dict[str, dict[str, float]]:
    collate, random = ResponseCollator(student, teacher, "entropy_dtw"), np.random.default_rng(0)
    totals: dict[str, np.ndarray] = {}
    for example in tqdm(examples, leave=False):
        batch = collate([prepare_example(example, [student, teacher], 1024)])
        if not batch.rows:
            continue
        (d,), ends = batch.token_distances, (*batch.teacher.byte_ends, *batch.student.byte_ends)
        sides = (teacher, batch.teacher.labels.numpy()), (student, batch.student.labels.numpy())
        ways = {"byte": byte_groups(*ends)}
        for kind in ("equal", "random", "word starts"):
            w = [weights(kind, *side, random) for side in sides]
            ways[f"dtw, {kind} weights"] = dtw_groups(d.table, d.teacher_index, d.student_index, *w)
        for way, groups in ways.items():
            flags = aligned_tokens(*ends, *groups, *batch.same_start)
            totals[way] = totals.get(way, 0) + np.array([flags.sum(), one_to_one_tokens(*groups).sum(), len(flags)])
        groups = ways["dtw, equal weights"]
        flags = aligned_tokens(*ends, *groups, *batch.same_start)
        for g in np.unique(groups[1][~flags]):
            tokens = ((side.forms.texts, ids[group == g]) for (side, ids), group in zip(sides, groups))
            errors[tuple(" | ".join(repr(texts[i])[1:-1] for i in ids) for texts, ids in tokens)] += 1
    return {way: {"aligned": t[0] / t[2], "one_to_one": t[1] / t[2]} for way, t in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="TEACHER:STUDENT, of CDM_REAL_DIR/tokenizers")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--strict_only", action="store_true", help="leave dynamic time warping out")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each data set (default: 1000)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    if "CDM_REAL_DIR" not in os.environ:
        parser.error("set CDM_REAL_DIR to the folder with the real tokenizers and data")
    folder = Path(os.environ["CDM_REAL_DIR"])

    results = {}
    for pair in arguments.pairs:
        name = pair.replace(":", " -> ")
        names = pair.split(":")
        teacher, student = (Encoder(AutoTokenizer.from_pretrained(folder / "tokenizers" / side)) for side in names)
        shared = shared_vocabulary(teacher, student)
        print(f"\n{name}: shared vocabulary {shared}, of {len(student.forms)} student and {len(teacher.forms)} teacher")
        if pair in PUBLISHED:
            print(f"  published for {PUBLISHED[pair]}")
        for data in arguments.data:
            errors: Counter = Counter()
            examples = rows(folder, data, arguments.rows)
            coverage = strict_coverage(teacher, student, examples)
            figures = {} if arguments.strict_only else measure(teacher, student, examples, errors)
            results[f"{name}, {data}"] = {**figures, "strict coverage": coverage, "shared vocabulary": shared}
            print(f"\n{name}, {data}")
            print(f"  strict coverage              student {coverage[0]:.4f}   teacher {coverage[1]:.4f}")
            if arguments.strict_only:
                continue
            for way, shares in figures.items():
                print(f"  {way:28} aligned {shares['aligned']:.4f}   one_to_one {shares['one_to_one']:.4f}")
            print("  dtw (equal weights) errs most often at:")
            for (teacher_tokens, student_tokens), count in errors.most_common(6):
                print(f"    {count:5} x  {teacher_tokens}   <->   {student_tokens}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
