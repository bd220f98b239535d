"""A device that does not exist, to see on any machine when a host would wait for one.

Its tensors say that they are on `meta`, hold their numbers in host memory, and compute there. What a device would make
the host wait for is noted in `waits`: a value that is read, a shape that depends on values, a copy to the host, and a
copy to the device that is not from pinned memory and non-blocking.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
SHAPE_FROM_VALUES = ("nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class Away(torch.Tensor):
    """A tensor of the stub device."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )

    def __init__(self, here: torch.Tensor):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of StubDevice")


class StubDevice(TorchDispatchMode):
    """While it is in force there is the device `DEVICE`.

    Attributes:
        waits: names of what the host waited for, in order.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self._pinned: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self):
        def pin_memory(tensor):
            self._pinned.add(tensor.untyped_storage().data_ptr())
            return tensor

        self._stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        return super().__enter__()

    def __exit__(self, *args):
        self._stack.close()
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        away = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Away)]
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and torch.device(target) != args[0].device:
            self._note_copy(args[0], kwargs)
        elif away and _waits(name, args, kwargs):
            self.waits.append(name)
        stays = torch.device(target) == DEVICE if target is not None else bool(away)
        if target is not None and stays:
            kwargs["device"] = "cpu"
        here = tree_map(lambda x: x.here if isinstance(x, Away) else x, (args, kwargs))
        result = function(*here[0], **here[1])
        known = {id(tensor.here): tensor for tensor in away}  # what was changed in place is the same tensor still

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else Away(value)

        return tree_map(wrapped, result) if stays else result

    def _note_copy(self, tensor: torch.Tensor, kwargs: dict) -> None:
        if isinstance(tensor, Away):
            self.waits.append("copy to the host")
        elif not kwargs.get("non_blocking") or tensor.untyped_storage().data_ptr() not in self._pinned:
            self.waits.append("copy to the device")


def _waits(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    picks_by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
    return picks_by_mask or name in (*SHAPE_FROM_VALUES, "_local_scalar_dense")
