"""Adam's states in host memory, passing through the device: ZeRO 1 with 16-bit weights and fp32 sums.

    host (page-locked)  p m v │ piece k+2 ──▶ slot ──▶ piece k: fused Adam on the device ──▶ slot ──▶ piece k-1 │ p m v
                              └ one copy stream up                  └──▶ 16-bit weights      └ one copy stream down

DeepSpeed's own offload lets the host's cores compute Adam: gradients go down at every micro-batch and come up again to
be added to, master weights travel in pageable memory, and one thing waits for the other (7B on one H100: 4 to 5 s of a
step of 11 s). Here gradients are summed on the device, as without offload. Adam is elementwise, so any piece of its
states can be stepped alone: 12 bytes a parameter go up and 12 come down, at once, while the device computes the pieces
between. What is computed, and its bits, are those of the optimizer that lies on the device.

The first part of every flat partition stays on the device, the share that is offloaded follows. A checkpoint has both
in one tensor, as without offload, so a run may go on with another share.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch

from foretune.engine.states.masters import (
    MOMENTS,
    call_before_step,
    decays_apart,
    gather_weights,
    weights_of,
    without_memory,
)

#: Elements of a piece: 3 x 128 MiB in fp32, some 3 ms each way, long enough that starting a copy does not count.
PIECE = 1 << 25
#: Pieces on the device at a time: one that comes, one that is computed, one that goes.
SLOTS = 3
#: Where a partition is cut, in elements: kernels compute whole vectors on either side.
_ALIGNMENT = 1024


@dataclass
class _Flat:
    """One flat fp32 partition of DeepSpeed's: elements [0, cut) on the device, [cut, n) in host memory."""

    parameter: torch.nn.Parameter  # what DeepSpeed and the optimizer hold; between steps without memory of its own
    index: int  # of the optimizer's group, which is another object after a load
    low: torch.Tensor  # 16-bit weights [n], on the device
    cut: int
    near: list[torch.Tensor]  # master weights, exp_avg, exp_avg_sq on the device, [cut] each
    far: list[torch.Tensor] = field(default_factory=list)  # the same in host memory, [n] each; [cut, n) is what counts
    step: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # steps done, fp32 [] on the device


@dataclass(frozen=True)
class _Piece:
    flat: _Flat
    start: int
    stop: int


class StreamedStates:
    """Keeps master weights and Adam's states of a `BF16_Optimizer` in host memory, and steps them piece by piece.

    Args:
        zero_optimizer: DeepSpeed's wrapper, built within `WithoutMasters`.
        optimizer: the fused Adam or AdamW inside.
        share: of every partition, that lies in host memory, 0 to 1.
        piece: elements that travel at a time.
    """

    def __init__(
        self, zero_optimizer: Any, optimizer: torch.optim.Optimizer, *, share: float, piece: int = PIECE
    ) -> None:
        self._zero, self._optimizer = zero_optimizer, optimizer
        self._flats = [self._take(index, share) for index in range(len(zero_optimizer.fp32_groups_flat_partition))]
        self._pieces = [
            _Piece(flat, start, min(start + piece, flat.parameter.numel()))
            for flat in self._flats
            for start in range(flat.cut, flat.parameter.numel(), piece)
        ]
        longest = max((one.stop - one.start for one in self._pieces), default=0)
        device = self._flats[0].low.device
        self._ferry = _Ferry([[torch.empty(longest, device=device) for _ in range(3)] for _ in range(SLOTS)])
        self._ready = self._coming = False
        optimizer.step = self.step  # type: ignore[assignment,method-assign]
        self._write_back = zero_optimizer.update_lp_params
        zero_optimizer.update_lp_params = self._gather_weights
        self._weights_written = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of Adam over all partitions, and the 16-bit weights from the new master weights."""
        assert closure is None
        call_before_step(self._optimizer)
        self._prepare()
        if not self._coming:
            self._send_first()
        for flat in self._flats:
            flat.step += 1
            self._update(flat, flat.near, 0, flat.cut)
        for number, piece in enumerate(self._pieces):
            slot = self._ferry.arrived(number, piece.stop - piece.start)
            self._update(piece.flat, slot, piece.start, piece.stop)
            self._ferry.send_down(number, self._host(piece))
            if number + SLOTS < len(self._pieces):
                self._ferry.send_up(number + SLOTS, self._host(self._pieces[number + SLOTS]))
        if self._found_inf is not None:  # then this was no step
            for flat in self._flats:
                flat.step -= self._found_inf
        self._weights_written = True
        self._send_first()  # for the next step: there before it begins

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within this, every partition and its states are whole, in host memory; changes count (to save, to load)."""
        self._ferry.wait()
        self._coming = False
        for flat in self._flats:
            self._make_moments(flat)
            for near, far in zip(flat.near, flat.far, strict=False):
                far[: flat.cut].copy_(near)
            flat.parameter.data = flat.far[0]
        try:
            yield
        finally:
            for flat in self._flats:
                self._adopt(flat)
                flat.parameter.data = without_memory(flat.parameter.numel(), flat.low.device)

    def _take(self, index: int, share: float) -> _Flat:
        """Make a partition's master weights where they belong; states follow at the first step."""
        zero = self._zero
        parameter: torch.nn.Parameter = zero.fp32_groups_flat_partition[index]
        low, n = weights_of(zero, index), parameter.numel()
        cut = min(n, -(-int((1.0 - share) * n) // _ALIGNMENT) * _ALIGNMENT)
        master = _host_zeros(n)
        for start in range(cut, n, PIECE):  # widened on the device, a piece at a time
            master[start : start + PIECE].copy_(low[start : start + PIECE].float())
        return _Flat(
            parameter,
            index,
            low,
            cut,
            near=[low[:cut].float()],
            far=[master],
            step=torch.zeros((), device=parameter.device),
        )

    def _prepare(self) -> None:
        """Before the first step: zeros for states that no checkpoint gave, and page-locked memory."""
        if self._ready:
            return
        for flat in self._flats:
            self._make_moments(flat)
            for far in flat.far:
                _lock_pages(far, flat.cut, flat.low.device)
        self._ready = True

    def _make_moments(self, flat: _Flat) -> None:
        """Zeros, where there are none yet."""
        if len(flat.far) == 1:
            flat.near += [torch.zeros(flat.cut, device=flat.low.device) for _ in MOMENTS]
            flat.far += [_host_zeros(flat.parameter.numel()) for _ in MOMENTS]
            self._show(flat)

    def _adopt(self, flat: _Flat) -> None:
        """Take over what stands in the optimizer's state: it was loaded, or is what was there before."""
        state = self._optimizer.state.get(flat.parameter, {})
        for number, name in enumerate(MOMENTS, 1):
            self._keep(flat, number, state.pop(name, None))
        flat.near = [far[: flat.cut].to(flat.low.device, copy=True) for far in flat.far]
        flat.step = state.get("step", torch.zeros(())).to(flat.low.device, torch.float32, copy=True)
        self._show(flat)

    @staticmethod
    def _keep(flat: _Flat, number: int, state: torch.Tensor | None) -> None:
        """Copy a state into memory that is ours alone: what was loaded may share pages, which can't be locked then."""
        if state is None:  # saved before the first step
            flat.far[number].zero_()
        elif state is not flat.far[number]:
            flat.far[number].copy_(state)

    def _show(self, flat: _Flat) -> None:
        """Let the optimizer's state, which DeepSpeed saves, name the host's tensors."""
        self._optimizer.state[flat.parameter] = {"step": flat.step, **dict(zip(MOMENTS, flat.far[1:], strict=True))}

    def _update(self, flat: _Flat, states: list[torch.Tensor], start: int, stop: int) -> None:
        """Adam's kernel on elements [start, stop) of a partition, and their 16-bit weights."""
        if start == stop:
            return
        group, gradient = self._optimizer.param_groups[flat.index], flat.parameter.grad
        assert gradient is not None
        kernel = torch._fused_adamw_ if decays_apart(self._optimizer, group) else torch._fused_adam_
        master, exp_avg, exp_avg_sq = states
        beta1, beta2 = group["betas"]
        kernel(
            [master], [gradient[start:stop]], [exp_avg], [exp_avg_sq], [], [flat.step],
            amsgrad=False, lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=group["maximize"], grad_scale=getattr(self._optimizer, "grad_scale", None),
            found_inf=self._found_inf,
        )  # fmt: skip
        flat.low[start:stop].copy_(master)

    @property
    def _found_inf(self) -> torch.Tensor | None:
        """1 where the kernel is to leave everything as it is, as torch's own optimizers are told."""
        found: torch.Tensor | None = getattr(self._optimizer, "found_inf", None)
        return found

    def _host(self, piece: _Piece) -> list[torch.Tensor]:
        return [far[piece.start : piece.stop] for far in piece.flat.far]

    def _send_first(self) -> None:
        for number, piece in enumerate(self._pieces[:SLOTS]):
            self._ferry.send_up(number, self._host(piece))
        self._coming = True

    def _gather_weights(self) -> None:
        """In place of `update_lp_params`: this rank's 16-bit weights are written already, unless they were loaded."""
        if not self._weights_written:
            with self.whole():
                self._write_back()
            return
        self._weights_written = False
        gather_weights(self._zero)


class _Ferry:
    """Copies pieces between host and slots on the device, each way on a stream of its own; on a CPU, at once.

    Piece number n uses slot n mod `SLOTS`. A copy up waits until the slot's last piece has gone down, a computation
    until its piece is there, a copy down until it is computed. The host waits for none of them.
    """

    def __init__(self, slots: list[list[torch.Tensor]]) -> None:
        self._slots = slots
        self._cuda = slots[0][0].device.type == "cuda"
        if self._cuda:
            self._up, self._down = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._there = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]
            self._free = [torch.cuda.Event() for _ in slots]  # type: ignore[no-untyped-call]

    def send_up(self, number: int, host: list[torch.Tensor]) -> None:
        """Begin to copy a piece to the device."""
        index = number % SLOTS

        def copy() -> None:
            for near, far in zip(self._slots[index], host, strict=True):
                near[: far.numel()].copy_(far, non_blocking=True)

        if not self._cuda:
            return copy()
        with torch.cuda.stream(self._up):
            self._up.wait_event(self._free[index])  # not recorded yet: nothing to wait for
            copy()
            self._there[index].record()
        return None

    def arrived(self, number: int, size: int) -> list[torch.Tensor]:
        """The piece on the device; what is computed from now on waits for it."""
        index = number % SLOTS
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._there[index])
        return [near[:size] for near in self._slots[index]]

    def send_down(self, number: int, host: list[torch.Tensor]) -> None:
        """Begin to copy a piece back, once what has been asked of the device until now is done."""
        index = number % SLOTS

        def copy() -> None:
            for near, far in zip(self._slots[index], host, strict=True):
                far.copy_(near[: far.numel()], non_blocking=True)

        if not self._cuda:
            return copy()
        self._down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._down):
            copy()
            self._free[index].record()
        return None

    def wait(self) -> None:
        """Until no copy is under way."""
        if self._cuda:
            self._up.synchronize()
            self._down.synchronize()


def _host_zeros(numel: int) -> torch.Tensor:
    """fp32 [numel] in host memory, of which only what is used exists; in large pages, which are locked faster."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, 4 * numel, flags=flags)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def _lock_pages(tensor: torch.Tensor, start: int, device: torch.device) -> None:
    """Page-lock a tensor's memory from element `start` on, where it lies, so that copies run beside everything else.

    `Tensor.pin_memory` would copy it, and rounds sizes up to a power of two.
    """
    part = tensor[start:]
    if device.type != "cuda" or part.numel() == 0 or part.is_pinned():
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(part.data_ptr(), part.nbytes, 0))
    finalize(tensor, runtime.cudaHostUnregister, part.data_ptr()).atexit = False  # the end of the process does it
