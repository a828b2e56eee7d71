"""Adam with moments of 8 bits and no master weights: ZeRO 1 with 16-bit weights and fp32 sums, for those who allow it.

    fp32 sums ─┐
    moments    ├─▶ Adam in fp32, a piece of the partition at a time ─┬─▶ moments, 8 bits in blocks of 256
    weights    ┘                                                     └─▶ weights, bf16, rounded by chance

A parameter takes 2.03 bytes beside weight and sum instead of 12: 8 in all, so the 7B shape is planned whole on one card
of 80 GB with nothing on the host. Moments lose digits (`foretune.engine.states.blocks`: about 1 %); weights have no
digits beyond bf16, so each step rounds them up or down by chance, which keeps the mean of many small updates. Neither
is what fp32 gives. 8-bit moments: Dettmers et al. 2022; bf16 weights with stochastic rounding: Zamirai et al. 2020,
"Revisiting BFloat16 Training".

The chance is drawn from the run's seed, the rank and the number of the step alone, so a run that goes on from a
checkpoint has the bits of one that was never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from foretune.engine.states.blocks import BLOCK, Code, code, pack, round_by_chance, unpack
from foretune.engine.states.masters import MOMENTS, call_before_step, decays_apart, gather_weights, weights_of

#: Elements that are stepped at a time: what is fp32 for a moment takes some 40 bytes of each where nothing is fused.
PIECE = 1 << 24
#: What `_advance` reads as one tensor, in this order.
_NUMBERS = ("rate", "decay", "beta1", "beta2", "epsilon", "grad_scale", "found_inf", "correction1", "correction2")
_Moment = tuple[torch.Tensor, torch.Tensor]  # uint8 [n], scales fp32 [n / BLOCK]


@dataclass(frozen=True)
class EightBits:
    """How moments of 8 bits are stepped.

    Attributes:
        seed: of the run.
        compiled: whether the kernels of a piece are fused by torch's compiler: some seconds at the first step, a
            fraction of the memory traffic.
    """

    seed: int
    compiled: bool = False


@dataclass
class _Flat:
    """One flat partition of this rank's.

    Attributes:
        index: of the optimizer's group, which is another object after a load.
        parameter: what DeepSpeed and the optimizer hold, without memory of its own. Its checkpoints have it so.
        low: 16-bit weights [n].
        moments: exp_avg and exp_avg_sq, each (uint8 [m], scales fp32 [m / `BLOCK`]), m: n up to whole blocks.
        step: steps done, fp32 [].
    """

    index: int
    parameter: torch.nn.Parameter
    low: torch.Tensor
    moments: list[_Moment]
    step: torch.Tensor


class EightBitStates:
    """Steps the 16-bit weights of a `BF16_Optimizer` with moments of 8 bits.

    Args:
        zero_optimizer: DeepSpeed's wrapper, built within `WithoutMasters`.
        optimizer: the fused Adam or AdamW inside, which says how; its own states stay empty.
        options: seed, and whether to compile.
    """

    def __init__(self, zero_optimizer: Any, optimizer: torch.optim.Optimizer, options: EightBits) -> None:
        self._zero, self._optimizer, self._seed = zero_optimizer, optimizer, options.seed
        self._tried = 0  # steps that were asked for, in checkpoints: the same number draws the same chances
        self._flats = [self._take(index) for index in range(len(zero_optimizer.fp32_groups_flat_partition))]
        device = self._flats[0].low.device
        self._codes = code(device, signed=True), code(device, signed=False)
        self._generator = torch.Generator(device)
        self._advance: Callable[..., None] = torch.compile(_advance, dynamic=False) if options.compiled else _advance
        optimizer.step = self.step  # type: ignore[assignment,method-assign]
        zero_optimizer.update_lp_params = lambda: gather_weights(zero_optimizer)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step over all partitions; a gradient that is not finite (``found_inf``) leaves everything as it is."""
        assert closure is None
        call_before_step(self._optimizer)
        rank = torch.distributed.get_rank()
        drawn = hashlib.blake2b(f"{self._seed} {rank} {self._tried}".encode(), digest_size=7).digest()
        self._generator.manual_seed(int.from_bytes(drawn))
        self._tried += 1
        for flat in self._flats:
            flat.step += 1
            by_name, numbers, decoupled = self._numbers(flat)
            for start in range(0, flat.low.numel(), PIECE):
                self._update(flat, start, numbers, decoupled=decoupled)
            flat.step -= by_name["found_inf"]

    def state_dict(self) -> dict[str, Any]:
        """This rank's moments and counts: partition number → name → tensors."""
        partitions = {
            number: {"step": flat.step, **dict(zip(MOMENTS, flat.moments, strict=True))}
            for number, flat in enumerate(self._flats)
        }
        return {"tried": self._tried, "partitions": partitions}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._tried = states["tried"]
        for number, flat in enumerate(self._flats):
            saved = states["partitions"][number]
            flat.step.copy_(saved["step"])
            for moment, name in zip(flat.moments, MOMENTS, strict=True):
                for mine, loaded in zip(moment, saved[name], strict=True):
                    mine.copy_(loaded)

    def _take(self, index: int) -> _Flat:
        parameter: torch.nn.Parameter = self._zero.fp32_groups_flat_partition[index]
        low = weights_of(self._zero, index)
        blocks = -(-low.numel() // BLOCK)
        moments = [  # scales of zero: all values are zero, whatever the bytes
            (
                torch.zeros(BLOCK * blocks, dtype=torch.uint8, device=low.device),
                torch.zeros(blocks, device=low.device),
            )
            for _ in MOMENTS
        ]
        return _Flat(index, parameter, low, moments, torch.zeros((), device=low.device))

    def _numbers(self, flat: _Flat) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
        """(`_NUMBERS` by name, the same as one fp32 tensor, whose new values compile nothing anew; AdamW or Adam)."""
        optimizer, group = self._optimizer, self._optimizer.param_groups[flat.index]
        assert not group["maximize"]
        known = [float(group["lr"]), group["weight_decay"], *group["betas"], group["eps"], 1.0, 0.0, 0.0, 0.0]
        together = torch.tensor(known).to(flat.low.device, non_blocking=True)
        by_name = dict(zip(_NUMBERS, together.unbind(), strict=True))
        for name in ("grad_scale", "found_inf"):
            if (value := getattr(optimizer, name, None)) is not None:
                by_name[name].copy_(value)
        for name, beta in (("correction1", "beta1"), ("correction2", "beta2")):
            by_name[name].copy_(1.0 - by_name[beta] ** flat.step)
        return by_name, together, decays_apart(optimizer, group)

    def _update(self, flat: _Flat, start: int, numbers: torch.Tensor, *, decoupled: bool) -> None:
        """Step the elements of a partition from `start` on, `PIECE` of them or what is left."""
        gradient = flat.parameter.grad
        assert gradient is not None
        low, gradient = flat.low[start : start + PIECE], gradient[start : start + PIECE]
        blocks = slice(start // BLOCK, (start + PIECE) // BLOCK)
        first, second = ((packed[start : start + PIECE], scales[blocks]) for packed, scales in flat.moments)
        missing = -low.numel() % BLOCK  # the end of a partition, which DeepSpeed does not align to blocks
        weights = F.pad(low, (0, missing)) if missing else low
        gradient = F.pad(gradient, (0, missing)) if missing else gradient
        noise = torch.empty(weights.shape, dtype=torch.int16, device=low.device)
        noise.random_(-(1 << 15), 1 << 15, generator=self._generator)
        # Whatever has another length than a whole piece would be compiled for itself.
        advance = self._advance if low.numel() == PIECE else _advance
        advance(weights, gradient, first, second, noise, numbers, self._codes, decoupled=decoupled)
        if missing:
            low.copy_(weights[: low.numel()])


def _advance(  # noqa: PLR0917 (what a compiler takes as one graph)
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: _Moment,
    exp_avg_sq: _Moment,
    noise: torch.Tensor,
    numbers: torch.Tensor,
    codes: tuple[Code, Code],
    *,
    decoupled: bool,
) -> None:
    """Adam on one piece, in place (Kingma and Ba 2015, algorithm 1; decoupled: Loshchilov and Hutter 2019).

    weights bf16 [n], gradient fp32 [n], noise int16 [n], numbers: see `EightBitStates._numbers`.
    """
    rate, decay, beta1, beta2, epsilon, grad_scale, found_inf, correction1, correction2 = numbers.unbind()
    signed, unsigned = codes
    wide, gradient = weights.float(), gradient / grad_scale
    if decoupled:
        wide = wide * (1.0 - rate * decay)
    else:
        gradient = gradient + decay * wide
    first = beta1 * unpack(*exp_avg, signed) + (1.0 - beta1) * gradient
    second = beta2 * unpack(*exp_avg_sq, unsigned) + (1.0 - beta2) * gradient * gradient
    wide = wide - rate * (first / correction1) / ((second / correction2).sqrt() + epsilon)
    skip, old = found_inf > 0, (weights, *exp_avg, *exp_avg_sq)
    new = (round_by_chance(wide, noise), *pack(first, signed), *pack(second, unsigned))
    for before, after in zip(old, new, strict=True):
        before.copy_(torch.where(skip, before, after))
