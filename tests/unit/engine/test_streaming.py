"""States that pass through the device give the bits of states that lie there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    script = Path(__file__).parent / "streamed_steps.py"
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("streamed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_every_share_gives_the_same_bits(trained: dict[str, dict], optimizer: str) -> None:
    """Clipped steps, a save in between: weights and norms of an engine without it."""
    runs = trained[optimizer]["runs"]
    assert runs["0.5"] == runs["0.0"]
    assert runs["1.0"] == runs["0.0"]
    assert trained["adam"]["runs"]["0.0"] != trained["adamw"]["runs"]["0.0"]


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize("way", ["device to host", "host to device", "host to a used engine"])
def test_a_run_goes_on_with_another_share(trained: dict[str, dict], optimizer: str, way: str) -> None:
    assert trained[optimizer]["resumed"][way] == trained[optimizer]["runs"]["0.0"]["digest"]
