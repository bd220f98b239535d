"""The rows of the comparison in the README's Results: short ones of Dolly and GSM8K, half and half.

    python tests/benchmarks/results_rows.py --dolly databricks-dolly-15k.jsonl --dolly_test valid.jsonl \\
        --gsm8k train.jsonl --output rows

Written are train.jsonl (300 rows), few.jsonl (its first 80), choice.jsonl (40) and held_out.jsonl (80). Prompts begin
at "### Instruction:"; prompt and response have at most 280 bytes, the response at least 60.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

PREPARE = Path(__file__).parents[2] / "data/prepare_data.py"
LONGEST, SHORTEST = 280, 60  # bytes of a row, characters of its response
PARTS = {"train": 150, "choice": 20, "held_out": 40}  # of each source


def rows_of(kind: str, drawn: int, output: Path, *flags: object) -> list[dict]:
    """The short ones of so many rows that prepare_data.py draws."""
    file = output / f"{kind}.drawn.jsonl"
    command = [sys.executable, PREPARE, kind, *flags, "--output", output / f"{kind}.rest.jsonl"]
    subprocess.run([*map(str, command), "--validation_output", file, "--validation_size", str(drawn)], check=True)
    kept = []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        front, heading, question = row["prefix"].partition("### Instruction:")
        if "paired with an input" not in front:
            row["prefix"] = heading + question
            if len((row["prefix"] + row["text"]).encode()) <= LONGEST and len(row["text"]) >= SHORTEST:
                kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dolly", "dolly_test", "gsm8k", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sources = [
        rows_of("dolly", 2000, args.output, "--source", args.dolly, "--exclude", args.dolly_test),
        rows_of("gsm8k", 5000, args.output, "--source", args.gsm8k, "--strip_annotations"),
    ]
    first = 0
    for name, count in PARTS.items():
        parts = [rows[first : first + count] for rows in sources]
        mixed = [json.dumps(row) + "\n" for pair in zip(*parts, strict=True) for row in pair]
        (args.output / f"{name}.jsonl").write_text("".join(mixed), encoding="utf-8")
        if name == "train":
            (args.output / "few.jsonl").write_text("".join(mixed[:80]), encoding="utf-8")
        first += count


if __name__ == "__main__":
    main()
