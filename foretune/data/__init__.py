"""Data: from files of rows to the batches of each step. `prepare` leaves a folder, `open_loader` reads it.

Importing this loads neither torch nor transformers; `prepare` does when it runs.
"""

from foretune.data.chat_template import load_tokenizer
from foretune.data.loader import Loader, MicroBatch, StepBatch, open_loader
from foretune.data.prepare import prepare

__all__ = ["Loader", "MicroBatch", "StepBatch", "load_tokenizer", "open_loader", "prepare"]
