"""EvalPlus's tasks as prompts in the training template, and the responses as solutions that EvalPlus can run.

    python script_eval/code_task.py prompts --dataset humaneval --output prompts.jsonl
    python script_eval/code_task.py samples --dataset humaneval --prompts prompts.jsonl --generations … --output …

The files of HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH are read where these are set (EvalPlus does so).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from eval_records import read_lines, write_text
from evalplus.data import get_human_eval_plus, get_mbpp_plus
from evalplus.sanitize import sanitize

from modeling.text.rows import alpaca_prompt

TASKS = {"humaneval": get_human_eval_plus, "mbpp": get_mbpp_plus}


def instruction(dataset: str, task: dict) -> str:
    """What the model is told to do.

    A HumanEval task is the beginning of a file: imports, sometimes helpers, the function's head and docstring. An MBPP
    task is a docstring with a description and one assertion, put as `data/prepare_data.py code` puts MBPP's own.
    """
    if dataset == "humaneval":
        return f"Complete the following Python function.\n\n{task['prompt'].strip()}"
    lines = task["prompt"].strip().strip('"').strip().splitlines()
    n_text = next((i for i, line in enumerate(lines) if line.startswith("assert")), len(lines))
    text, tests = "\n".join(lines[:n_text]).strip(), lines[n_text:]
    return "\n".join([text, "", "The Python code has to pass these tests:", *tests]) if tests else text


def solution(task: dict, response: str) -> str:
    """The program to run: what EvalPlus's `sanitize` finds in the response, behind what the prompt gave.

    A response that does not define the function itself is its body, as the prompt left off. One that does gets the
    prompt's imports and helpers in front, which it was told are there.
    """
    prompt, name = task["prompt"], task["entry_point"]
    head = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    begins = head.search(prompt)
    if not begins:
        return sanitize(response, name)
    if not head.search(response):
        return sanitize(prompt + response, name)
    return prompt[: begins.start()] + sanitize(response, name)


def write_lines(path: Path, rows: list[dict]) -> None:
    """Leaves a file that already holds these rows alone, so that what was made from it is not older."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def prompts(dataset: str, limit: int | None) -> list[dict]:
    tasks = list(TASKS[dataset]().values())[:limit]
    return [{"task_id": task["task_id"], "prompt": alpaca_prompt(instruction(dataset, task))} for task in tasks]


def samples(dataset: str, asked: list[dict], generations: list[dict]) -> list[dict]:
    """One solution for each of the data set's tasks; EvalPlus wants them all. Those not asked are empty, and fail."""
    responses = {asked[row["row"]]["task_id"]: row["response"] for row in generations}
    if len(responses) < len(asked):
        raise ValueError(f"{len(asked) - len(responses)} of {len(asked)} responses are missing.")
    return [
        {"task_id": name, "solution": solution(task, responses[name]) if name in responses else ""}
        for name, task in TASKS[dataset]().items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("prompts", help="writes the prompts")
    asking.add_argument("--limit", type=int, help="Only the first so many tasks.")
    solving = commands.add_parser("samples", help="writes the solutions")
    solving.add_argument("--prompts", type=Path, required=True, help="The file of the first command.")
    solving.add_argument("--generations", type=Path, required=True, help="What generate.py made of it.")
    for command in (asking, solving):
        command.add_argument("--dataset", choices=tuple(TASKS), required=True)
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.command == "prompts":
            write_lines(args.output, prompts(args.dataset, args.limit))
        else:
            write_lines(args.output, samples(args.dataset, read_lines(args.prompts), read_lines(args.generations)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
