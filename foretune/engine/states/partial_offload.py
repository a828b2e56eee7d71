"""Offloading a share of the optimizer's states (ZeRO-3, ``ratio`` below 1): what DeepSpeed leaves undone there.

    flat sub-groups of this rank ──┬─ the first ones stay ─▶ "backup optimizer", on the device
                                   └─ the last `ratio` ────▶ DeepSpeedCPUAdam, in host memory

Read in DeepSpeed 0.19.8 (``runtime/zero/stage3.py``, ``ops/csrc/includes/cpu_adam.h``):

- the backup optimizer's states are in no checkpoint: after a resume its moments would begin at zero;
- it is AdamW whatever was asked for, and its first group never sees the learning rate of a step;
- CPUAdam keeps βᵗ as a running product in float32, but takes ``pow`` after its step number jumped, as it does after
  loading: the last bits differ from those of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from foretune.config.schema import TrainConfig
from foretune.errors import UserError

_FIELD = "plan.offload_optimizer"


def build_cpu_adam(
    groups: list[dict[str, Any]], train: TrainConfig, *, learning_rate: float, offload_optimizer: float
) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam, which DeepSpeed insists on for a partial offload. Compiled once, with g++ (about 60 s).

    Raises:
        UserError: the optimizer is SGD, or there is no compiler.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if train.optimizer == "sgd":
        raise UserError(_FIELD, offload_optimizer, "only Adam can be offloaded in part", "set it to true or false")
    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups,
            lr=learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            adamw_mode=train.optimizer == "adamw",
        )
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            _FIELD,
            offload_optimizer,
            f"a partial offload needs DeepSpeed's CPUAdam, which could not be built: {reason}",
            "install g++ and ninja, or set it to true or false",
        ) from error
    return optimizer


class PartialOffload:
    """The device's share of a ZeRO-3 optimizer that is offloaded in part, and the host's step count.

    Args:
        zero: DeepSpeed's ZeRO-3 optimizer; its backup optimizer is exchanged for one of the family that was asked for.
    """

    @classmethod
    def of(cls, zero: Any) -> PartialOffload | None:
        """None where nothing, or everything, is offloaded."""
        return cls(zero) if hasattr(zero, "backup_optimizer") else None

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        family = torch.optim.AdamW if zero.optimizer.adam_w_mode else torch.optim.Adam
        names = ("lr", "betas", "eps", "weight_decay")
        groups = [{"params": [], **{name: group[name] for name in names}} for group in zero.optimizer.param_groups]
        self._on_device = zero.backup_optimizer = family(groups, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the device's share: DeepSpeed does not set their learning rate."""
        return self._on_device.param_groups

    def state_dict(self) -> dict[int, dict[str, torch.Tensor]]:
        """The device's share: sub-group number → its states (exp_avg, exp_avg_sq, step)."""
        return {number: dict(self._on_device.state[flat]) for number, flat in self._flats() if self._owns(flat)}

    def load_state_dict(self, states: dict[int, dict[str, torch.Tensor]]) -> None:
        """Restore what `state_dict` gave, after DeepSpeed has restored the host's share."""
        for number, flat in self._flats():
            if number in states:
                self._on_device.state[flat] = {key: value.to(flat.device) for key, value in states[number].items()}
        self._replay_steps()

    def _flats(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from enumerate(self._zero.fp32_partitioned_groups_flat)

    def _owns(self, flat: torch.Tensor) -> bool:
        return flat in self._on_device.state

    def _replay_steps(self) -> None:
        """Let CPUAdam multiply its powers of β up to the step that was loaded, on one element that nobody looks at."""
        adam = self._zero.optimizer
        done = max((int(state["step"]) for state in adam.state.values() if "step" in state), default=0)
        beta1, beta2 = adam.param_groups[0]["betas"]
        nothing = [torch.zeros(1) for _ in range(4)]  # parameter, gradient, exp_avg, exp_avg_sq
        for step in range(1, done + 1):
            adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)
