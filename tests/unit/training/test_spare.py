"""The warm process: imports without the extras, forks ranks that speak by their exit codes, touches no GPU."""

import json
import subprocess
import sys
from pathlib import Path

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
