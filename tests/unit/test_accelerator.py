"""What the losses cost on an accelerator, as far as any machine can tell: operations, memory, and waiting.

How many operations a loss is made of, and that only the pair search and entropy-weighted alignment wait for the device,
is what its time there hangs on (`tests/benchmarks/count_operations.py` prints it for any size).
"""

import pytest
import torch

from modeling.losses.logits import GIB, loss_memory
from tests.benchmarks.bench_memory import batch, mappers
from tests.benchmarks.count_operations import count
from tests.methods import METHODS
from tests.unit.stub_device import DEVICE, StubDevice

MOST = {"SFT": 100, "FKD": 200, "RKD": 200, "MinED": 300}  # of the others 600
WAITS = {"CDM": 2, "CDM, byte": 1}  # copies of weights, and of candidates, to the host
WIDTHS = (28_000, 13_000), (14_000, 28_000)  # the search of the top 100 is by blocks, as in a real vocabulary


@pytest.mark.parametrize("method", METHODS)
def test_operations(method):
    """With the chunks of 512 rows of Qwen2's and Phi-3's width in 1 GiB; no more for 4 times as many in 4 GiB."""
    share = 64 * sum(WIDTHS[0]) / (512 * (151_936 + 32_064))
    found = [count(method, n, gib * share, torch.bfloat16, WIDTHS[0]).total for n, gib in ((64, 1.0), (256, 4.0))]
    assert 20 < found[0] <= MOST.get(method, 600)
    assert found[1] == found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_within_the_budget(method, widths, dtype):
    """Beyond the logits and their gradient: of what is a vocabulary wide. (Columns of a token are small, and many.)"""
    gib = 0.02
    operations = count(method, 128, gib, dtype, widths)
    narrow = 128 * 200 * 8 * 12  # bytes: CDM's k columns of each group, in a dozen tensors
    assert 0.1 * gib * GIB < operations.peak < gib * GIB + narrow


@pytest.mark.parametrize("method", METHODS)
def test_only_two_copies_wait_for_the_device(method):
    n_student, n_teacher = 40, 40 if METHODS[method].same_tokenizer else 30
    given = batch(9, METHODS[method].alignment)
    logits = [torch.randn(9, n, generator=torch.Generator().manual_seed(n)) for n in (n_student, n_teacher)]

    def loss_and_gradient(student, teacher, given, found):
        student.requires_grad_()
        losses = METHODS[method].losses(student, teacher, given, found)
        return losses.mean(), *torch.autograd.grad(losses.mean(), student)

    with loss_memory(1.0):  # an accelerator's chunks on the CPU too
        expected = loss_and_gradient(*(z.clone() for z in logits), given, mappers(n_student, n_teacher, "cpu"))
    with StubDevice() as device:
        found = mappers(n_student, n_teacher, DEVICE)
        METHODS[method].settings(found)  # what is made of them once is made now
        device.waits.clear()
        moved = [tensor.pin_memory().to(DEVICE, non_blocking=True) for tensor in logits]
        result = loss_and_gradient(*moved, given.pin_memory().to(DEVICE, non_blocking=True), found)
        assert device.waits == ["copy to the host"] * WAITS.get(method, 0)
        for value, known in zip(result, expected):
            torch.testing.assert_close(value.cpu(), known)


def test_the_stub_sees_what_waits():
    with StubDevice() as device:
        values = torch.ones(3).to(DEVICE)
        assert values.sum().item() == 3 and (values[values > 0] + values.nonzero()).cpu().device.type == "cpu"
    assert device.waits == ["copy to the device", "_local_scalar_dense", "index", "nonzero", "copy to the host"]
