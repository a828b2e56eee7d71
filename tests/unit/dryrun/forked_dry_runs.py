"""Dry runs of several folders, each in a fork of one process that has imported everything: it patches torch for good.

python forked_dry_runs.py FOLDER...
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

# Everything that a dry run imports, and nothing that it patches.
import deepspeed.runtime.zero.stage3
import torch._subclasses.fake_tensor
import torch.testing._internal.distributed.fake_pg
import transformers.models.gpt_neox.modeling_gpt_neox

import foretune.training.build
from foretune.dryrun import worker

IMPORTED = (deepspeed, torch, transformers, foretune.training.build)


def main() -> int:
    """The number of dry runs that failed."""
    failed = 0
    for folder in sys.argv[1:]:
        if pid := os.fork():
            failed += os.waitpid(pid, 0)[1] != 0
            continue
        code = 1
        try:
            worker.main(Path(folder))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return failed


if __name__ == "__main__":
    sys.exit(main())
