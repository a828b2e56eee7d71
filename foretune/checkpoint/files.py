"""Files that are written whole."""

from __future__ import annotations

import io
import os
from typing import Any


class WholeWrites(io.FileIO):
    """A raw file whose `write` writes everything: Linux takes 2 GiB at a time and says so, torch does not listen."""

    def write(self, data: Any) -> int:
        """Write all of `data`, bytes-like; its size in bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            left = left[os.write(self.fileno(), left) :]
        return size
