"""A run's checkpoint becomes a Hugging Face folder that is proven to say what training said."""

from foretune.exporting.export import export_run

__all__ = ["export_run"]
