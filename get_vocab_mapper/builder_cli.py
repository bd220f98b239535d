"""What the three builder scripts share: their flags, loading the tokenizers, writing the mapper.

Whatever goes wrong ends a script with status 2 and one message.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

from modeling.errors import InputError, one_message, user_input


def main(kind: str, description: str) -> None:
    """The builder script of mappers of this kind."""
    arguments = parse_arguments(description)
    one_message(lambda: build_and_save(kind, arguments))()


def parse_arguments(description: str) -> argparse.Namespace:
    """The flags of a builder script. Needs no heavy import, so that --help answers at once."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher", required=True, help="the teacher's tokenizer: a folder or a hub name")
    parser.add_argument("--student", required=True, help="the student's tokenizer: a folder or a hub name")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="the .safetensors file to write, in a folder that is made where there is none. A file that is there is "
        "replaced once the new one is whole",
    )
    parser.add_argument(
        "--simi_threshold",
        "--simi_threadshold",
        type=_share,
        default=0.3,
        help="tokens without an exact match are stored as similar below this normalised edit distance, "
        "between 0 and 1 (default: 0.3). Training can use a smaller value with the same file, but no larger",
    )
    parser.add_argument(
        "--export_json",
        type=Path,
        help='also write {"teacher id": student id}, 0 = unmapped, the layout of the published scripts',
    )
    parser.add_argument(
        "--trust_remote_code",
        type=_true_or_false,
        nargs="?",
        const=True,
        default=False,
        help="run the tokenizer code that a hub repository brings along: true or false (default: false)",
    )
    arguments = parser.parse_args()
    if arguments.output.suffix.lower() == ".json":
        parser.error("--output is a .safetensors file; use --export_json FILE for the JSON layout")
    return arguments


def build_and_save(kind: str, arguments: argparse.Namespace) -> None:
    """Build a mapper, print its report and write it. Raises InputError."""
    for flag in ("output", "export_json"):
        _make_room(flag, getattr(arguments, flag))  # before the minute that building takes

    # Heavy, so only once --help has been answered.
    from get_vocab_mapper.builders import BUILDERS, report
    from get_vocab_mapper.mapper_file import export_json, save_mapper
    from get_vocab_mapper.token_forms import token_forms

    forms = []
    for flag in ("teacher", "student"):
        tokenizer = _load_tokenizer(flag, getattr(arguments, flag), arguments.trust_remote_code)
        with user_input(f"--{flag}"):
            forms.append(token_forms(tokenizer))
    with user_input():
        mapper = BUILDERS[kind](*forms, threshold=arguments.simi_threshold)
    print(report(mapper, *forms))
    for flag, write in (("output", save_mapper), ("export_json", export_json)):
        path = getattr(arguments, flag)
        if path is not None:
            replaced = path.exists()
            try:
                write(mapper, path)
            except OSError as error:
                raise InputError(f"--{flag} {path}: it cannot be written: {error.strerror or error}.") from error
            print(f"written{', in the place of an older file' if replaced else ''}: {path}")


def _make_room(flag: str, path: Path | None) -> None:
    """Makes the folder of a file that is to be written. Raises InputError where no file can be written there."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--{flag} {path}: this is a folder. Give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(
            f"--{flag} {path}: no file can be written there: {error.strerror}. Give another folder."
        ) from error


def _load_tokenizer(flag: str, name: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"--{flag} {name}: the tokenizer needs Python code that comes with it, which is not run unasked. Read "
                "the code; where you trust it, give --trust_remote_code true."
            ) from error
        raise InputError(f"--{flag}: no tokenizer could be loaded from {name!r}: {error}") from error


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, and is {text}")


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, and is {text!r}")
    return text.lower() == "true"
