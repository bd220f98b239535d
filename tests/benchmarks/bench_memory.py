"""How much memory each method's loss takes beyond the logits, forward and backward, cross-entropy included.

    python -m tests.benchmarks.bench_memory [--rows 512] [--dtype float32] [--device cpu]

Every method runs in a process of its own, on random logits of the given number of response tokens and the vocabularies
of Qwen2 (student, and teacher of the methods that need one tokenizer) and Phi-3 (teacher of the others). What both
sides' logits take does not count, nor does the gradient of the student's, which every loss must give; all else does,
as a share of the student's logits: `beyond`. On the CPU it is the peak of the process's resident memory, and
`seconds` (with the cores at hand) tells more about the sort than about a training step.

    python -m tests.benchmarks.bench_memory --rows 4096 --logits_chunk 128

starts from last hidden states instead (`--hidden` wide) and goes back to the student's and to its head, once with whole
logits and once with `--logits_chunk`. There all that is taken counts, the gradients of the head included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from get_vocab_mapper.mapper import Direction, Side, VocabMapper
from modeling.losses.logits import ChunkedLogits, Logits
from modeling.losses.prefix_targets import MovedTokens
from modeling.models.output_head import OutputHead
from modeling.text import batch as batches
from modeling.text.alignment import Groups, same_index_rows
from modeling.text.prefix_rows import boundary_rows
from tests.benchmarks.device import add_device_argument, wait_for
from tests.methods import METHODS, ONE_A_SCRIPT, Mappers

QWEN2, PHI3 = 151_936, 32_064


def batch(n_rows: int, alignment: batches.Alignment | None) -> batches.Batch:
    """One example of so many tokens on either side, token j standing for token j."""
    places = np.arange(n_rows)
    example = {
        "row": 1,
        "input_ids": np.arange(n_rows + 1),
        "response_start": 1,
        "byte_ends": places + 1,
        "byte_start": 0,
    }
    side = batches.Side.of([example], "", 0)
    distances = batches.TokenDistances(1 - np.eye(n_rows, dtype=np.uint16), places, places)
    more = {
        "index": {"index_rows": torch.from_numpy(same_index_rows([(n_rows, n_rows)]))},
        "byte": {"groups": Groups.of([(places + 1, places + 1)], [(places, places)])},
        "dtw": {"groups": Groups.of([(places + 1, places + 1)], [batches.equal_weight_groups(distances)])},
        "entropy_dtw": {"token_distances": [distances]},
        "prefix": {"prefix_rows": boundary_rows(places)},
    }
    return batches.Batch(side, side, rows=[1], n_bytes=[n_rows], **more.get(alignment, {}))


def mappers(n_student: int, n_teacher: int, device: str) -> Mappers:
    """Every teacher token is sent to the student's of the same id."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    ways, sides = [], []
    for size, other in ((n_teacher, n_student), (n_student, n_teacher)):
        static = np.where(np.arange(size) < other, np.arange(size), -1).astype(np.int32)
        ways.append(Direction(static, np.zeros(size + 1, np.int32), *none))
        sides.append(Side("same ids", size, ""))
    static = torch.from_numpy(ways[0].static).long().to(device)
    return Mappers(
        VocabMapper("em", 0.3, *sides, *ways),
        static,
        MovedTokens.of(static, n_student),
        boundaries=tuple(torch.arange(0, size, 3, device=device) for size in (n_teacher, n_student)),
        device=device,
    )


def step(method: str, student: Logits, teacher: Logits, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the loss with respect to the leaves."""
    device = student.device
    given = batch(len(student), METHODS[method].alignment).to(device)
    losses = METHODS[method].losses(student, teacher, given, mappers(student.shape[1], teacher.shape[1], device))
    return torch.autograd.grad(losses.mean(), leaves)


def warm_up(method: str, device: str) -> None:
    """What is loaded or compiled at first use."""
    student = torch.randn(4, 300, device=device, requires_grad=True)
    step(method, student, torch.randn(4, 300 if METHODS[method].same_tokenizer else 200, device=device), [student])


def measure(
    method: str, n_rows: int, n_student: int, n_teacher: int, dtype: str = "float32", device: str = "cpu"
) -> dict[str, float]:
    """`{"beyond": share of the student's logits, "seconds": of one step}`. On the CPU, right in a new process only."""
    torch.manual_seed(0)
    warm_up(method, device)
    student, teacher = (
        torch.empty(n_rows, width, dtype=getattr(torch, dtype), device=device).normal_(0, 3)
        for width in (n_student, n_teacher)
    )
    student.requires_grad_()
    before, start = peak_bytes(device, reset=True), time.perf_counter()
    (gradient,) = step(method, student, teacher, [student])
    beyond = (peak_bytes(device) - before - gradient.nbytes) / student.nbytes
    return {"beyond": beyond, "seconds": time.perf_counter() - start}


def measure_from_hidden(
    method: str, n_rows: int, n_student: int, n_teacher: int, hidden: int, chunk: int, dtype: str, device: str
) -> dict[str, float]:
    """`{"bytes": …, "seconds": …}` of one step from last hidden states; chunk 0 makes whole logits."""
    torch.manual_seed(0)
    warm_up(method, device)

    def tensor(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device=device).normal_()

    def logits(hidden: Tensor, weight: Tensor) -> Logits:
        head = OutputHead(weight)
        return ChunkedLogits(hidden, head, len(weight), chunk) if chunk else head(hidden)

    leaves = [tensor(n_rows, hidden).requires_grad_(), tensor(n_student, hidden).requires_grad_()]
    teacher = tensor(n_rows, hidden), tensor(n_teacher, hidden)
    before, start = peak_bytes(device, reset=True), time.perf_counter()
    step(method, logits(*leaves), logits(*teacher), leaves)
    return {"bytes": peak_bytes(device) - before, "seconds": time.perf_counter() - start}


def peak_bytes(device: str, reset: bool = False) -> int:
    """The most memory that was in use at any time; since the last reset, on an accelerator."""
    wait_for(device)
    if device != "cpu":
        if reset:
            torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_in_new_process(method: str, function: str = "measure", **arguments) -> dict[str, float]:
    """`measure(method, **arguments)`, or `measure_from_hidden(…)`, in a new process."""
    code = f"import json, sys; from tests.benchmarks.bench_memory import {function}; "
    code += f"print(json.dumps({function}(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps({"method": method, **arguments})]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="response tokens (default: 512)")
    parser.add_argument("--methods", nargs="+", default=ONE_A_SCRIPT, choices=ONE_A_SCRIPT)
    parser.add_argument("--logits_chunk", type=int, default=0, help="compare whole logits with so many rows at a time")
    parser.add_argument("--hidden", type=int, default=896, help="with --logits_chunk (default: 896, as Qwen2-0.5B's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides' logits")
    add_device_argument(parser)
    arguments = parser.parse_args()
    common = {"n_rows": arguments.rows, "n_student": QWEN2, "dtype": arguments.dtype, "device": arguments.device}
    itemsize = getattr(torch, arguments.dtype).itemsize
    print(f"{arguments.rows} response tokens, {arguments.dtype}, {arguments.device}")
    if arguments.logits_chunk:
        print("method  whole logits  in chunks  less  seconds  seconds")
    else:
        print("method  student's logits  teacher's logits  beyond  seconds")
    for method in arguments.methods:
        n_teacher = QWEN2 if METHODS[method].same_tokenizer else PHI3
        sizes = {**common, "n_teacher": n_teacher}
        if arguments.logits_chunk:
            hidden = {"hidden": arguments.hidden, "function": "measure_from_hidden"}
            whole, parts = (
                measure_in_new_process(method, **sizes, **hidden, chunk=chunk) for chunk in (0, arguments.logits_chunk)
            )
            line = f"{whole['bytes'] / 1e9:9.2f} GB  {parts['bytes'] / 1e9:6.2f} GB  "
            line += f"{whole['bytes'] / parts['bytes']:3.1f}x  {whole['seconds']:7.1f}  {parts['seconds']:7.1f}"
        else:
            result = measure_in_new_process(method, **sizes)
            student, teacher = (arguments.rows * v * itemsize / 1e6 for v in (QWEN2, n_teacher))
            line = f"{student:13.0f} MB  {teacher:13.0f} MB  {result['beyond']:6.1%}  {result['seconds']:7.2f}"
        print(f"{method:6}  {line}", flush=True)


if __name__ == "__main__":
    main()
