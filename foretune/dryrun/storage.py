"""How many bytes of tensors are alive, phase by phase: counted at every operation, freed when storages are freed.

On fake tensors nothing is allocated: a storage has its size and no memory, so this counts what a real run would take.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of living storages while it is entered.

    Values that the host would read (a norm, a flag of overflow) do not exist on fake tensors: floats read as 0, flags
    as false, other integers as 1, so that no step counts as overflown.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peaks: dict[str, int] = {}
        self._known: set[int] = set()
        self._phase = "start"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this, peaks are counted under `name`."""
        before, self._phase = self._phase, name
        self.peaks[name] = max(self.peaks.get(name, 0), self.live_bytes)
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype.is_floating_point:
                return 0.0
            return False if dtype is torch.bool else int(dtype is not torch.uint8)
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":  # those are notes of a shape, no bytes
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live_bytes += size
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.live_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size
