"""QuACK: the versions that are known are used where they can be imported; nothing else that is there breaks."""

import logging
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from foretune.model import quack_kernels


@pytest.fixture(autouse=True)
def _looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without it, whatever this one has; afterwards as before."""
    monkeypatch.setattr(logging.Logger, "__quack_semantic_key__", None, raising=False)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "quack"}
    for name in before:
        del sys.modules[name]
    quack_kernels._kernels.cache_clear()
    yield
    quack_kernels._kernels.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "quack"]:
        del sys.modules[name]
    sys.modules.update(before)


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], *, package: str = "") -> None:
    """Packages of these names and versions, and QuACK's modules with nothing but the names that are used."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "quack").mkdir()
    (folder / "quack" / "__init__.py").write_text(package)
    (folder / "quack" / "gemm_interface.py").write_text("gemm_tuned = gemm_gated = gemm_dgated = None\n")
    (folder / "quack" / "gemm_config.py").write_text("class GemmConfig(dict): pass\n")
    (folder / "quack" / "cross_entropy.py").write_text("def cross_entropy_fwd_out(*tensors): pass\n")
    monkeypatch.syspath_prepend(str(folder))


def test_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", missing)
    assert quack_kernels._kernels() is None
    assert not quack_kernels.takes(torch.zeros(8, 8, dtype=torch.bfloat16))


def test_the_known_versions_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUACK_CACHE_DIR", str(tmp_path))
    installed(tmp_path, monkeypatch, quack_kernels.VERSIONS)
    kernels = quack_kernels._kernels()
    assert (kernels.narrow["tile_n"], kernels.wide["tile_n"]) == (128, 192)


@pytest.mark.parametrize("name", quack_kernels.VERSIONS)
def test_another_version_is_not_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, quack_kernels.VERSIONS | {name: "99.0"})
    with pytest.warns(UserWarning, match=f"{name} 99.0.* is not used"):
        assert quack_kernels._kernels() is None


def test_what_cannot_be_imported_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, quack_kernels.VERSIONS, package="raise OSError('no driver')")
    with pytest.warns(UserWarning, match="no driver"):
        assert quack_kernels._kernels() is None
