"""How often to save: a bound on lost work, as far as it is worth its price."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.checkpoint.interval import SAVING_SHARE
from foretune.config import parse_config
from foretune.planning.mathematics import SAVING_BYTES_PER_SECOND, choose_checkpoint_every

CONFIG = parse_config({"model": "m", "data": "d"})


@given(
    total=st.integers(1, 10_000),
    step_seconds=st.floats(1e-3, 100),
    checkpoint_bytes=st.integers(1, 10**12),
)
def test_saving_never_takes_more_than_its_share_unless_once(
    total: int, step_seconds: float, checkpoint_bytes: int
) -> None:
    every = choose_checkpoint_every(CONFIG, total, step_seconds=step_seconds, checkpoint_bytes=checkpoint_bytes).value
    assert 1 <= every <= total
    save_seconds = checkpoint_bytes / SAVING_BYTES_PER_SECOND
    assert every == total or save_seconds <= SAVING_SHARE * every * step_seconds * (1 + 1e-9)


def test_a_big_model_on_a_fast_device_saves_seldom() -> None:
    decision = choose_checkpoint_every(CONFIG, 1000, step_seconds=0.3, checkpoint_bytes=8_000_000_000)
    assert decision.value == pytest.approx(1000)
    assert "8.0 GB" in decision.reason


def test_a_small_one_saves_ten_times() -> None:
    assert choose_checkpoint_every(CONFIG, 1000, step_seconds=0.3, checkpoint_bytes=4_000_000).value == 100
