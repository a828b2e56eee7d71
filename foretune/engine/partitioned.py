"""Loading a model so that no rank ever holds the whole of it (ZeRO stage 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Within this, transformers' ``from_pretrained`` and ``from_config`` partition every parameter as it is made.

    Goes through transformers' own integration: a bare ``zero.Init`` around ``from_config`` gives wrongly initialised
    weights. Does nothing below stage 3. The process group must be open.
    """
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    # Imported before the context is entered: inside, the import itself fails with a signature mismatch.
    import torch._dynamo  # noqa: F401
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    reference = HfDeepSpeedConfig(deepspeed_config)  # transformers keeps only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del reference
