"""The commit against a disk that forgets: whatever was not synced may be there, not be there, or be there in part.

A recorder notes what each `fsync` made durable. At a chosen moment the power fails; the disk is then rebuilt with, for
every folder, its synced or its latest entries, and, for every file that was not synced, any part of its content.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretune.artifacts import Checkpoint
from foretune.checkpoint import store

FILES = {"engine/model.pt": b"weights " * 40, "engine/optim.pt": b"moments " * 90, "rank-00000.pt": b"random"}


class PowerCut(BaseException):
    """The machine is gone."""


class ForgetfulDisk:
    """Records what is durable below a folder, and can fail before its n-th operation."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}  # synced, by inode
        self.entries: dict[int, dict[str, int]] = {}  # synced, by the folder's inode
        self.left: int | None = None
        fsync, rename, replace = os.fsync, Path.rename, Path.replace

        def synced(descriptor: int) -> None:
            self._tick()
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_dir():
                self.entries[path.stat().st_ino] = {child.name: child.stat().st_ino for child in path.iterdir()}
            else:
                self.contents[path.stat().st_ino] = path.read_bytes()

        def renamed(source: Path, target: Path) -> Path:
            self._tick()
            return rename(source, target)

        def replaced(source: Path, target: Path) -> Path:
            self._tick()
            return replace(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(Path, "replace", replaced)
        self.sync_all()

    def _tick(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise PowerCut
            self.left -= 1

    def sync_all(self) -> None:
        for path in [self.root, *self.root.rglob("*")]:
            if path.is_dir():
                self.entries[path.stat().st_ino] = {child.name: child.stat().st_ino for child in path.iterdir()}
            else:
                self.contents[path.stat().st_ino] = path.read_bytes()

    def after_the_cut(self, target: Path, choose_latest, choose_share) -> Path:
        """Rebuild what a restarted machine might find. The choices: latest entries? what share of an unsynced file?"""
        latest = {p.stat().st_ino: p for p in [self.root, *self.root.rglob("*")]}
        folders = {inode: {c.name: c.stat().st_ino for c in p.iterdir()} for inode, p in latest.items() if p.is_dir()}
        contents = {inode: p.read_bytes() for inode, p in latest.items() if p.is_file()}

        def build(inode: int, path: Path) -> None:
            if inode in folders or inode in self.entries:
                path.mkdir()
                entries = folders.get(inode, {}) if choose_latest() else self.entries.get(inode, {})
                for name, child in entries.items():
                    build(child, path / name)
                return
            current = contents.get(inode, self.contents.get(inode, b""))
            if self.contents.get(inode) != current:
                current = current[: int(len(current) * choose_share())]
            path.write_bytes(current)

        build(self.root.stat().st_ino, target)
        return target


def write(checkpoints: Path, step: int) -> Path:
    partial = store.prepare_partial(checkpoints, step)
    (partial / "engine").mkdir()
    for name, content in FILES.items():
        (partial / name).write_bytes(content + str(step).encode())
    manifest = Checkpoint(
        step=step, world_size=1, zero_stage=2, precision="fp32", method="full", fingerprint="f", train_state={},
        files={},
    )  # fmt: skip
    return store.commit(partial, manifest)


def step_found(checkpoints: Path) -> int | None:
    """The newest complete checkpoint's step, after making sure that it holds what was written for that step."""
    found = store.newest_complete(checkpoints)
    if found is None:
        return None
    folder, manifest = found
    assert set(manifest.files) == set(FILES)
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content + str(manifest.step).encode()
    return manifest.step


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 14), data=st.data())
def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new(cut: int, data, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        disk = ForgetfulDisk(root, patch)
        write(root / "checkpoints", 1)
        disk.left = cut
        finished = False
        try:
            write(root / "checkpoints", 2)
            finished = True
        except PowerCut:
            pass
        after = disk.after_the_cut(
            root.with_name(root.name + "-after"),
            lambda: data.draw(st.booleans()),
            lambda: data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        )
    assert step_found(after / "checkpoints") in ({2} if finished else {1, 2})


def test_a_commit_has_so_many_chances_to_fail(tmp_path: Path) -> None:
    """The cuts above cover the whole commit: it ends after fewer operations than the largest of them."""
    with pytest.MonkeyPatch.context() as patch:
        disk = ForgetfulDisk(tmp_path, patch)
        write(tmp_path / "checkpoints", 1)
        disk.left = 14
        write(tmp_path / "checkpoints", 2)
        assert 0 < disk.left < 8


def test_the_simulation_notices_a_commit_that_syncs_no_folder(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = ForgetfulDisk(root, patch)
        write(root / "checkpoints", 1)
        patch.setattr(store, "sync_folder", lambda folder: None)
        write(root / "checkpoints", 2)
        after = disk.after_the_cut(tmp_path / "after", lambda: False, lambda: 1.0)
    assert step_found(after / "checkpoints") == 1, "promised, and gone"
