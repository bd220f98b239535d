"""How many operations that compute each method's loss is made of, forward and backward, cross-entropy included.

    python -m tests.benchmarks.count_operations [--rows 512 2048] [--loss_memory 1] [--names CDM]

On an accelerator each such operation is a kernel or a few, with a few microseconds between one and the next: where the
logits are small, their number is what a loss costs. They are counted as they are dispatched, on any machine, with the
chunks that an accelerator would take. Views and allocations compute nothing, and do not count.

`peak` is the most memory that tensors made by the loss took at any time, the logits' gradient left out, as a share of
the student's logits: what `--loss_memory` bounds. (A kernel's own scratch memory is not seen.)
"""

import argparse
import weakref
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.losses.logits import loss_memory
from tests.benchmarks.bench_memory import PHI3, QWEN2, step
from tests.methods import METHODS

# What computes nothing on a device.
NO_WORK = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_local_scalar_dense", "promote_types")


class Operations(TorchDispatchMode):
    """Counts the operations that compute, and follows the memory of the tensors that they make.

    Attributes:
        counts: of each operation, by name.
        peak: bytes, the most that was there at any time of what was made since the start.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.peak = self.now = 0
        self._known: dict[int, int] = {}  # storages that are there, and their bytes

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_key(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_WORK:
            self.counts[name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in given and key not in self._known:
                storage = tensor.untyped_storage()
                self._known[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def count(
    method: str, n_rows: int, gib: float, dtype: torch.dtype, widths: tuple[int, int] = (QWEN2, PHI3)
) -> Operations:
    """One step of a method's loss with an accelerator's chunks.

    Args:
        n_rows: response tokens, the same number on both sides.
        gib: of `loss_memory`.
        dtype: of the logits.
        widths: vocabulary of the student, and of a teacher with another tokenizer.
    """
    torch.manual_seed(0)
    n_teacher = widths[0] if METHODS[method].same_tokenizer else widths[1]
    student, teacher = (torch.empty(n_rows, width, dtype=dtype).normal_(0, 3) for width in (widths[0], n_teacher))
    student.requires_grad_()
    with loss_memory(gib), Operations() as operations:
        step(method, student, teacher, [student])
    operations.peak -= student.nbytes  # the gradient
    return operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512], help="response tokens (default: 512)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--loss_memory", type=float, default=1.0, help="GiB (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of both sides' logits")
    parser.add_argument("--names", default=[], nargs="+", choices=list(METHODS), help="list these methods' operations")
    arguments = parser.parse_args()
    print(f"{'method':10}  {'tokens':>6}  {'operations':>10}  {'peak':>6}")
    for method in arguments.methods:
        for n_rows in arguments.rows:
            dtype = getattr(torch, arguments.dtype)
            operations = count(method, n_rows, arguments.loss_memory, dtype)
            share = operations.peak / (n_rows * QWEN2 * dtype.itemsize)
            print(f"{method:10}  {n_rows:6}  {operations.total:10}  {share:6.2f}", flush=True)
            if method in arguments.names:
                print("   ", ", ".join(f"{name} {times}" for name, times in operations.counts.most_common()))


if __name__ == "__main__":
    main()
