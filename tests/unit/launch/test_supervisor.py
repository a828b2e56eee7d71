"""What the launcher gives its ranks besides their orders."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foretune.launch.supervisor import _environment


@pytest.mark.parametrize("own", [None, "/somewhere/else"])
def test_what_torch_compiles_on_a_gpu_is_kept_at_home(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own choice is below /tmp, and importing its compiler already makes it. A user's choice stays."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if own is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
    accelerator = SimpleNamespace(kind="cuda")
    plan: Any = SimpleNamespace(world_size=1, cluster=SimpleNamespace(accelerator=accelerator))
    expected = own or str(tmp_path / ".cache" / "foretune" / "compiled")
    assert _environment(plan)["TORCHINDUCTOR_CACHE_DIR"] == expected


@pytest.mark.parametrize("user", ["root", "some\\one:else", None])
def test_a_place_that_torch_named_is_not_the_users(
    user: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing data imports torch's compiler on some machines: their first start would keep nothing for the second."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    def getuser() -> str:
        if user is None:
            raise OSError("no such user")
        return user

    monkeypatch.setattr("getpass.getuser", getuser)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what torch sets is taken back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    plan: Any = SimpleNamespace(world_size=1, cluster=SimpleNamespace(accelerator=SimpleNamespace(kind="cuda")))
    assert _environment(plan)["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache" / "foretune" / "compiled")


def test_where_home_cannot_be_written_torch_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make the folder as it is imported, and fail."""
    (tmp_path / ".cache").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    plan: Any = SimpleNamespace(world_size=1, cluster=SimpleNamespace(accelerator=SimpleNamespace(kind="cuda")))
    assert "TORCHINDUCTOR_CACHE_DIR" not in _environment(plan)
