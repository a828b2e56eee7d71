"""The warm process: imports without the extras, forks ranks that speak by their exit codes, touches no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foretune.training.spare_process import Spare

SCRIPT = """
import sys
sys.modules["tensorboard"] = None  # as where the extra is not installed
sys.argv = ["spare", {run!r}]
from foretune.training import worker
worker.main = lambda arguments: int(arguments[0])
from foretune.training import spare
spare.main()
"""


def test_it_says_ready_and_forks_ranks_that_end_with_their_codes(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(run=str(tmp_path))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        ranks = [{"environment": {"RANK": str(rank)}, "arguments": [str(code)]} for rank, code in enumerate((0, 7))]
        process.stdin.write(json.dumps({"ranks": ranks}) + "\n")
        process.stdin.flush()
        started = json.loads(process.stdout.readline())["started"]
        ended = dict(json.loads(process.stdout.readline())["exited"] for _ in range(2))
        assert ended == {started[0]: 0, started[1]: 7}
    finally:
        process.stdin.close()
        assert process.wait(20) == 0, "it ends when nobody can tell it anything any more"
        process.stdout.close()


def test_the_agent_does_not_import_torch_before_it_starts_the_spare() -> None:
    """Both import at a time then: a start was 3 s longer where the agent's torch came first."""
    code = "import sys, foretune.training.agent; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_spare_that_ends_while_it_imports_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    spare = Spare(str(tmp_path))
    with pytest.raises(RuntimeError, match="ended with 7"):
        spare.wait_until_ready()
    for pipe in (spare._process.stdin, spare._process.stdout):
        assert pipe is not None
        pipe.close()


LATE = """
import json, sys
from pathlib import Path
import torch
from foretune.config.schema import TrainConfig
from foretune.distributed import leave, rank_info
from foretune.training.spare import _import_all
_import_all(Path(sys.argv[1]))
from transformers import LlamaForCausalLM  # as the plan's model class would be
before = set(sys.modules)
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group
device = open_group(rank_info())
module = torch.nn.Linear(8, 8)
config = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
    "zero_optimization": {"stage": 2, "overlap_comm": False}, "zero_allow_untested_optimizer": True,
}
optimizer = build_optimizer(module.parameters(), TrainConfig(), learning_rate=0.1)
engine = DeepSpeedEngine(module, optimizer, config, device=device)
engine.backward(engine(input=torch.ones(1, 8)).sum())
engine.step(0.1)
print(json.dumps(sorted(set(sys.modules) - before)))
close_group()
leave()
"""


def test_a_fork_comes_to_its_first_step_without_late_imports(tmp_path: Path) -> None:
    """torch's compiler, which DeepSpeed's first step wanted, took each rank 3 s and more at every start."""
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    late = json.loads(done.stdout.splitlines()[-1])
    assert len(late) < 20, late
