"""Turn public data sets into training files.

    python data/prepare_data.py dolly --output data/dolly_train.jsonl --exclude valid.jsonl dev.jsonl
    python data/prepare_data.py gsm8k --output data/math_tuning.jsonl
    python data/prepare_data.py code  --output data/code_tuning.jsonl --source mbpp.jsonl

Every row of the output holds `prefix`, the filled-in Alpaca template, and `text`, the response to learn. The output
has one JSON object a line if its name ends in .jsonl, and is one JSON array if it ends in .json.

A source is a local file (.json, .jsonl, both also with .gz, or .parquet), a folder that `datasets.load_dataset` can
read, or the name of a data set on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from modeling.errors import InputError
from modeling.examples import alpaca_prompt, prefix_and_text, read_json, require_nothing_unread

OUTPUT_SUFFIXES = (".json", ".jsonl")
SOURCE_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
ROWS_NAMED = 10  # how many rows a line of the report names, so that it stays one line

# Wikipedia's reference marks: [3], [a], [note 1], [citation needed].
REFERENCE_MARK = re.compile(r"\[(?:\d+|[a-z]|(?:note|nb) \d+|(?:full citation|citation|page) needed)\]", re.I)
# GSM8K's calculator annotations: <<48/2=24>>.
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")

# Columns of instruction data, tried in this order. The second is optional, None where there is no such column.
INSTRUCTION_COLUMNS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("problem", None, "solution"),
    ("prompt", None, "completion"),
)


class LeftOut(Exception):
    """Raised for a row that is rightly not part of the output; the message is the reason that the report gives."""


# ------------------------------------------------------------------------------------------------ reading a source


def read_source(source: str, split: str, config: str | None) -> Iterator[tuple[int, object]]:
    """`(number, row)` for every row of a local file, a folder or a data set of the hub. Numbers start at 1.

    In a file with one object a line the number is that of the line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from read_file(path)
    elif path.is_dir() or not looks_like_a_path(source):
        yield from enumerate(load_with_datasets(source, split, config), start=1)
    else:
        raise InputError(f"{source}: no such file. Check the path, or give the name of a data set on the hub.")


def looks_like_a_path(source: str) -> bool:
    """Whether a name that is no file was meant as one: `user/name` is a data set, `user/name.jsonl` is not."""
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or source.endswith(SOURCE_SUFFIXES)


def read_file(path: Path) -> Iterator[tuple[int, object]]:
    """`(number, row)` for every row of a JSON, JSON-lines or Parquet file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    if not path.name.endswith(SOURCE_SUFFIXES):
        raise InputError(f"{path}: can't tell its format. Give a file whose name ends in {', '.join(SOURCE_SUFFIXES)}.")
    if path.suffix == ".parquet":
        yield from enumerate(read_parquet(path), start=1)
        return
    yield from read_json(path)


def read_parquet(path: Path) -> Iterator[dict]:
    """The rows of a Parquet file, a batch at a time."""
    import pyarrow  # here, because it loads slowly and JSON sources do without it
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a valid Parquet file ({error}). Fetch it again.") from None


def load_with_datasets(source: str, split: str, config: str | None) -> Iterable[dict]:
    """One split of a folder or of a data set on the hub."""
    import datasets  # here, because it loads slowly and local files do without it

    try:
        return datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the hub, the network and the reader each have exceptions of their own
        raise InputError(
            f"{source}: can't load split {split!r}, configuration {config or 'default'!r} "
            f"({type(error).__name__}: {str(error).strip()}). Check the name, --split and --config; "
            "without access to the hub, fetch the data elsewhere and give a local file as --source."
        ) from error


# ---------------------------------------------------------------------------------------------------- columns of a row


def text_column(row: dict, column: str, optional: bool = False) -> str:
    """The string in a column; "" for null, and for a missing column that is optional. Raises ValueError otherwise."""
    if column not in row and not optional:
        raise ValueError(f"no column {column!r} among {sorted(row)}. Is it the right file for this command?")
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {type(value).__name__}, not a string. Repair or delete the row.")
    return value or ""


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The filled-in template. Spaces alone are no input, and a row without an instruction is left out."""
    if not instruction.strip():
        raise LeftOut("empty instruction")
    return alpaca_prompt(instruction, context if context.strip() else "")


# ------------------------------------------------------------------------------------------------------------- Dolly


def match_key(instruction: str, response: str) -> tuple[str, str]:
    """What a Dolly row is recognised by in another file of Dolly rows.

    White space and reference marks differ between revisions of Dolly: the one on the hub lost most of the marks that
    the evaluation splits still have. The context isn't part of the key because some rows lost it altogether; the
    instruction and the response together tell rows apart.
    """
    bare_instruction, bare_response = ("".join(REFERENCE_MARK.sub("", t).split()) for t in (instruction, response))
    return bare_instruction, bare_response


def instruction_of(prefix: str) -> str:
    """The instruction in a filled-in Alpaca template; a prompt without the template is all instruction."""
    match = re.search(r"### Instruction:\n(.*?)\n\n### (?:Input|Response):", prefix, re.DOTALL)
    return match[1] if match else prefix


class ExcludedFile:
    """The rows of an evaluation file, which must stay out of the training file.

    A row may have several references as its `output`; each of them counts.
    """

    def __init__(self, path: str):
        self.path = path
        self.rows: dict[int, tuple[str, set[tuple[str, str]]]] = {}  # row number -> (instruction, keys)
        for number, row in read_file(Path(path).expanduser()):
            try:
                self.rows[number] = self._keys_of(row)
            except ValueError as error:
                raise InputError(f"{path}, row {number}: {error}") from None
        if not self.rows:
            raise InputError(f"{path}: no rows. Give a file with 'prompt' and 'output', or drop it from --exclude.")
        self.keys = set().union(*(keys for _, keys in self.rows.values()))
        self.seen: set[tuple[str, str]] = set()

    @staticmethod
    def _keys_of(row: object) -> tuple[str, set[tuple[str, str]]]:
        references = row.get("output") if isinstance(row, dict) else None
        variants = [{**row, "output": r} for r in references] if isinstance(references, list) else [row]
        pairs = [prefix_and_text(variant) for variant in variants]
        instruction = instruction_of(pairs[0][0]) if pairs else ""
        return instruction, {match_key(instruction, text) for _, text in pairs}

    def holds(self, instruction: str, response: str) -> bool:
        """Whether the row is in this file; it then counts as found."""
        key = match_key(instruction, response)
        if key in self.keys:
            self.seen.add(key)
            return True
        return False

    def missing(self) -> list[tuple[int, str]]:
        """`(row number, instruction)` of the rows of this file that the source turned out not to have."""
        return [(n, instruction) for n, (instruction, keys) in self.rows.items() if not keys & self.seen]


def convert_dolly(row: dict, excluded: list[ExcludedFile]) -> tuple[str, str]:
    """Columns instruction, context, response."""
    instruction, response = text_column(row, "instruction"), text_column(row, "response")
    for file in excluded:
        if file.holds(instruction, response):
            raise LeftOut(f"also in {file.path}")
    return instruction_prompt(instruction, text_column(row, "context")), response


# ------------------------------------------------------------------------------------------------------------- GSM8K


def convert_gsm8k(row: dict, strip_annotations: bool) -> tuple[str, str]:
    """Columns question, answer."""
    answer = text_column(row, "answer")
    if strip_annotations:
        answer = CALCULATOR_ANNOTATION.sub("", answer)
    return instruction_prompt(text_column(row, "question")), answer


# -------------------------------------------------------------------------------------------------------------- code


def convert_code(
    row: dict, format: str, columns: tuple[str, str | None, str] | None, task_ids: range
) -> tuple[str, str]:
    """MBPP rows, or instruction rows in any of the known columns."""
    if format == "mbpp" or (format == "auto" and not columns and {"text", "code", "test_list"} <= row.keys()):
        return convert_mbpp(row, task_ids)
    instruction_column, input_column, response_column = columns or find_columns(row)
    try:
        require_nothing_unread(row, (instruction_column, response_column), (input_column,) if input_column else ())
    except ValueError as unread:
        raise LeftOut(str(unread)) from None
    instruction = text_column(row, instruction_column)
    context = text_column(row, input_column, optional=True) if input_column else ""
    response = text_column(row, response_column)
    if instruction.rstrip().endswith("### Response:"):
        return instruction.rstrip() + "\n", response  # a filled-in template already
    return instruction_prompt(instruction, context), response


def find_columns(row: dict) -> tuple[str, str | None, str]:
    """The first of the known column names that the row has. Raises ValueError where there are none."""
    for columns in INSTRUCTION_COLUMNS:
        if columns[0] in row and columns[2] in row:
            return columns
    known = "; ".join(f"{instruction} + {response}" for instruction, _, response in INSTRUCTION_COLUMNS)
    raise ValueError(
        f"its columns {sorted(row)} are neither MBPP's nor one of these pairs: {known}. "
        "Name them with --instruction_column and --response_column."
    )


def convert_mbpp(row: dict, task_ids: range) -> tuple[str, str]:
    """Columns task_id, text, code, test_list. The tests are part of the prompt: they name the function."""
    task_id, tests = row.get("task_id"), row.get("test_list")
    if not isinstance(task_id, int) or not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
        raise ValueError("MBPP rows need a number 'task_id' and a list of strings 'test_list'. Check --format.")
    if task_id not in task_ids:
        raise LeftOut(f"task id outside {task_ids.start}-{task_ids.stop - 1}")
    task = text_column(row, "text").strip()
    if not task:
        raise LeftOut("empty instruction")
    setup = text_column(row, "test_setup_code", optional=True)
    lines = [text.strip() for text in (setup, *tests) if text.strip()]
    instruction = "\n".join([task, "", "The Python code has to pass these tests:", *lines])
    # The published file has Windows line ends in most solutions.
    return instruction_prompt(unix_lines(instruction)), unix_lines(text_column(row, "code")).rstrip()


def unix_lines(text: str) -> str:
    """The text with Unix line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ----------------------------------------------------------------------------------------- from a source to an output


def prepare(
    source: str, rows: Iterable[tuple[int, object]], convert: Callable[[dict], tuple[str, str]]
) -> tuple[list[dict], dict[str, list[int]], int]:
    """Convert every row, leaving out what has no response and what was there already.

    Returns the examples, the numbers of the rows left out by reason, and how many rows were read.
    """
    examples: list[dict] = []
    left_out: dict[str, list[int]] = {}
    seen: set[tuple[str, str]] = set()
    read = 0
    # disable=None: no progress bar where the output isn't a terminal.
    for number, row in tqdm(rows, desc=Path(source).name, unit=" rows", leave=False, disable=None):
        read += 1
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, not an object with named columns. Repair the row.")
            prefix, text = convert(row)
            if not text.strip():
                raise LeftOut("empty response")
            if (prefix, text) in seen:
                raise LeftOut("exact duplicate of an earlier row")
        except ValueError as error:
            raise InputError(f"{source}, row {number}: {error}") from None
        except LeftOut as reason:
            left_out.setdefault(str(reason), []).append(number)
            continue
        seen.add((prefix, text))
        examples.append({"prefix": prefix, "text": text})
    if not read:
        raise InputError(f"{source}: no rows. Check that the file is the right one and is complete.")
    if not examples:
        reasons = "; ".join(f"{reason}: {len(numbers)}" for reason, numbers in left_out.items())
        raise InputError(f"{source}: none of its {read} rows is left ({reasons}). Nothing was written.")
    return examples, left_out, read


def take_validation(examples: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`(training, validation)`: `size` examples drawn at random, and the others; both in the source's order."""
    if size >= len(examples):
        raise InputError(f"--validation_size {size} leaves nothing to train on: there are {len(examples)} examples.")
    drawn = set(random.Random(seed).sample(range(len(examples)), size))
    training = [example for place, example in enumerate(examples) if place not in drawn]
    return training, [examples[place] for place in sorted(drawn)]


def json_line(example: dict) -> str:
    """One line of JSON with readable letters.

    Unicode's own line separators (there is one in GSM8K) are escaped: many readers would end the line there.
    """
    return re.sub("[\x85\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(example, ensure_ascii=False))


def write_examples(path: Path, examples: list[dict]) -> None:
    """Write under a temporary name and rename, so that no half-written file can be taken for a whole one."""
    lines = [json_line(example) for example in examples]
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_outputs(args: argparse.Namespace) -> None:
    """Complain about the output files before the long work, not after it."""
    outputs = [args.output] + ([args.validation_output] if args.validation_output else [])
    inputs = [args.source, *getattr(args, "exclude", [])]
    for place, output in enumerate(outputs):
        if output.suffix not in OUTPUT_SUFFIXES:
            raise InputError(f"{output}: the name of an output must end in {' or '.join(OUTPUT_SUFFIXES)}.")
        if output.resolve() in [Path(name).expanduser().resolve() for name in (*inputs, *outputs[:place])]:
            raise InputError(f"{output}: is read or written already in this run. Give each output a name of its own.")
    if args.validation_size is not None and not args.validation_output:
        raise InputError("--validation_size needs --validation_output, the file to write these examples to.")


def report(source: str, read: int, left_out: dict[str, list[int]], kept: int) -> None:
    """Print how many rows were read, left out (by reason) and kept."""
    print(f"{source}: {read} rows read")
    for reason, numbers in left_out.items():
        named = ", ".join(map(str, numbers[:ROWS_NAMED])) + (", ..." if len(numbers) > ROWS_NAMED else "")
        print(f"  {len(numbers):>6} left out: {reason} (row{'s' if len(numbers) > 1 else ''} {named})")
    print(f"  {kept:>6} kept")


def report_exclusions(excluded: list[ExcludedFile]) -> None:
    """Print how much of each excluded file the source had, and warn about every row that it didn't have."""
    for file in excluded:
        missing = file.missing()
        print(f"{file.path}: {len(file.rows) - len(missing)} of its {len(file.rows)} rows found in the source")
        for number, instruction in missing:
            print(
                f"warning: {file.path}, row {number} isn't in the source: {instruction[:80]!r}. "
                "That is harmless unless the source holds it in another wording.",
                file=sys.stderr,
            )


def run(args: argparse.Namespace) -> None:
    """Carry out one command."""
    check_outputs(args)
    excluded = [ExcludedFile(path) for path in getattr(args, "exclude", [])]
    rows = read_source(args.source, args.split, args.config)
    examples, left_out, read = prepare(args.source, rows, args.converter(args, excluded))
    report(args.source, read, left_out, len(examples))
    report_exclusions(excluded)
    if args.validation_output:
        size = 500 if args.validation_size is None else args.validation_size
        examples, validation = take_validation(examples, size, args.seed)
        write_examples(args.validation_output, validation)
        print(f"{args.validation_output}: {len(validation)} examples written")
    write_examples(args.output, examples)
    print(f"{args.output}: {len(examples)} examples written")


# ------------------------------------------------------------------------------------------------------ command line


def dolly_converter(args: argparse.Namespace, excluded: list[ExcludedFile]) -> Callable:
    return partial(convert_dolly, excluded=excluded)


def gsm8k_converter(args: argparse.Namespace, excluded: list[ExcludedFile]) -> Callable:
    return partial(convert_gsm8k, strip_annotations=args.strip_annotations)


def code_converter(args: argparse.Namespace, excluded: list[ExcludedFile]) -> Callable:
    columns = None
    if args.instruction_column or args.input_column or args.response_column:
        if not (args.instruction_column and args.response_column):
            raise InputError("--instruction_column and --response_column go together: give both.")
        columns = (args.instruction_column, args.input_column, args.response_column)
    return partial(convert_code, format=args.format, columns=columns, task_ids=args.task_ids)


def id_range(text: str) -> range:
    """`601-974` as a range that holds both ends."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of ids. Write the first and the last, as in 601-974")
    return range(int(match[1]), int(match[2]) + 1)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_command(
    commands, name: str, converter: Callable, description: str, source: str | None = None, config: str | None = None
) -> argparse.ArgumentParser:
    """One subcommand with the arguments that all have; returns its parser for those of its own."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(converter=converter)
    parser.add_argument(
        "--source",
        default=source,
        required=source is None,
        help=f"a local file ({', '.join(SOURCE_SUFFIXES)}), a folder, or the name of a data set on the hub"
        + (f" (default: {source})" if source else ""),
    )
    parser.add_argument("--split", default="train", help="the split to load from a folder or the hub (default: train)")
    parser.add_argument(
        "--config",
        default=config,
        help="the configuration to load from a folder or the hub"
        + (f" (default: {config})" if config else ", where there are several"),
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the training file: one object a line if it ends in .jsonl, an array if it ends in .json",
    )
    parser.add_argument("--validation_output", type=Path, help="put some of the examples into this file instead")
    parser.add_argument(
        "--validation_size", type=positive, help="how many, drawn at random (500 where only the file is given)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the draw (default: 42)")
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each kind of source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    dolly = add_command(
        commands,
        "dolly",
        dolly_converter,
        "Instruction data with the columns instruction, context and response (databricks-dolly-15k).",
        source="databricks/databricks-dolly-15k",
    )
    dolly.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation files ('prompt' and 'output') whose rows must stay out of the training file; a row is "
        "recognised by its instruction and response, whatever the white space and reference marks such as [3]",
    )

    gsm8k = add_command(
        commands,
        "gsm8k",
        gsm8k_converter,
        "Word problems with the columns question and answer (GSM8K).",
        source="openai/gsm8k",
        config="main",
    )
    gsm8k.add_argument(
        "--strip_annotations", action="store_true", help="drop the calculator annotations such as <<48/2=24>>"
    )

    code = add_command(
        commands,
        "code",
        code_converter,
        "Code data: MBPP rows (task_id, text, code, test_list), or rows with an instruction and a response, in "
        "columns named instruction, input (may be missing) and output or response; problem and solution; or prompt "
        "and completion. A prompt that ends in '### Response:' is taken as it is, any other gets the template.",
    )
    code.add_argument(
        "--format",
        choices=("auto", "mbpp", "instruction"),
        default="auto",
        help="auto, the default, goes by the columns",
    )
    code.add_argument(
        "--task_ids",
        type=id_range,
        default="601-974",
        help="MBPP only: first and last task id to keep (default: 601-974)",
    )
    code.add_argument("--instruction_column", help="column of the instruction, where it has another name")
    code.add_argument("--input_column", help="column of the input that goes with it; may be missing in a row")
    code.add_argument("--response_column", help="column of the response, where it has another name")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits with status 2 and one message where what the user gave is wrong."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (InputError, OSError) as error:
        parser.exit(2, f"prepare_data.py: error: {error}\n")


if __name__ == "__main__":
    main()
