"""Where the time of a training step goes: data, copies, teacher, student, head, loss, optimizer, and the rest.

    CDM_REAL_DIR=… python -m tests.benchmarks.profile_step [--methods CDM] [--device cuda --bf16 …]

The real scripts on random models, as in bench_steps, with a clock at the border of each part. On an accelerator each
border waits for the device, so that a part is what it takes when nothing runs beside it; `busy` is the share of an
undisturbed step in which the device computes, by torch's profiler: the rest of it, the device waits for the host.

    data       the next batch, as far as it is not made by workers
    teacher    its forward pass
    student    forward and backward, without the head
    head       the student's output layer, forward and backward
    loss       cross-entropy and divergence, forward and backward, with alignment and mapping
    optimizer  clipping, step, zeroing
    other      what the Trainer does besides
"""

import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType

from tests.benchmarks.bench_steps import WARM_UP, Bench, arguments_of, chosen, result_of
from tests.benchmarks.device import wait_for

PARTS = ("data", "copies", "teacher", "student", "head", "loss", "optimizer", "other")


class Clock:
    """Seconds of each part, of one step after another. Within a part another may begin: its time is its own."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self.device = "cpu"
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self._open and self.steps:
            self.steps[-1][self._open[-1]] += now - self._since
        self._since = now

    def begin(self, part: str) -> None:
        self._switch()
        self._open.append(part)

    def end(self) -> None:
        self._switch()
        self._open.pop()

    def step(self) -> None:
        """A new step begins, with what follows the last."""
        self._switch()
        self.steps.append(dict.fromkeys(PARTS, 0.0))
        if not self._open:
            self._open.append("other")

    @contextmanager
    def part(self, name: str):
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def around(self, name: str, owner: type, method: str) -> None:
        function = getattr(owner, method)

        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, method, call)


def profiled_run(script: str) -> None:
    """Runs a script with its arguments, and prints the median seconds of each part."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

    from modeling.losses import rows
    from modeling.models.output_head import unwrapped
    from modeling.training.trainer import DistillationTrainer, ResponseTrainer

    clock, undisturbed = Clock(), os.environ.get("CDM_BENCH") == "busy"
    if not undisturbed:
        clock.around("data", Trainer, "get_batch_samples")
        clock.around("copies", ResponseTrainer, "_prepare_inputs")
        clock.around("teacher", DistillationTrainer, "teacher_logits")
        clock.around("student", ResponseTrainer, "student_logits")
        clock.around("student", Accelerator, "backward")
        clock.around("loss", rows._SharedGradient, "of_whole")
        clock.around("loss", rows._SharedGradient, "of_chunked")
        clock.around("optimizer", Accelerator, "clip_grad_norm_")
        clock.around("optimizer", AcceleratedOptimizer, "step")
        clock.around("optimizer", AcceleratedOptimizer, "zero_grad")
    training_step, profile = Trainer.training_step, torch.profiler.profile()

    def step(self, model, *args, **kwargs):
        first = not clock.steps
        if undisturbed:
            if len(clock.steps) == WARM_UP:
                profile.start()
            clock.steps.append({})
            return training_step(self, model, *args, **kwargs)
        clock.device = self.args.device.type
        clock.step()
        if first:
            clock.around("loss", type(self), "compute_loss")
            head = unwrapped(model).get_output_embeddings()
            head.register_forward_pre_hook(lambda *_: clock.begin("head"))
            head.register_forward_hook(lambda *_: clock.end())
            head.register_full_backward_pre_hook(lambda *_: clock.begin("head"))
            head.register_full_backward_hook(lambda *_: clock.end())
        return training_step(self, model, *args, **kwargs)

    Trainer.training_step = step
    sys.argv = [script, *sys.argv[sys.argv.index(script) + 1 :]]
    runpy.run_path(script, run_name="__main__")
    if undisturbed:
        wait_for(clock.device)
        profile.stop()
        events = profile.events()
        spans = [e.time_range for e in events]
        device_us = sum(e.time_range.elapsed_us() for e in events if e.device_type != DeviceType.CPU)
        wall_us = max(span.end for span in spans) - min(span.start for span in spans)
        print("RESULT", json.dumps({"busy": device_us / wall_us}))
        return
    steps = clock.steps[WARM_UP:-1]
    print("RESULT", json.dumps({part: statistics.median(step[part] for step in steps) for part in PARTS}))


def main() -> None:
    arguments = arguments_of(__doc__, steps=12).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), arguments)
        print(f"{'method':8}  {'step':>8}  " + "  ".join(f"{part:>9}" for part in PARTS) + "  busy")
        for method in chosen(arguments.methods):
            parts = result_of(bench.command(method, "tests.benchmarks.profile_step"))
            total = sum(parts.values())
            cells = [f"{method.name:8}", f"{1000 * total:5.0f} ms", *(f"{parts[part] / total:9.1%}" for part in PARTS)]
            if arguments.device == "cpu":
                cells.append("   –")
            else:
                busy = result_of(bench.command(method, "tests.benchmarks.profile_step"), "busy")["busy"]
                cells.append(f"{busy:4.0%}")
            print("  ".join(cells), flush=True)


if __name__ == "__main__":
    if "--run" in sys.argv:
        profiled_run(sys.argv[sys.argv.index("--run") + 1])
    else:
        main()
