"""Scores responses against references: ROUGE-L and exact match, both as percentages.

    python script_eval/score_rouge.py --data data/dolly/valid.jsonl --generations dolly_10.jsonl

ROUGE-L is the F-measure of `rouge_score` with its stemmer; exact match compares after lower-casing and removing
punctuation and surplus white space. Of several references the best counts. The mean is over the rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from eval_records import read_lines, write_json
from rouge_score.rouge_scorer import RougeScorer

PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def references_of(output: str | list[str]) -> list[str]:
    """The column `output` of an evaluation file: a string, or a list of references."""
    references = [output] if isinstance(output, str) else output
    if not references:
        raise ValueError("a row without any reference")
    return references


def rouge_l(response: str, output: str | list[str]) -> float:
    """The best ROUGE-L F-measure over the references, × 100."""
    return 100 * max(_scorer().score(reference, response)["rougeL"].fmeasure for reference in references_of(output))


def normalised(text: str) -> str:
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(response: str, output: str | list[str]) -> float:
    """100 where the response equals a reference, but for case, punctuation and white space; else 0."""
    return 100.0 * (normalised(response) in map(normalised, references_of(output)))


def score(responses: Sequence[str], outputs: Sequence[str | list[str]]) -> dict:
    """The means over the rows, and how many rows there are. A response is stripped before it is compared."""
    if len(responses) != len(outputs) or not outputs:
        raise ValueError(f"{len(responses)} responses to {len(outputs)} rows")
    responses = [response.strip() for response in responses]
    metrics = {"rouge_l": rouge_l, "exact_match": exact_match}
    return {
        **{name: sum(map(metric, responses, outputs)) / len(outputs) for name, metric in metrics.items()},
        "count": len(outputs),
    }


def score_files(generations: Path, data: Path, limit: int | None = None) -> dict:
    """`score`, and figures about the responses. Raises ValueError where one is missing."""
    rows = read_lines(data, limit)
    responses = {row["row"]: row for row in read_lines(generations)}
    missing = [i for i in range(len(rows)) if i not in responses]
    if missing:
        raise ValueError(f"{generations}: {len(missing)} of {len(rows)} rows are missing, the first is {missing[0]}.")
    responses = [responses[i] for i in range(len(rows))]
    return {
        **score([r["response"] for r in responses], [row["output"] for row in rows]),
        "tokens": sum(r["tokens"] for r in responses) / len(rows),  # mean length
        "unfinished": sum(not r["ended"] for r in responses),  # responses without EOS
        "cut_prompts": sum(r["cut"] for r in responses),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with output: a string, or a list of them.")
    parser.add_argument("--generations", type=Path, required=True, help="What generate.py made of its prompts.")
    parser.add_argument("--limit", type=int, help="Only the first so many rows.")
    parser.add_argument("--output", type=Path, help="JSON file for the scores. By default they are printed.")
    args = parser.parse_args()
    try:
        scores = score_files(args.generations, args.data, args.limit)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.output:
        write_json(args.output, scores)
    else:
        print(json.dumps(scores, indent=2))
