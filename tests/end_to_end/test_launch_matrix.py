"""A few cells of launch_matrix.py: equal losses under every launcher, and equal after a kill."""

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
def test_distributed_equals_plain_and_resumed_equals_uninterrupted(bench, script, way):
    plain, whole = uninterrupted_losses(bench, script, "plain"), uninterrupted_losses(bench, script, way)
    assert whole[0] == pytest.approx(plain[0], rel=1e-4)
    assert largest_difference(whole, resumed_losses(bench, script, way)) < 1e-4


def test_a_killed_plain_run_goes_on_to_the_uninterrupted_losses(bench):
    expected = uninterrupted_losses(bench, "FKD", "plain")
    assert largest_difference(expected, resumed_losses(bench, "FKD", "plain")) < 1e-5
