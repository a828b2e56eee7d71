"""Trains one tiny model with DeepSpeed as it is and with the shortcuts, in one process; prints what each did as JSON.

Started by test_shortcuts.py, since a process group and DeepSpeed's patches are for a process of their own.
"""

import json
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foretune.config.schema import TrainConfig
from foretune.distributed import rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, deepspeed_engine, open_group
from foretune.engine.shortcuts import apply_shortcuts

STEPS = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class CountReads(TorchDispatchMode):
    """Counts the values that the host reads from tensors: each would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


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
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": shortcuts}
    return config


def run(stage: int, precision: str, optimizer_name: str, *, max_grad_norm: float, shortcuts: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    model = model.to(DEVICE, torch.bfloat16 if precision == "bf16" else torch.float32)
    train = TrainConfig(optimizer=optimizer_name, weight_decay=0.1)
    optimizer = build_optimizer(model.parameters(), train, learning_rate=1e-2)
    config = config_of(stage, precision, max_grad_norm, shortcuts=shortcuts)
    deepspeed_engine.apply_shortcuts = lambda *_: False  # on a GPU the engine applies them by itself
    engine = DeepSpeedEngine(model, optimizer, config, device=DEVICE)
    if shortcuts:
        assert apply_shortcuts(engine._engine.optimizer, optimizer)
    norms, applied, reads = [], [], []
    for step in range(STEPS):
        for _ in range(2):
            x = torch.randn(8, 16).to(DEVICE, next(model.parameters()).dtype)
            loss = engine(input=x).float().square().sum() * 10
            if step == STEPS - 2:
                loss = loss * float("nan")
            engine.backward(loss)
        with CountReads() as counted:
            result = engine.step(1e-2)
        reads.append(counted.reads)
        norms.append(result.grad_norm)
        applied.append(result.applied)
    weights = torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])
    return {"norms": [str(n) for n in norms], "applied": applied, "reads": reads, "weights": weights.tolist()}


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
            (2, "bf16", "adamw", 1.0),
            (2, "fp32", "adamw", 0.0),
            (2, "fp32", "sgd", 1.0),
        )
    ]
    close_group()
    print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main()
