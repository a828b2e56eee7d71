"""Commit, verify, fall back: what is complete is whole, and what is not whole is passed over and said."""

from pathlib import Path

import pytest

from foretune.artifacts import Checkpoint
from foretune.checkpoint import layout, store
from foretune.errors import UserError, VerificationFailed


def write(checkpoints: Path, step: int, content: bytes = b"weights", *, held_out_loss: float | None = None) -> Path:
    partial = store.prepare_partial(checkpoints, step)
    (partial / "engine").mkdir()
    (partial / "engine" / "model.pt").write_bytes(content)
    (partial / "rank-00000.pt").write_bytes(b"random state")
    manifest = Checkpoint(
        step=step,
        world_size=1,
        zero_stage=0,
        precision="fp32",
        method="full",
        fingerprint="f",
        train_state={},
        files={},
        held_out_loss=held_out_loss,
    )
    return store.commit(partial, manifest)


def test_a_committed_checkpoint_verifies_and_names_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder.name == "step-00000007"
    assert set(store.verify(folder).files) == {"engine/model.pt", "rank-00000.pt"}
    assert not list(tmp_path.glob(".*partial"))


def damage(folder: Path, how: str) -> None:
    file = folder / "engine" / "model.pt"
    if how == "flipped bit":
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing file":
        file.unlink()
    elif how == "missing manifest":
        (folder / layout.MANIFEST).unlink()
    else:
        (folder / layout.MANIFEST).write_text('{"version": 1')


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "missing file", "missing manifest", "torn manifest"])
def test_a_damaged_one_is_passed_over_and_said(tmp_path: Path, how: str) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    damage(newer, how)
    with pytest.raises(VerificationFailed):
        store.verify(newer)
    said: list[str] = []
    found = store.newest_complete(tmp_path, on_passed_over=said.append)
    assert found is not None
    assert found[0] == older
    assert len(said) == 1
    assert newer.name in said[0]


def test_a_partial_one_does_not_exist(tmp_path: Path) -> None:
    store.prepare_partial(tmp_path, 3)
    assert layout.complete_steps(tmp_path) == []
    assert store.newest_complete(tmp_path) is None


def test_prune_keeps_the_newest_and_sweeps_what_crashes_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    store.prepare_partial(tmp_path, 2)
    store.prune(tmp_path, keep=2)
    assert layout.complete_steps(tmp_path) == [4, 3]
    assert not list(tmp_path.glob(".*partial"))


def test_prune_keeps_the_best_by_held_out_loss_too(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.5, 3: 1.7, 4: None, 5: 1.6, 6: 1.9}
    for step, loss in losses.items():
        write(tmp_path, step, held_out_loss=loss)
        store.prune(tmp_path, keep=2, keep_every=3, keep_best=True)
    assert layout.complete_steps(tmp_path) == [6, 5, 3, 2]
    assert store.best_step(tmp_path) == (2, 1.5)
    damage(layout.folder_of(tmp_path, 2), "torn manifest")
    assert store.best_step(tmp_path) == (5, 1.6)


def test_of_equally_good_ones_the_newer_is_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, held_out_loss=1.5)
    assert store.best_step(tmp_path) == (3, 1.5)
    assert store.best_step(tmp_path / "nothing") is None


def test_a_checkpoint_is_chosen_by_its_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        store.choose(tmp_path)
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert store.choose(tmp_path)[0] == second
    assert store.choose(tmp_path, 1)[0] == first
    with pytest.raises(UserError, match="there are: 2, 1"):
        store.choose(tmp_path, 7)
    damage(first, "flipped bit")
    damage(second, "flipped bit")
    with pytest.raises(VerificationFailed, match="no checkpoint"):
        store.choose(tmp_path)


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 2, b"first")
    folder = write(tmp_path, 2, b"second")
    assert (folder / "engine" / "model.pt").read_bytes() == b"second"
    store.verify(folder)
