"""A few cells of launch_matrix.py: under every launcher, and after a kill, the losses of a plain run."""

import runpy
import sys

import pytest

from tests.end_to_end.launch_matrix import (
    Bench,
    largest_difference,
    losses,
    resumed_losses,
    uninterrupted_losses,
)
from tests.end_to_end.rig import in_a_fork


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("matrix")).make()


def plain_losses(bench, script):
    """Of an uninterrupted run in one process, which has this one's imports."""
    output = bench.folder / f"{script} in a fork"

    def train():
        _, *sys.argv = bench.command(script, "plain", output)
        runpy.run_path(sys.argv[0], run_name="__main__")

    done = in_a_fork(train)
    assert done.status == 0, done.output
    return losses(output)


@pytest.mark.parametrize(
    ("script", "way"),
    [
        *(("ULD", "torchrun 2"), ("MinED", "ZeRO-3"), ("RKD", "ZeRO-1"), ("BPM", "ZeRO-2")),
        *(("Strict", "ZeRO-2"), ("GOLD", "torchrun 2"), ("SimCT", "ZeRO-3"), ("ALM", "torchrun 2")),
    ],
)
def test_several_processes_killed_and_resumed_take_the_steps_of_one(bench, script, way):
    assert largest_difference(plain_losses(bench, script), resumed_losses(bench, script, way)) < 1e-5


def test_a_killed_plain_run_goes_on_to_the_uninterrupted_losses(bench):
    expected = uninterrupted_losses(bench, "FKD", "plain")
    assert largest_difference(expected, resumed_losses(bench, "FKD", "plain")) < 1e-5
