"""Turn public data sets into training files.

    python data/prepare_data.py dolly --output data/dolly_train.jsonl --exclude valid.jsonl dev.jsonl
    python data/prepare_data.py gsm8k --output data/math_tuning.jsonl
    python data/prepare_data.py code  --output data/code_tuning.jsonl --source mbpp.jsonl

Every row of the output holds `prefix`, the filled-in Alpaca template, and `text`, the response to learn; or, with
`--format messages`, `messages`: the instruction and input as the user's, the response as the assistant's. The output
has one JSON object a line if its name ends in .jsonl, and is one JSON array if it ends in .json.

A source is a local file (.json, .jsonl, both also with .gz, or .parquet), a folder that `datasets.load_dataset` can
read, or the name of a data set on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling.errors import InputError, first_line, user_input
from modeling.files import write_whole
from modeling.text.json_files import read_json
from modeling.text.rows import alpaca_prompt, prefix_and_text, question_of, require_nothing_unread

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


def read_source(source: str, split: str, config: str | None) -> Iterable[tuple[int, object]]:
    """`(number, row)` for every row of a local file, a folder or a data set of the hub. Numbers start at 1.

    In a file with one object a line the number is that of the line. Raises InputError.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        return read_json(path)
    import datasets  # here, because it loads slowly and JSON sources do without it

    try:
        if path.is_file():
            return enumerate(datasets.Dataset.from_parquet(str(path)), start=1)
        return enumerate(datasets.load_dataset(source, config, split=split), start=1)
    except Exception as error:  # the hub, the network and the reader each have exceptions of their own
        raise InputError(
            f"{source}: it cannot be read ({type(error).__name__}: {first_line(error)}). Check the name, "
            f"--split {split} and --config {config or 'default'}; or give a local file as --source."
        ) from error


# ---------------------------------------------------------------------------------------------------- rows of a source


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


def convert_dolly(row: dict, args: argparse.Namespace) -> tuple[str, str]:
    """Columns instruction, context, response."""
    prefix = instruction_prompt(text_column(row, "instruction"), text_column(row, "context"))
    return prefix, text_column(row, "response")


def convert_gsm8k(row: dict, args: argparse.Namespace) -> tuple[str, str]:
    """Columns question, answer."""
    answer = text_column(row, "answer")
    if args.strip_annotations:
        answer = CALCULATOR_ANNOTATION.sub("", answer)
    return instruction_prompt(text_column(row, "question")), answer


def convert_code(row: dict, args: argparse.Namespace) -> tuple[str, str]:
    """MBPP rows, or instruction rows in any of the known columns."""
    if not args.instruction_column and {"text", "code", "test_list"} <= row.keys():
        return convert_mbpp(row, args.task_ids)
    instruction_column, input_column, response_column = columns_of(row, args)
    try:
        require_nothing_unread(row, (instruction_column, response_column), (input_column,) if input_column else ())
    except ValueError as unread:
        raise LeftOut(str(unread)) from None
    instruction, response = text_column(row, instruction_column), text_column(row, response_column)
    if instruction.rstrip().endswith("### Response:"):
        return instruction.rstrip() + "\n", response  # a filled-in template already
    return instruction_prompt(instruction, text_column(row, input_column, optional=True)), response


def columns_of(row: dict, args: argparse.Namespace) -> tuple[str, str | None, str]:
    """The columns that were named, or the first of the known ones that the row has. Raises ValueError without any."""
    if args.instruction_column:
        return args.instruction_column, args.input_column, args.response_column
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
    task_id, tests = row.get("task_id"), row["test_list"]
    if not (isinstance(task_id, int) and isinstance(tests, list) and all(isinstance(t, str) for t in tests)):
        raise ValueError("MBPP rows need a number 'task_id' and a list of strings 'test_list'.")
    if task_id not in task_ids:
        raise LeftOut(f"task id outside {task_ids.start}-{task_ids.stop - 1}")
    task = text_column(row, "text").strip()
    if not task:
        raise LeftOut("empty instruction")
    setup = text_column(row, "test_setup_code", optional=True)
    lines = [text.strip() for text in (setup, *tests) if text.strip()]
    instruction = "\n".join([task, "", "The Python code has to pass these tests:", *lines])
    # The published file has Windows line ends in most solutions.
    instruction, code = (re.sub("\r\n?", "\n", text) for text in (instruction, text_column(row, "code")))
    return instruction_prompt(instruction), code.rstrip()


# --------------------------------------------------------------------------- evaluation rows, which must not be trained


def match_key(prefix: str, text: str) -> tuple[str, str]:
    """What a row is recognised by in another file: its instruction and response.

    White space and reference marks differ between revisions of Dolly: the one on the hub lost most of the marks that
    the evaluation splits still have. The context isn't part of the key because some rows lost it altogether.
    """
    bare_instruction, bare_text = ("".join(REFERENCE_MARK.sub("", t).split()) for t in (instruction_of(prefix), text))
    return bare_instruction, bare_text


def instruction_of(prefix: str) -> str:
    """The instruction in a filled-in Alpaca template; a prompt without the template is all instruction."""
    match = re.search(r"### Instruction:\n(.*?)\n\n### (?:Input|Response):", prefix, re.DOTALL)
    return match[1] if match else prefix


def excluded_rows(path: str) -> dict[int, list[tuple[str, str]]]:
    """By row number, `(prefix, text)` of every reference of a row of an evaluation file. Raises InputError."""
    rows = {}
    for number, row in read_json(Path(path).expanduser()):
        references = row.get("output") if isinstance(row, dict) else None
        variants = [{**row, "output": r} for r in references] if isinstance(references, list) else [row]
        try:
            rows[number] = [prefix_and_text(variant) for variant in variants]
        except ValueError as error:
            raise InputError(f"{path}, row {number}: {error}") from None
    return rows


def report_exclusions(path: str, rows: dict[int, list[tuple[str, str]]], found: set[tuple[str, str]]) -> None:
    """Print how many rows of an excluded file the source has, and warn about every one that it does not have."""
    missing = {number: pairs for number, pairs in rows.items() if found.isdisjoint(match_key(*pair) for pair in pairs)}
    print(f"{path}: {len(rows) - len(missing)} of its {len(rows)} rows found in the source")
    for number, pairs in missing.items():
        instruction = instruction_of(pairs[0][0]) if pairs else ""
        print(f"warning: {path}, row {number} isn't in the source: {instruction[:80]!r}.", file=sys.stderr)


# ----------------------------------------------------------------------------------------- from a source to an output


def prepare(args: argparse.Namespace) -> list[dict]:
    """The examples of the source, leaving out what has no response, is excluded, or was there already.

    Prints how many rows were read, left out (by reason) and kept. Raises InputError where none is left.
    """
    excluded = {path: excluded_rows(path) for path in args.exclude}
    file_of = {match_key(*pair): path for path in reversed(excluded) for r in excluded[path].values() for pair in r}
    examples: dict[tuple[str, str], None] = {}  # in their order
    left_out: dict[str, list[int]] = {}
    found = set()
    read = 0
    for number, row in read_source(args.source, args.split, args.config):
        read += 1
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, not an object with named columns. Repair the row.")
            example = args.convert(row, args)
            key = match_key(*example)
            if key in file_of:
                found.add(key)
                raise LeftOut(f"also in {file_of[key]}")
            if not example[1].strip():
                raise LeftOut("empty response")
            if example in examples:
                raise LeftOut("exact duplicate of an earlier row")
            examples[example] = None
        except ValueError as error:
            raise InputError(f"{args.source}, row {number}: {error}") from None
        except LeftOut as reason:
            left_out.setdefault(str(reason), []).append(number)
    print(f"{args.source}: {read} rows read")
    for reason, numbers in left_out.items():
        named = ", ".join(map(str, numbers[:ROWS_NAMED])) + (", ..." if len(numbers) > ROWS_NAMED else "")
        print(f"  {len(numbers):>6} left out: {reason} (row{'s' if len(numbers) > 1 else ''} {named})")
    print(f"  {len(examples):>6} kept")
    for path, rows in excluded.items():
        report_exclusions(path, rows, found)
    if not examples:
        raise InputError(f"{args.source}: none of its {read} rows is left. Nothing was written.")
    return [{"prefix": prefix, "text": text} for prefix, text in examples]


def take_validation(examples: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`(training, validation)`: `size` examples drawn at random, and the others; both in the source's order."""
    if not 0 < size < len(examples):
        raise InputError(f"--validation_size {size}: give 1 or more, and fewer than the {len(examples)} examples.")
    drawn = set(random.Random(seed).sample(range(len(examples)), size))
    training = [example for place, example in enumerate(examples) if place not in drawn]
    return training, [examples[place] for place in sorted(drawn)]


def as_messages(example: dict) -> dict:
    """The same row as a chat."""
    contents = {"user": question_of(example["prefix"]), "assistant": example["text"]}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def json_line(example: dict) -> str:
    """One line of JSON with readable letters.

    Unicode's own line separators (there is one in GSM8K) are escaped: many readers would end the line there.
    """
    return re.sub("[\x85\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(example, ensure_ascii=False))


def write_examples(path: Path, examples: list[dict], layout: str) -> None:
    """Writes one object a line, or an array, as the file's name says."""
    lines = [json_line(as_messages(example) if layout == "messages" else example) for example in examples]
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    with user_input(str(path)):
        write_whole(path, f"{text}\n".encode())
    print(f"{path}: {len(examples)} examples written")


def check(args: argparse.Namespace) -> None:
    """Raises InputError where flags contradict each other: before the long work, not after it."""
    named = [getattr(args, f"{column}_column", None) for column in ("instruction", "response", "input")]
    if any(named) and not all(named[:2]):
        raise InputError("--instruction_column and --response_column go together: give both.")
    if args.validation_size is not None and not args.validation_output:
        raise InputError("--validation_size needs --validation_output, the file to write these examples to.")
    outputs = [output.resolve() for output in (args.output, args.validation_output) if output]
    inputs = [Path(name).expanduser().resolve() for name in (args.source, *args.exclude)]
    for output in outputs:
        if output in inputs or outputs.count(output) > 1:
            raise InputError(f"{output}: is read or written already in this run. Give each output a name of its own.")


def run(args: argparse.Namespace) -> None:
    """Carry out one command."""
    check(args)
    examples = prepare(args)
    if args.validation_output:
        size = 500 if args.validation_size is None else args.validation_size
        examples, validation = take_validation(examples, size, args.seed)
        write_examples(args.validation_output, validation, args.format)
    write_examples(args.output, examples, args.format)


# ------------------------------------------------------------------------------------------------------ command line


def output_file(text: str) -> Path:
    """A path whose name says which of the two formats is written."""
    if not text.endswith((".json", ".jsonl")):
        raise argparse.ArgumentTypeError(f"the name of {text!r} must end in .json or .jsonl")
    return Path(text)


def id_range(text: str) -> range:
    """`601-974` as a range that holds both ends."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of ids. Write the first and the last, as in 601-974")
    return range(int(match[1]), int(match[2]) + 1)


def add_command(
    commands, name: str, convert: Callable, description: str, source: str | None = None, config: str | None = None
) -> Callable:
    """One subcommand with the arguments that all have; returns the function that adds those of its own."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(convert=convert, exclude=[])
    add = parser.add_argument
    default = " (default: %(default)s)"
    what = "a local file (.json, .jsonl, .json.gz, .jsonl.gz, .parquet), a folder, or the name of a data set on the hub"
    add("--source", default=source, required=source is None, help=what + default * (source is not None))
    add("--split", default="train", help="the split to load from a folder or the hub" + default)
    what = "the configuration to load from a folder or the hub"
    add("--config", default=config, help=what + (default if config else ", where there are several"))
    what = "the training file: one object a line if it ends in .jsonl, an array if it ends in .json"
    add("--output", type=output_file, required=True, help=what)
    what = "the rows' columns: prefix and text in the Alpaca template, or messages, for chat models"
    add("--format", choices=("prefix", "messages"), default="prefix", help=what + default)
    add("--validation_output", type=output_file, help="put some of the examples into this file instead")
    add("--validation_size", type=int, help="how many, drawn at random (500 where only the file is given)")
    add("--seed", type=int, default=42, help="seed of the draw" + default)
    return add


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each kind of source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    description = "Instruction data with the columns instruction, context and response (databricks-dolly-15k)."
    add = add_command(commands, "dolly", convert_dolly, description, source="databricks/databricks-dolly-15k")
    add(
        "--exclude",
        nargs="+",
        metavar="FILE",
        help="evaluation files ('prompt' and 'output') whose rows must stay out of the training file; a row is "
        "recognised by its instruction and response, whatever the white space and reference marks such as [3]",
    )
    description = "Word problems with the columns question and answer (GSM8K)."
    add = add_command(commands, "gsm8k", convert_gsm8k, description, source="openai/gsm8k", config="main")
    add("--strip_annotations", action="store_true", help="drop the calculator annotations such as <<48/2=24>>")
    description = (
        "Code data: MBPP rows (task_id, text, code, test_list), or rows with an instruction and a response, in "
        "columns named instruction, input (may be missing) and output or response; problem and solution; or prompt "
        "and completion. A prompt that ends in '### Response:' is taken as it is, any other gets the template."
    )
    add = add_command(commands, "code", convert_code, description)
    what = "MBPP only: first and last task id to keep (default: %(default)s)"
    add("--task_ids", type=id_range, default="601-974", help=what)
    add("--instruction_column", help="column of the instruction, where it has another name")
    add("--input_column", help="column of the input that goes with it; may be missing in a row")
    add("--response_column", help="column of the response, where it has another name")
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
