"""Scores responses against references: ROUGE-L and exact match, both as percentages.

    python script_eval/score_rouge.py --data data/dolly/valid.jsonl --generations dolly_10.jsonl

ROUGE-L is the F-measure of `rouge_score` with its stemmer; exact match compares after lower-casing and removing
punctuation and surplus white space. Of several references the best counts. The mean is over the rows.

`rouge_score` reads the letters a to z and the digits alone. A row with a reference that is none of these for the most
part has no ROUGE-L, and does not count in its mean; --rouge_tokenizer unicode reads every script.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import regex
from eval_records import read_lines, write_json
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

PUNCTUATION = str.maketrans("", "", string.punctuation)


class UnicodeTokenizer(Tokenizer):
    """Words are runs of letters and digits of any script, compared without case. There is no stemmer.

    Scripts that write no spaces between words (Han and kana; Thai, Lao, Khmer, Burmese and their kin) give one token a
    character, with the marks on it.
    """

    # SA is Unicode's class of South East Asian scripts without spaces (UAX #14).
    SPACELESS = r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Line_Break=SA}]&&[\p{L}\p{N}]]"
    TOKEN = regex.compile(rf"{SPACELESS}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{SPACELESS}]+", regex.VERSION1)

    def tokenize(self, text: str) -> list[str]:
        return self.TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


SCORERS = {  # by the name of their tokenizer
    "rouge_score": RougeScorer(["rougeL"], use_stemmer=True),
    "unicode": RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer()),
}


def references_of(output: str | list[str]) -> list[str]:
    """The column `output` of an evaluation file: a string, or a list of references."""
    references = [output] if isinstance(output, str) else output
    if not references:
        raise ValueError("a row without any reference")
    return references


def is_read(reference: str, tokenizer: str) -> bool:
    """Whether the tokenizer leaves something of a reference, and at least half of its letters and digits."""
    letters = [c for c in reference if c.isalnum()]
    read = letters if tokenizer == "unicode" else [c for c in letters if c.isascii()]
    return 0 < len(letters) <= 2 * len(read)


def rouge_l(response: str, output: str | list[str], tokenizer: str = "rouge_score") -> float | None:
    """The best ROUGE-L F-measure over the references, × 100. None where the tokenizer does not read one of them.

    Whether there is a figure depends on the references alone, so that the mean is over the same rows for every model.
    """
    references = references_of(output)
    if not all(is_read(reference, tokenizer) for reference in references):
        return None
    return 100 * max(SCORERS[tokenizer].score(reference, response)["rougeL"].fmeasure for reference in references)


def normalised(text: str) -> str:
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(response: str, output: str | list[str]) -> float:
    """100 where the response equals a reference, but for case, punctuation and white space; else 0."""
    return 100.0 * (normalised(response) in map(normalised, references_of(output)))


def score(responses: Sequence[str], outputs: Sequence[str | list[str]], tokenizer: str = "rouge_score") -> dict:
    """The means over the rows, and how many rows there are. A response is stripped before it is compared.

    `rouge_l` is None where no row has one; `without_rouge_l` says how many have none.
    """
    if len(responses) != len(outputs) or not outputs:
        raise ValueError(f"{len(responses)} responses to {len(outputs)} rows")
    responses = [response.strip() for response in responses]
    rouge = [rouge_l(response, output, tokenizer) for response, output in zip(responses, outputs)]
    rouge = [value for value in rouge if value is not None]
    return {
        "rouge_l": sum(rouge) / len(rouge) if rouge else None,
        "exact_match": sum(map(exact_match, responses, outputs)) / len(outputs),
        "count": len(outputs),
        "without_rouge_l": len(outputs) - len(rouge),
        "rouge_tokenizer": tokenizer,
    }


def not_scored(scores: dict) -> str:
    """What to say of rows without ROUGE-L; "" where there are none."""
    if not scores["without_rouge_l"]:
        return ""
    what = f"{scores['without_rouge_l']} of {scores['count']} rows have no ROUGE-L: "
    if scores["rouge_tokenizer"] == "unicode":
        return what + "there is no letter or digit in a reference."
    return what + "rouge_score reads a to z and digits alone. ROUGE_TOKENIZER=unicode reads every script."


def score_files(generations: Path, data: Path, limit: int | None = None, tokenizer: str = "rouge_score") -> dict:
    """`score`, and figures about the responses. Raises ValueError where one is missing."""
    rows = read_lines(data, limit)
    by_row = {row["row"]: row for row in read_lines(generations)}
    missing = [i for i in range(len(rows)) if i not in by_row]
    if missing:
        raise ValueError(f"{generations}: {len(missing)} of {len(rows)} rows are missing, the first is {missing[0]}.")
    responses = [by_row[i] for i in range(len(rows))]
    return {
        **score([r["response"] for r in responses], [row["output"] for row in rows], tokenizer),
        "tokens": sum(r["tokens"] for r in responses) / len(rows),  # mean length
        "unfinished": sum(not r["ended"] for r in responses),  # responses without EOS
        "cut_prompts": sum(r["cut"] for r in responses),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSONL file with output: a string, or a list of them.")
    add("--generations", type=Path, required=True, help="What generate.py made of its prompts.")
    add("--limit", type=int, help="Only the first so many rows.")
    add("--rouge_tokenizer", choices=SCORERS, default="rouge_score", help="unicode reads every script, see above.")
    add("--output", type=Path, help="JSON file for the scores. By default they are printed.")
    args = parser.parse_args()
    try:
        scores = score_files(args.generations, args.data, args.limit, args.rouge_tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if warning := not_scored(scores):
        print(f"warning: {args.data}: {warning}", file=sys.stderr)
    if args.output:
        write_json(args.output, scores)
    else:
        print(json.dumps(scores, indent=2))
