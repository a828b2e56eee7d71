"""Becomes torchrun's agent, after asking the kernel to end it with its parent.

    python -m foretune.launch.child ARGS

The request survives exec, so an agent whose supervisor was killed never trains on alone.
"""

from __future__ import annotations

import os
import sys

from foretune.distributed import die_with_parent


def main() -> None:
    """Exec torchrun with this process's arguments."""
    die_with_parent()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *sys.argv[1:]])


if __name__ == "__main__":
    main()
