"""Resuming with a part of the optimizer offloaded is exact: DeepSpeed alone forgets the device's share (ZeRO-3)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "partial_offload_steps.py"


@pytest.mark.slow  # the first run compiles CPUAdam: about a minute
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", ["adamw", "adam"])
def test_a_resumed_training_ends_in_the_same_bits(family: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja, in a venv not activated
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), family], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resumed"] == found["whole"]
    assert found["without_replay"] != found["whole"], "DeepSpeed's CPUAdam does not need the replay any more"
    assert found["rates"] == [found["rate"]], "the device's share must follow the schedule too"
    assert found["family"].lower() == family
