"""How well dynamic time warping aligns real responses, measured against the exact alignment by bytes.

    CDM_REAL_DIR=... python tests/benchmarks/alignment_quality.py [--rows 1000] [--json FILE]

For pairs of real tokenizers, on Dolly and GSM8K responses: `aligned`, the share of student tokens whose group covers
exactly the same bytes on both sides, and `one_to_one`, for `--alignment byte` and for `dtw` with three kinds of entropy
weights: equal ones, random ones (what an untrained model gives), and a stand-in for a trained model, which is less
certain where a word begins. Then where dtw errs: the commonest groups that do not cover the same bytes.
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

from modeling.text.alignment import aligned_tokens, byte_groups, dtw_groups, one_to_one_tokens
from modeling.text.batch import ResponseCollator
from modeling.text.encoder import Encoder, prepare_example
from modeling.text.rows import alpaca_prompt

PAIRS = (("phi-3", "qwen2"), ("llama-3", "gemma-2"), ("llama-3", "opt"), ("qwen2", "opt"))


def rows(folder: Path, name: str, count: int) -> list[dict]:
    path = {"dolly": "dolly/databricks-dolly-15k.jsonl", "gsm8k": "gsm8k/train.jsonl"}[name]
    with (folder / "data" / path).open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, count)]
    if name == "dolly":
        examples = [(alpaca_prompt(row["instruction"], row["context"]), row["response"]) for row in lines]
    else:
        examples = [(alpaca_prompt(row["question"]), row["answer"]) for row in lines]
    return [{"row": i, "prefix": prefix, "text": text} for i, (prefix, text) in enumerate(examples, 1)]


def weights(kind: str, encoder: Encoder, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if kind == "random":
        return random.integers(3, 6, len(ids))
    if kind == "word starts":
        return np.array([5 if encoder.forms.forms[i][:1] == b" " else 3 for i in ids])
    return np.ones(len(ids), dtype=np.int64)


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
            flags = aligned_tokens(*ends, *groups)
            totals[way] = totals.get(way, 0) + np.array([flags.sum(), one_to_one_tokens(*groups).sum(), len(flags)])
        flags, groups = aligned_tokens(*ends, *ways["dtw, equal weights"]), ways["dtw, equal weights"]
        for g in np.unique(groups[1][~flags]):
            tokens = ((side.forms.texts, ids[group == g]) for (side, ids), group in zip(sides, groups))
            errors[tuple(" | ".join(repr(texts[i])[1:-1] for i in ids) for texts, ids in tokens)] += 1
    return {way: {"aligned": t[0] / t[2], "one_to_one": t[1] / t[2]} for way, t in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="rows of each data set (default: 1000)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    if "CDM_REAL_DIR" not in os.environ:
        parser.error("set CDM_REAL_DIR to the folder with the real tokenizers and data")
    folder = Path(os.environ["CDM_REAL_DIR"])

    results = {}
    for pair in PAIRS:
        teacher, student = (Encoder(AutoTokenizer.from_pretrained(folder / "tokenizers" / name)) for name in pair)
        for data in ("dolly", "gsm8k"):
            errors: Counter = Counter()
            figures = measure(teacher, student, rows(folder, data, arguments.rows), errors)
            results[f"{pair[0]} -> {pair[1]}, {data}"] = figures
            print(f"\n{pair[0]} -> {pair[1]}, {data}")
            for way, shares in figures.items():
                print(f"  {way:28} aligned {shares['aligned']:.4f}   one_to_one {shares['one_to_one']:.4f}")
            print("  dtw (equal weights) errs most often at:")
            for (teacher_tokens, student_tokens), count in errors.most_common(6):
                print(f"    {count:5} x  {teacher_tokens}   <->   {student_tokens}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
