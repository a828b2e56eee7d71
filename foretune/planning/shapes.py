"""Public models by their hub name, so that a plan needs no network: the keys of their config.json that shape them."""

from __future__ import annotations

from foretune.model.shape import ModelShape


def known_shape(name: str) -> ModelShape | None:
    """The shape of a public model, by hub name with or without its owner; None if the table lacks it."""
    return None
