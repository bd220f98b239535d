"""Clocks and memory of the device that a benchmark runs on."""

import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch


def add_device_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu (default: cpu)")


def wait_for(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(step: Callable[[], object], device: str = "cpu") -> float:
    """How long a step takes, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - start


def peak_bytes_of(step: Callable[[], object]) -> int:
    """The most that a step takes on an accelerator beyond what is there before it, its result included."""
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    result = step()
    torch.accelerator.synchronize()
    peak = torch.accelerator.max_memory_allocated() - before
    del result
    return peak
