"""Data: from files of rows to the batches of each step. `prepare` leaves a folder, `open_loader` reads it.

Importing this loads neither torch nor transformers; `prepare` does when it runs.
"""

from foretune.data.loader import Loader, MicroBatch, StepBatch, open_loader
from foretune.data.prepare import load_tokenizer, prepare

__all__ = ["Loader", "MicroBatch", "StepBatch", "load_tokenizer", "open_loader", "prepare"]
