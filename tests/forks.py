"""How a forked process ends: with the exit code of what it did, without the cleaning up of its parent."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def end_after(work: Callable[[], object]) -> NoReturn:
    """Do it and leave: with the code it returns (None: 0) or exits with; 1 after an exception, which is printed."""
    code = 1
    try:
        result = work()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
