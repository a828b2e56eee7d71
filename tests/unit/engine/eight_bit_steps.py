"""Trains one tiny model with moments of 8 bits, and with fp32 states beside; prints what came out.

Started by test_eight_bits.py, since a process group and DeepSpeed's patches are for a process of their own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from step_costs import DEVICE, config_of
from streamed_steps import LAST, SAVED, SKIPPED, digest, save, steps

from foretune.config.schema import TrainConfig
from foretune.distributed import leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group
from foretune.engine.states import eight_bits
from foretune.engine.states.eight_bits import EightBits

FITTED, RATE = 400, 1e-3


def build(optimizer_name: str, options: EightBits | None, *, bf16_masters: bool = False) -> DeepSpeedEngine:
    """A partition of matrices and one of vectors: whole pieces, a rest, ends within a block."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 301), torch.nn.GELU(), torch.nn.Linear(301, 33))
    train = TrainConfig(optimizer=optimizer_name, weight_decay=0.1)
    model = model.to(DEVICE, torch.bfloat16)
    optimizer = build_optimizer(model.parameters(), train, learning_rate=1e-2)
    config = config_of(1, "bf16", 1.0, shortcuts=True)
    if bf16_masters:
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        config["data_types"] = {"grad_accum_dtype": "bf16"}
        del config["communication_data_type"]
    engine = DeepSpeedEngine(model, optimizer, config, device=DEVICE, eight_bits=options)
    if DEVICE.type == "cpu" and not bf16_masters:
        engine._take_shortcuts()
    return engine


def weights_of(engine: DeepSpeedEngine) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()]).cpu()


def states_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    assert engine._eight_bits is not None
    return engine._eight_bits.state_dict()


def run(folder: Path, name: str) -> dict[str, Any]:
    """Train with a skipped step, save in between, and go on from what was saved: fresh, and over what was there."""
    engine = build(name, EightBits(seed=3))
    norms = steps(engine, 0, SKIPPED)
    before = digest(engine)
    norms += steps(engine, SKIPPED, SKIPPED + 1)
    skipped = digest(engine) == before
    steps_done = [float(part["step"]) for part in states_of(engine)["partitions"].values()]
    steps(engine, SKIPPED + 1, SAVED)
    save(engine, folder / name)
    saved = {path.name: path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()}
    steps(engine, SAVED, LAST)
    resumed = []
    for used in (0, 2):
        again = build(name, EightBits(seed=3))
        steps(again, 0, used)
        again.load(folder / name)
        steps(again, SAVED, LAST)
        resumed.append(digest(again))
    other = build(name, EightBits(seed=4))
    steps(other, 0, LAST)
    return {
        "norms": norms, "skip left all": skipped, "steps done": steps_done, "digest": digest(engine),
        "resumed": resumed, "saved bytes": saved, "other seed": digest(other),
    }  # fmt: skip


def fit(engine: DeepSpeedEngine) -> list[float]:
    """Mean losses of a regression with small steps, in tenths of the training."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(64, 33, generator=generator) / 8
    losses = []
    for _ in range(FITTED):
        x = torch.randn(64, 64, generator=generator)
        y = (x @ truth).to(DEVICE, torch.bfloat16)
        loss = (engine(input=x.to(DEVICE, torch.bfloat16)) - y).float().square().mean()
        engine.backward(loss)
        engine.step(RATE)
        losses.append(float(loss.detach()))
    tenth = FITTED // 10
    return [sum(losses[k : k + tenth]) / tenth for k in range(0, FITTED, tenth)]


def main() -> None:
    folder = Path(sys.argv[1])
    open_group(rank_info())
    result: dict[str, Any] = {
        "fitted": {
            "fp32": fit(build("adamw", None)),
            "8bit": fit(build("adamw", EightBits(seed=3))),
            "bf16": fit(build("adamw", None, bf16_masters=True)),
        }
    }
    eight_bits.PIECE = 4096
    result["runs"] = {name: run(folder, name) for name in ("adamw", "adam")}
    close_group()
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main()
    leave()
