"""What compare_methods.sh asks of Python.

python compare_methods.py tokenizers --teacher T --student S    # says nothing, or why they are not the same
python compare_methods.py rows --data FILE --output SET/valid.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from modeling.examples import Encoder, read_rows, require_same_tokenizer


def difference(teacher: str, student: str) -> str:
    """Why the two tokenizers are not the same, in one sentence or more; empty where they are.

    Raises ValueError, naming the setting, for a model whose tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    encoders = []
    for setting, model in (("TEACHER", teacher), ("STUDENT", student)):
        try:
            encoders.append(Encoder(AutoTokenizer.from_pretrained(model)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{setting}={model}: {error}") from error
    try:
        require_same_tokenizer(encoders[1], encoders[0])
    except ValueError as error:
        return str(error)
    return ""


def write_set(data: Path, output: Path) -> int:
    """The rows of a training file as an evaluation set (`prompt`, `output`), and their number.

    An empty text, which no response could equal, is left out. Raises as `read_rows`.
    """
    rows = [{"prompt": row["prefix"], "output": row["text"]} for row in read_rows(data) if row["text"].strip()]
    if not rows:
        raise ValueError(f"{data}: no row of it has a text.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, output)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("tokenizers", help="are they the same?")
    command.add_argument("--teacher", required=True, help="hub name or folder")
    command.add_argument("--student", required=True, help="hub name or folder")
    command = commands.add_parser("rows", help="a training file as an evaluation set")
    command.add_argument("--data", type=Path, required=True, help="in any form that the training scripts take")
    command.add_argument("--output", type=Path, required=True, help="the set's valid.jsonl")
    args = parser.parse_args()
    try:
        if args.command == "tokenizers":
            print(difference(args.teacher, args.student))
        else:
            print(f"{write_set(args.data, args.output)} rows: {args.output}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
