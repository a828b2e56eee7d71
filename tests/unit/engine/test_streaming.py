"""States that pass through the device give the bits of states that lie there."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trained(result_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return result_of("streamed_steps.py", tmp_path_factory.mktemp("streamed"))


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
