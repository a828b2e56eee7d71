"""Trains a tiny model with a part of the optimizer offloaded, once in one go and once saved and loaded in between.

Started by test_partial_offload.py as ``partial_offload_steps.py FOLDER FAMILY``; prints one JSON line: sha256 of master
weights and states of each training, and the learning rate that each of the optimizers stepped with last. On a CPU
DeepSpeed has no second device to leave a share on, so the first sub-group is told that there is one.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from foretune.checkpoint.snapshot import FolderWriter
from foretune.config.schema import TrainConfig
from foretune.distributed import leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group
from foretune.engine.deepspeed_engine import ENGINE_TAG
from foretune.engine.states.partial_offload import PartialOffload

STEPS, SAVED = 40, 23

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 1,
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 500,
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
    },
    "zero_allow_untested_optimizer": True,
}


def rate(step: int) -> float:
    """A schedule: the learning rate is another one at every step."""
    return 1e-2 / (1 + step)


def build(train: TrainConfig, device: torch.device) -> DeepSpeedEngine:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24))
    optimizer = build_optimizer(module.parameters(), train, learning_rate=1.0, offload_optimizer=0.5)
    engine = DeepSpeedEngine(module, optimizer, CONFIG, device=device)
    zero = engine._engine.optimizer
    assert len(zero.subgroup_to_device) == 3
    zero.subgroup_to_device[0] = "another"
    return engine


def train_steps(engine: DeepSpeedEngine, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 24, generator=generator)
        engine.backward(engine(input=batch).square().mean())
        engine.step(rate(step))


def digest(engine: DeepSpeedEngine) -> str:
    """sha256 over the master weights and every optimizer state, the device's and the host's."""
    zero, found = engine._engine.optimizer, hashlib.sha256()
    for flat in zero.fp32_partitioned_groups_flat:
        found.update(flat.detach().numpy().tobytes())
        states = [owner.state[flat] for owner in (zero.optimizer, zero.backup_optimizer) if flat in owner.state]
        (state,) = states
        found.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
        found.update(str(int(state["step"])).encode())
    return found.hexdigest()


def main() -> None:
    folder, family = Path(sys.argv[1]), sys.argv[2]
    train = TrainConfig(optimizer=family, weight_decay=0.1)
    device = open_group(rank_info())
    whole = build(train, device)
    train_steps(whole, 0, STEPS)
    first = build(train, device)
    train_steps(first, 0, SAVED)
    first.save(FolderWriter(folder))
    results = {"whole": digest(whole)}
    for name in ("resumed", "without_replay"):
        if name == "without_replay":
            PartialOffload._replay_steps = lambda self: None
        second = build(train, device)
        second.load(folder)
        train_steps(second, SAVED, STEPS)
        results[name] = digest(second)
    zero = whole._engine.optimizer
    rates = {group["lr"] for owner in (zero.optimizer, zero.backup_optimizer) for group in owner.param_groups}
    print(
        json.dumps(
            results | {"rates": sorted(rates), "rate": rate(STEPS - 1), "family": type(zero.backup_optimizer).__name__}
        )
    )
    assert (folder / ENGINE_TAG).is_dir()
    close_group()


if __name__ == "__main__":
    main()
    leave()
