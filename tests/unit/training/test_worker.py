"""What a rank makes ready before it trains."""

from typing import Any

import pytest

from foretune.config import parse_config
from foretune.distributed import RankInfo
from foretune.planning import make_plan, parse_hardware
from foretune.training.worker import _snapshot_bytes


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_snapshots_of_all_ranks_are_one_checkpoint(stage: int, method: str) -> None:
    values: dict[str, Any] = {"model": "gpt2", "data": "d", "method": method, "plan": {"zero_stage": stage}}
    plan = make_plan(parse_config(values), model_folder="gpt2", cluster=parse_hardware("4xcpu"), prepared=None)
    ranks = [RankInfo(rank=rank, local_rank=rank, world_size=4, local_world_size=4) for rank in range(4)]
    sizes = [_snapshot_bytes(plan, rank) for rank in ranks]
    assert sum(sizes) == pytest.approx(plan.predicted.checkpoint_bytes, rel=0.01)
    assert len(set(sizes[1:])) == 1
    weights = 4 * (plan.trainable_parameters if method == "lora" else plan.parameters)
    assert sizes[0] - sizes[1] == (weights if stage < 3 else 0)
