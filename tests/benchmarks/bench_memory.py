"""How much memory each method's loss takes beyond the logits, forward and backward, cross-entropy included.

    python tests/benchmarks/bench_memory.py [--rows 512] [--dtype float32] [--device cpu]

Every method runs in a process of its own, on random logits of the given number of response tokens and the vocabularies
of Qwen2 (student, and teacher of the methods that need one tokenizer) and Phi-3 (teacher of the others). What both
sides' logits take does not count, nor does the gradient of the student's, which every loss must give; all else does,
as a share of the student's logits: `beyond`. On the CPU it is the peak of the process's resident memory, and
`seconds` (with the cores at hand) tells more about the sort than about a training step.
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

from modeling.alignment import Groups
from modeling.contextual_mapping import DirectionMap, contextual_kl
from modeling.divergences import (
    cross_entropy,
    cross_entropy_and,
    cross_entropy_and_kl,
    kl_to_target_rows,
    moved_distribution_rows,
    sorted_distance_rows,
)

QWEN2, PHI3 = 151_936, 32_064
METHODS = {"CE": 0, "FKD": QWEN2, "RKD": QWEN2, "ULD": PHI3, "MinED": PHI3, "CDM": PHI3}  # the teacher's vocabulary


def losses(method: str, logits: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, ...]:
    """What the method's `compute_loss` does with `logits["student"]` and `logits["teacher"]`, which it takes out."""
    student, teacher = logits.pop("student"), logits.pop("teacher")
    n_student, n_teacher = student.shape[1], teacher.shape[1]
    rows = torch.arange(len(student), device=student.device)
    if method == "CE":
        return (cross_entropy(student, labels),)
    if method == "FKD":
        return cross_entropy_and_kl(student, labels, teacher, 2.0)
    if method == "RKD":
        return cross_entropy_and_kl(student, labels, teacher, 2.0, reverse=True)
    if method == "ULD":
        teacher = teacher.index_select(0, rows)
        return cross_entropy_and(sorted_distance_rows, student, labels, teacher)

    static = np.arange(n_teacher, dtype=np.int32)
    if method == "MinED":
        teacher, static = teacher.index_select(0, rows), torch.from_numpy(static).long().to(student.device)

        def divergence(s: Tensor, t: Tensor, row_labels: Tensor, distilled: Tensor) -> Tensor:
            moved = moved_distribution_rows(t, static, n_student, 2.0)
            one_hot = torch.zeros_like(moved).scatter_(1, row_labels[:, None], 1.0)
            return kl_to_target_rows(torch.where(distilled[:, None], moved, one_hot), s, 2.0)

        return cross_entropy_and(divergence, student, labels, teacher, labels, rows % 2 == 0)

    group, size = np.arange(len(student)), np.ones(len(student), dtype=np.int64)
    back = np.concatenate([static, np.full(n_student - n_teacher, -1, dtype=np.int32)])
    maps = [
        DirectionMap(one_way, np.zeros(len(one_way) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        for one_way in (static, back)
    ]
    kd = contextual_kl(student, teacher, Groups(group, group, size, size), *maps).kd
    return cross_entropy(student, labels), kd


def step(method: str, logits: dict[str, Tensor]) -> Tensor:
    """The gradient of CE/2 + KD/2."""
    student = logits["student"]
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    total = sum(part.sum() for part in losses(method, logits, labels)) / 2
    return torch.autograd.grad(total, student)[0]


def random_logits(n_rows: int, n_student: int, n_teacher: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    shapes = {"student": (n_rows, n_student), "teacher": (n_rows, n_teacher)}
    logits = {side: torch.empty(shape, dtype=dtype, device=device).normal_(0, 3) for side, shape in shapes.items()}
    logits["student"].requires_grad_()
    return logits


def measure(
    method: str, n_rows: int, n_student: int, n_teacher: int, dtype: str = "float32", device: str = "cpu"
) -> dict[str, float]:
    """`{"beyond": share of the student's logits, "seconds": of one step}`. On the CPU, right in a new process only."""
    torch.manual_seed(0)
    step(
        method,
        random_logits(
            4, 300, min(n_teacher, 200 if method not in ("FKD", "RKD") else 300), getattr(torch, dtype), device
        ),
    )  # what is loaded or compiled at first use
    logits = random_logits(n_rows, n_student, n_teacher, getattr(torch, dtype), device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, start = peak_bytes(device), time.perf_counter()
    student_bytes = logits["student"].nbytes
    gradient = step(method, logits)
    peak = peak_bytes(device)
    return {
        "beyond": (peak - before - gradient.nbytes) / student_bytes,
        "seconds": time.perf_counter() - start,
    }


def peak_bytes(device: str) -> int:
    """The most memory that was in use at any time; since the last reset, on an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_in_new_process(method: str, **arguments) -> dict[str, float]:
    """`measure(method, **arguments)` in a new process."""
    code = "import json, sys; from tests.benchmarks.bench_memory import measure; "
    code += "print(json.dumps(measure(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps({"method": method, **arguments})]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="response tokens (default: 512)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides' logits")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    itemsize = getattr(torch, arguments.dtype).itemsize
    print(f"{arguments.rows} response tokens, {arguments.dtype}, {arguments.device}")
    print("method  student's logits  teacher's logits  beyond  seconds")
    for method, n_teacher in METHODS.items():
        result = measure_in_new_process(
            *(method,),
            n_rows=arguments.rows,
            n_student=QWEN2,
            n_teacher=n_teacher,
            dtype=arguments.dtype,
            device=arguments.device,
        )
        student, teacher = (arguments.rows * v * itemsize / 1e6 for v in (QWEN2, n_teacher))
        print(
            f"{method:6}  {student:13.0f} MB  {teacher:13.0f} MB  {result['beyond']:6.1%}  {result['seconds']:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
