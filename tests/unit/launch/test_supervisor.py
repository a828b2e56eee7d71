"""What the launcher gives its ranks besides their orders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foretune.launch.supervisor import _environment


@pytest.mark.parametrize("own", [None, "/somewhere/else"])
def test_what_torch_compiles_on_a_gpu_is_kept_at_home(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own choice is below /tmp, and importing its compiler already makes it. A user's choice stays."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if own is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
    accelerator = SimpleNamespace(kind="cuda")
    plan: Any = SimpleNamespace(world_size=1, cluster=SimpleNamespace(accelerator=accelerator))
    expected = own or str(Path.home() / ".cache" / "foretune" / "compiled")
    assert _environment(plan)["TORCHINDUCTOR_CACHE_DIR"] == expected
