"""The seam: silent when nothing is armed, once when something is, with a proof of where."""

import errno
from pathlib import Path

import pytest

from foretune.faults import ALL_RANKS, NO_FAULTS, Fault, Faults, InjectedError, fired_mark, write_faults


def armed(path: Path, *faults: Fault, rank: int = 0) -> Faults:
    write_faults(path, faults)
    return Faults(path, rank=rank)


def test_nothing_armed_does_nothing() -> None:
    assert not NO_FAULTS.armed
    NO_FAULTS.fire("forward", 3)
    assert not NO_FAULTS.distorts("nan", 3)
    assert not NO_FAULTS.is_broken("random_state")


def test_it_fires_at_its_point_step_and_rank_once_over_all_launches(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    faults = armed(file, Fault("raise", "forward", 3, rank=1), rank=1)
    faults.fire("backward", 3)
    faults.fire("forward", 2)
    Faults(file, rank=0).fire("forward", 3)
    with pytest.raises(InjectedError, match="step 3"):
        faults.fire("forward", 3)
    assert "test_faults.py" in fired_mark(file, 0).read_text(), "the stack of the victim"
    Faults(file, rank=1).fire("forward", 3)  # the next launch


def test_a_full_disk_looks_like_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        armed(tmp_path / "f", Fault("no_space", "commit", 3)).fire("commit", 3)
    assert error.value.errno == errno.ENOSPC


def test_a_distortion_lasts_for_its_step_on_every_rank_it_names(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_faults(file, [Fault("spike", "forward", 3, rank=ALL_RANKS)])
    for rank in (0, 1):
        faults = Faults(file, rank=rank)
        assert faults.distorts("spike", 3)
        assert faults.distorts("spike", 3)
        assert not faults.distorts("spike", 4)
        faults.fire("forward", 3)  # a distortion is nothing that happens by itself
