"""Starts the ranks, watches them, and says how it ended. No torch."""

from foretune.launch.supervisor import train

__all__ = ["train"]
