"""Device tensors straight into snapshot memory: page-locked, and all copies under way at once.

    torch.save ──▶ archive with holes where tensors go ──▶ each hole filled by a copy from the device, none waited for

`torch.save` fetches one tensor after the other into new pageable memory, 1 to 6 GB/s, and copies that once more into
its file. A page-locked mapping of the file takes what the bus gives (40-50 GB/s over PCIe 5), without the second copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
from types import SimpleNamespace
from typing import Any

import torch

from foretune.checkpoint.files import WholeWrites

#: Bytes locked at a time: some 80 ms, in which the device can be given no work.
_PIECE = 1 << 28
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_PORTABLE = 1  # cudaHostRegisterPortable


class HostWindow:
    """The first `size` bytes of a file in memory, mapped, and page-locked if `device` is a CUDA device.

    Making one takes seconds for many gigabytes (3 GB/s measured) and belongs into a thread of its own.

    Raises:
        OSError: there is not so much memory.
    """

    def __init__(self, descriptor: int, size: int, device: torch.device) -> None:
        os.posix_fallocate(descriptor, 0, size)
        self._map = mmap.mmap(descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device = device
        address, madvise = self._bytes.data_ptr(), ctypes.CDLL(None).madvise  # mmap's own would hold the interpreter
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        for start in range(0, size, _PIECE):
            length = min(_PIECE, size - start)
            madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _POPULATE_WRITE)
            if device.type == "cuda":
                # Where it is refused, copies are slower and as right; the error stays with this thread.
                torch.cuda.cudart().cudaHostRegister(address + start, length, _PORTABLE)  # type: ignore[no-untyped-call]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._bytes)

    def save(self, state: Any, file: WholeWrites) -> None:
        """`torch.save` to where `file` stands, which is the same memory. On return everything is there."""
        start = file.tell()
        archive = _ArchiveWithHoles(file)
        storages: dict[int, torch.UntypedStorage] = {}
        with torch.serialization.skip_data():
            torch.save(state, archive, pickle_module=_noting(storages))  # type: ignore[arg-type]
        filled = [storage for storage in storages.values() if storage.nbytes()]
        sizes = [size for _, size in archive.holes]
        if sizes != [storage.nbytes() for storage in filled]:  # something was pickled that is no tensor of torch's
            file.seek(start)
            return torch.save(state, file)
        end = file.tell()
        for (offset, size), storage in zip(archive.holes, filled, strict=True):
            if offset + size <= self.size:
                self._copy(storage, offset)
            else:
                file.seek(offset)
                file.write(_bytes_of(storage).cpu().numpy())
        file.seek(end)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return None

    def _copy(self, storage: torch.UntypedStorage, offset: int) -> None:
        """In pieces, each within one that is locked: the driver refuses a copy across two."""
        source, done = _bytes_of(storage), 0
        while done < len(source):
            room = _PIECE - (offset + done) % _PIECE
            piece = source[done : done + room]
            self._bytes[offset + done : offset + done + len(piece)].copy_(piece, non_blocking=True)
            done += len(piece)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [bytes], of the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _ArchiveWithHoles:
    """A file that notes what `torch.save` leaves out: (offset, bytes) of each tensor's memory, empty ones aside."""

    def __init__(self, file: WholeWrites) -> None:
        self.write, self.tell, self.flush, self._seek = file.write, file.tell, file.flush, file.seek
        self.holes: list[tuple[int, int]] = []

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR and offset:
            self.holes.append((self.tell(), offset))
        return self._seek(offset, whence)


def _noting(storages: dict[int, torch.UntypedStorage]) -> Any:
    """A stand-in for the module `pickle` whose pickler notes the storages in the order that their holes have."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor):
                storage = obj.untyped_storage()
                storages.setdefault(storage._cdata, storage)
            return NotImplemented

    return SimpleNamespace(__name__="pickle", Pickler=Pickler)
