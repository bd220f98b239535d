"""One thread a process: several run tests beside each other, and a fork does not survive OpenMP's threads. No hub.

Also the interpreter that all end-to-end tests share, and the mark `quick`, which no test carries by hand.
"""

import contextlib
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # where it cannot be reached, it is asked again and again for seconds

import pytest
import torch

from tests.end_to_end.warm_python import warm_python

torch.set_num_threads(1)

# Unit tests that take long, or real vocabularies: the rigs, brute force over whole vocabularies, scripts in processes.
SLOW = ("test_rigs", "test_bpm", "test_prefix_search", "test_vocab_mapper", "test_pair_mapper", "test_evaluation")
SLOW += ("test_readme", "test_show_alignment", "test_byte_group_methods", "test_shell", "test_sample_data")


def pytest_configure(config: pytest.Config) -> None:
    """It belongs to the process that starts the workers, which are told where it is."""
    if hasattr(config, "workerinput"):
        config.warm_python = config.workerinput["warm_python"]
    else:
        stack = contextlib.ExitStack()
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config.warm_python = stack.enter_context(warm_python(Path(folder)))
        config.add_cleanup(stack.close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["warm_python"] = node.config.warm_python


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "unit" in item.path.parts and item.path.stem not in SLOW:
            item.add_marker("quick")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.markexpr == "quick":
        terminalreporter.write_line(f"Left out: tests/end_to_end, and of tests/unit {', '.join(SLOW)}.")
