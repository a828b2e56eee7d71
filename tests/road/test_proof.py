"""The proof itself: the small matrix on real DeepSpeed, and builds that are broken on purpose, which it must notice."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foretune.launch import Agents
from foretune.pipeline.proof import prove, soak
from foretune.proving.cells import full_matrix, small_matrix
from foretune.proving.verdict import Verdict


def explain(verdict: Verdict) -> str:
    return "\n".join(f"{cell.name}: {cell.problem}" for cell in verdict.cells if not cell.passed)


@pytest.fixture(scope="module")
def agents() -> Iterator[Agents]:
    """Warm processes for all of these tests: each start of them costs as much as two cells."""
    warm = Agents()
    yield warm
    warm.end()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, agents: Agents) -> Verdict:
    return prove(out=tmp_path_factory.mktemp("proof"), agents=agents)


@pytest.mark.timeout(900)
def test_every_cell_recovers_as_expected(small: Verdict) -> None:
    assert small.passed, explain(small)
    assert len(small.cells) >= 24
    for cell in small.cells:
        assert cell.recovered
        assert cell.hash_equal or cell.expects == "within_tolerance"
        assert "File" in cell.traceback, f"{cell.name} has no proof of where it was"


def test_what_is_lost_is_bounded(small: Verdict) -> None:
    """At most what lies between two checkpoints, twice that where the newest one was destroyed as well."""
    for cell in small.cells:
        destroyed = cell.fault in ("flip_bit", "truncate", "delete_manifest", "remove_newest", "no_space")
        assert cell.steps_lost <= (8 if destroyed else 4), cell.name


def test_causes_are_told_apart(small: Verdict) -> None:
    causes = {cell.fault: cell.causes for cell in small.cells}
    assert causes["kill"] == ["killed"]
    assert causes["stop"] == ["hang"]
    assert causes["nan"] == ["non_finite"]
    assert causes["spike"] == ["loss_spike"]
    assert causes["out_of_memory"] == ["device_out_of_memory"]
    assert causes["loader_error"] == ["crashed"]
    assert causes["terminate"] == []


def test_a_build_that_forgets_the_random_states_turns_a_cell_red(tmp_path: Path, agents: Agents) -> None:
    verdict = prove(out=tmp_path, only=["ZeRO-2: kill rank 1 in forward"], broken=["random_state"], agents=agents)
    (cell,) = verdict.cells
    assert cell.recovered
    assert not cell.passed
    assert "loss of step" in (cell.problem or "")


def test_a_build_that_writes_the_manifest_first_turns_a_cell_red(tmp_path: Path, agents: Agents) -> None:
    only = ["ZeRO-2: kill_supervisor in commit"]
    verdict = prove(out=tmp_path, only=only, matrix="full", broken=["manifest_last"], agents=agents)
    (cell,) = verdict.cells
    assert not cell.passed, "a checkpoint that is not whole was taken for one"


def test_the_matrices_cover_what_they_promise() -> None:
    small, full = small_matrix(), full_matrix()
    assert len(small) >= 24
    assert len(full) >= 120
    assert {cell.layout.stage for cell in small} == {0, 1, 2, 3}
    assert {cell.fault for cell in small} == {cell.fault for cell in full}
    kills = [cell for cell in full if cell.fault.startswith("kill") and cell.fault != "kill_supervisor"]
    assert sum(cell.fault == "kill_from_outside" for cell in kills) >= len(kills) / 2
    names = [(cell.name, cell.seed) for cell in full]
    assert len(names) == len(set(names))


def test_the_command_prints_the_matrix_and_its_verdict(tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "foretune",
        "prove",
        "--out",
        str(tmp_path),
        "--only",
        "ZeRO-2: kill rank 0 in data",
    ]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all 1 cells recovered" in done.stdout
    assert "ok   ZeRO-2: kill rank 0 in data: equal to the bit" in done.stderr
    assert json.loads((tmp_path / "prove.json").read_text())["passed"] is True


def test_random_kills_for_a_while_end_in_the_same_bits(tmp_path: Path, agents: Agents) -> None:
    verdict = soak(out=tmp_path, minutes=0.25, seed=1, steps=40, agents=agents)
    assert verdict.passed
    assert verdict.kills >= 2
    assert 0 < verdict.goodput < 1
