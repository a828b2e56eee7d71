"""FlashAttention-4: the version that is known is used where it can be imported; nothing else that is there breaks."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foretune.model import flash_attention_4


@pytest.fixture(autouse=True)
def _looked_for_anew() -> Iterator[None]:
    flash_attention_4._kernels.cache_clear()
    yield
    flash_attention_4._kernels.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, version: str, package: str = "", interface: str = ""
) -> None:
    """A package of that name, version and content."""
    info = folder / f"flash_attn_4-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn-4\nVersion: {version}\n")
    cute = folder / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    if package:
        (folder / "flash_attn" / "__init__.py").write_text(package)
    (cute / "interface.py").write_text(interface)
    monkeypatch.syspath_prepend(str(folder))


def test_it_is_not_there() -> None:
    assert flash_attention_4._kernels() is None
    assert not flash_attention_4.takes(torch.zeros(4, 2, 64))


def test_the_known_version_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, version=flash_attention_4.VERSION, interface="here = True")
    assert flash_attention_4._kernels().here
    assert not flash_attention_4.takes(torch.zeros(4, 2, 64))  # on a CPU


def test_another_version_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, version="5.0", interface="here = True")
    with pytest.warns(UserWarning, match=r"flash-attn-4 5.0 is not used"):
        assert flash_attention_4._kernels() is None


def test_an_older_flash_attn_for_another_torch_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "raise ImportError('flash_attn_2_cuda.so: undefined symbol')"
    installed(tmp_path, monkeypatch, version=flash_attention_4.VERSION, package=broken)
    with pytest.warns(UserWarning, match="undefined symbol"):
        assert flash_attention_4._kernels() is None
