"""`checkpoint.keep_best`: the held-out loss is measured at every save, and training does not notice."""

from pathlib import Path

import pytest

from foretune import launch
from foretune.artifacts import Plan, RunFolder
from foretune.checkpoint import layout, store
from foretune.config import Config, load_config, to_yaml
from foretune.events import EventKind, read_events
from foretune.pipeline.proof import run_maker
from foretune.proving.cells import Layout
from foretune.proving.digest import losses_digest, state_digest

STEPS, EVERY = 12, 2


def train(run: RunFolder, *, agents: launch.Agents, keep_best: bool) -> RunFolder:
    before = load_config(run.config)
    config = Config(**{**before.model_dump(), "checkpoint": {"every": EVERY, "keep": 1, "keep_best": keep_best}})
    run.config.write_text(to_yaml(config))
    launch.train(run, Plan.read(run.plan), config, agents=agents)
    return run


@pytest.mark.timeout(300)
def test_it_is_kept_and_measuring_changes_no_bit(tmp_path: Path) -> None:
    make = run_maker(None, tmp_path, nproc=2, seed=0, steps=STEPS, every=EVERY)
    agents = launch.Agents()
    try:
        for stage in range(4):
            plain, _, _ = make(Layout(stage), tmp_path / f"plain-{stage}")
            measured, _, _ = make(Layout(stage), tmp_path / f"measured-{stage}")
            train(plain, agents=agents, keep_best=False)
            train(measured, agents=agents, keep_best=True)
            last = layout.folder_of(plain.checkpoints, STEPS)
            assert state_digest(layout.folder_of(measured.checkpoints, STEPS)) == state_digest(last)
            assert losses_digest(measured) == losses_digest(plain)
            assert layout.complete_steps(plain.checkpoints) == [STEPS]
            held_out = {e["step"]: e["loss"] for e in read_events(measured.events) if e["kind"] == EventKind.EVALUATED}
            assert sorted(held_out) == list(range(EVERY, STEPS + 1, EVERY))
            best = min(held_out, key=lambda step: held_out[step])
            assert layout.complete_steps(measured.checkpoints) == sorted({STEPS, best}, reverse=True)
            assert store.best_step(measured.checkpoints) == (best, held_out[best])
            assert (layout.folder_of(measured.checkpoints, best) / layout.REFERENCE).is_file(), "to be exported"
    finally:
        agents.end()
