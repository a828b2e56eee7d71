"""Starts the ranks, watches them, recovers what fails, and says how it ended. No torch."""

from foretune.launch.agent_process import Agents
from foretune.launch.failures import Cause, Failure
from foretune.launch.supervisor import train

__all__ = ["Agents", "Cause", "Failure", "train"]
