"""A few cells of launch_matrix.py: under every launcher, and after a kill, the losses of a plain run."""

import pytest

from tests.end_to_end.launch_matrix import Bench, largest_difference, resumed_losses, uninterrupted_losses


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("matrix")).make()


@pytest.mark.parametrize(
    ("script", "way"),
    [
        *(("ULD", "torchrun 2"), ("MinED", "ZeRO-3"), ("RKD", "ZeRO-1"), ("BPM", "ZeRO-2")),
        *(("Strict", "ZeRO-2"), ("GOLD", "torchrun 2"), ("SimCT", "ZeRO-3"), ("ALM", "torchrun 2")),
    ],
)
def test_several_processes_killed_and_resumed_take_the_steps_of_one(bench, script, way):
    plain = uninterrupted_losses(bench, script, "plain")
    assert largest_difference(plain, resumed_losses(bench, script, way)) < 1e-5


def test_a_killed_plain_run_goes_on_to_the_uninterrupted_losses(bench):
    expected = uninterrupted_losses(bench, "FKD", "plain")
    assert largest_difference(expected, resumed_losses(bench, "FKD", "plain")) < 1e-5
