"""Trains one tiny model with Adam's states on the device and with shares of them in host memory; prints hashes.

Started by test_streaming.py, since a process group and DeepSpeed's patches are for a process of their own. Pieces are
so small that every slot is used several times.
"""

import hashlib
import json
import mmap
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from step_costs import DEVICE, config_of

from foretune.config.schema import TrainConfig
from foretune.distributed import leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group
from foretune.engine.states import streaming
from foretune.engine.states.streaming import StreamedStates

SAVED, LAST, SKIPPED = 4, 7, 2  # a gradient that is not finite must leave everything as it is, the step count too


class PageLock:
    """Stands in for `cudaHostRegister`, which refuses a range if another that is locked has a page of it."""

    def __init__(self) -> None:
        self.locked: list[tuple[int, int, torch.Tensor]] = []  # held, so that no address comes twice

    def __call__(self, tensor: torch.Tensor, start: int, device: torch.device) -> None:
        part = tensor[start:]
        first, stop = part.data_ptr(), part.data_ptr() + part.nbytes
        if part.numel() == 0 or any(a <= first and stop <= b for a, b, _ in self.locked):  # `is_pinned`
            return
        first, stop = first - first % mmap.PAGESIZE, stop + -stop % mmap.PAGESIZE
        assert all(stop <= a or b <= first for a, b, _ in self.locked), "a page is locked already"
        assert first == part.data_ptr(), "the first page is shared with other memory"
        self.locked.append((first, stop, tensor))


def build(share: float, optimizer_name: str) -> DeepSpeedEngine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 301), torch.nn.GELU(), torch.nn.Linear(301, 33))
    model = model.to(DEVICE, torch.bfloat16)
    train = TrainConfig(optimizer=optimizer_name, weight_decay=0.1)
    optimizer = build_optimizer(model.parameters(), train, learning_rate=1e-2)
    config = config_of(1, "bf16", 1.0, shortcuts=True) | {"communication_data_type": "fp32"}
    engine = DeepSpeedEngine(model, optimizer, config, device=DEVICE, streamed_share=share)
    if DEVICE.type == "cpu":
        engine._take_shortcuts()
    return engine


def steps(engine: DeepSpeedEngine, first: int, last: int) -> list[float]:
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):
            x = torch.randn(8, 64, generator=generator).to(DEVICE, torch.bfloat16)
            factor = float("nan") if step == SKIPPED else 10
            engine.backward(engine(input=x).float().square().sum() * factor)
        norms.append(engine.step(1e-2 / (1 + step)).grad_norm)  # a schedule: the rate is another at every step
    return norms


def digest(engine: DeepSpeedEngine) -> str:
    weights = torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])
    return hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()


def save(engine: DeepSpeedEngine, folder: Path) -> None:
    def write(path: str, state: Any) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / path)

    engine.save(write)


def run(folder: Path, share: float, optimizer_name: str) -> dict[str, Any]:
    """Train, saving in between; then take the other's checkpoint and train to the end again."""
    engine = build(share, optimizer_name)
    norms = steps(engine, 0, SAVED)
    save(engine, folder / optimizer_name / str(share))
    norms += steps(engine, SAVED, LAST)
    return {"norms": norms, "digest": digest(engine)}


def resume(folder: Path, share: float, optimizer_name: str, *, saved_by: float, used: bool) -> str:
    engine = build(share, optimizer_name)
    if used:  # what was there must be gone
        steps(engine, 0, 2)
    engine.load(folder / optimizer_name / str(saved_by))
    steps(engine, SAVED, LAST)
    return digest(engine)


def main() -> None:
    folder = Path(sys.argv[1])
    open_group(rank_info())
    if DEVICE.type == "cpu":
        streaming._lock_pages = PageLock()
    StreamedStates.__init__ = partialmethod(StreamedStates.__init__, piece=4096)
    result = {
        name: {
            "runs": {share: run(folder, share, name) for share in (0.0, 0.5, 1.0)},
            "resumed": {
                "device to host": resume(folder, 0.7, name, saved_by=0.0, used=False),
                "host to device": resume(folder, 0.0, name, saved_by=0.5, used=False),
                "host to a used engine": resume(folder, 0.3, name, saved_by=0.5, used=True),
            },
        }
        for name in ("adamw", "adam")
    }
    close_group()
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main()
    leave()
