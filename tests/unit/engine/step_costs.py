"""Trains one tiny model with DeepSpeed as it is and with the shortcuts, in one process; prints what each did as JSON.

Started by test_shortcuts.py, since a process group and DeepSpeed's patches are for a process of their own.
"""

import json
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foretune.config.schema import TrainConfig
from foretune.distributed import leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group

STEPS = 4
TAKE_SHORTCUTS = DeepSpeedEngine._take_shortcuts
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Count(TorchDispatchMode):
    """Counts operations, and the values among them that the host reads from tensors: each would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Model(torch.nn.Module):
    """Two layers, the second of which may be left out: it has no gradient then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)

    def forward(self, input: torch.Tensor, *, whole: bool) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.first(input))
        return self.second(hidden) if whole else hidden


def config_of(stage: int, precision: str, max_grad_norm: float, *, shortcuts: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": shortcuts}
    return config


def run(stage: int, precision: str, optimizer_name: str, *, max_grad_norm: float, shortcuts: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model().to(DEVICE, torch.bfloat16 if precision == "bf16" else torch.float32)
    train = TrainConfig(optimizer=optimizer_name, weight_decay=0.1)
    optimizer = build_optimizer(model.parameters(), train, learning_rate=1e-2)
    config = config_of(stage, precision, max_grad_norm, shortcuts=shortcuts)
    DeepSpeedEngine._take_shortcuts = lambda _: None  # on a GPU the engine takes them by itself
    engine = DeepSpeedEngine(model, optimizer, config, device=DEVICE)
    if shortcuts:
        TAKE_SHORTCUTS(engine)
    norms, applied, reads, operations = [], [], [], []
    for step in range(STEPS):
        for _ in range(2):
            x = torch.randn(8, 16).to(DEVICE, next(model.parameters()).dtype)
            loss = engine(input=x, whole=step != 1).float().square().sum() * 10
            if step == STEPS - 2:
                loss = loss * float("nan")
            engine.backward(loss)
        with Count() as counted:
            result = engine.step(1e-2)
        reads.append(counted.reads)
        operations.append(counted.operations)
        norms.append(result.grad_norm)
        applied.append(result.applied)
    zero = engine._engine.optimizer
    masters = getattr(zero, "fp32_groups_flat_partition", None) or zero.single_partition_of_fp32_groups
    weights = torch.cat([flat.detach().flatten() for flat in masters])
    return {
        "norms": [str(n) for n in norms],
        "applied": applied,
        "reads": reads,
        "operations": operations,
        "weights": weights.tolist(),
    }


def main() -> None:
    open_group(rank_info())
    results = [
        {
            "case": f"zero{stage} {precision} {optimizer} clip {clip}",
            "plain": run(stage, precision, optimizer, max_grad_norm=clip, shortcuts=False),
            "short": run(stage, precision, optimizer, max_grad_norm=clip, shortcuts=True),
        }
        for stage, precision, optimizer, clip in (
            (1, "fp32", "adamw", 1.0),
            (1, "bf16", "adamw", 1.0),
            (1, "bf16", "sgd", 1.0),
            (2, "bf16", "adamw", 1.0),
            (2, "fp32", "adamw", 0.0),
            (2, "fp32", "sgd", 1.0),
        )
    ]
    close_group()
    print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
