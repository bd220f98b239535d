"""One thread a process: several run tests beside each other, and a fork does not survive OpenMP's threads. No hub.

Also the mark `quick`, which no test carries by hand.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # where it cannot be reached, it is asked again and again for seconds

import pytest
import torch

torch.set_num_threads(1)

# Unit tests that take long, or real vocabularies: the rigs, brute force over whole vocabularies, scripts in processes.
SLOW = ("test_rigs", "test_bpm", "test_prefix_search", "test_vocab_mapper", "test_pair_mapper", "test_evaluation")
SLOW += ("test_readme", "test_show_alignment", "test_byte_group_methods", "test_shell", "test_sample_data")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "unit" in item.path.parts and item.path.stem not in SLOW:
            item.add_marker("quick")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.markexpr == "quick":
        terminalreporter.write_line(f"Left out: tests/end_to_end, and of tests/unit {', '.join(SLOW)}.")
