"""Foreign errors become ours with the cause that the supervisor acts on."""

import pytest
import torch

from foretune.engine.deepspeed_engine import translated_errors
from foretune.errors import MachineFault

NCCL = """NCCL error in: /pytorch/NCCLUtils.cpp:93, unhandled cuda error, NCCL version 2.28.9
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
"""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "device_out_of_memory"),
        (RuntimeError("CUDA out of memory, said by a kernel"), "device_out_of_memory"),
        (torch.distributed.DistBackendError(NCCL + "Failed to CUDA calloc async 24 bytes"), "device_out_of_memory"),
        (torch.distributed.DistBackendError(NCCL + "Cuda failure 'out of memory'"), "device_out_of_memory"),
        (torch.distributed.DistBackendError(NCCL + "socket closed"), "communication"),
        (RuntimeError("[gloo] Connection closed by peer"), "communication"),
    ],
)
def test_the_cause_is_named(error: Exception, kind: str) -> None:
    with pytest.raises(MachineFault) as raised, translated_errors():
        raise error
    assert raised.value.kind == kind


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="disk"), translated_errors():
        raise OSError("disk")
