"""Numbers as people read them. In: bytes, seconds, counts.  Out: short text with its unit."""

from __future__ import annotations

import math
import re


def bytes_text(num_bytes: float) -> str:
    """Binary units, because memory is sold and counted in them: ``1.9 GiB``."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB" if num_bytes >= 2**10 else f"{num_bytes:.0f} B"
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    gibibytes = num_bytes / 2**30
    return f"{gibibytes:,.0f} GiB" if gibibytes >= 100 else f"{gibibytes:.1f} GiB"


def count_text(count: float) -> str:
    """Exact below 100,000, three digits above: ``7,473``, ``1.24 M``, ``6.74 B``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e5)):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,.0f}"


def plural(count: float, noun: str) -> str:
    """``1 row``, ``7,473 rows``."""
    return f"{count_text(count)} {noun}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """Two units at most: ``0.4 s``, ``12 s``, ``3m10s``, ``2h05m``, ``3d04h``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def rate_text(per_second: float) -> str:
    """Tokens per second: ``1,203`` or ``8.4``."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def loss_text(loss: float) -> str:
    """A loss in nats: three decimals, four significant digits when it is small."""
    return f"{loss:.3f}" if loss >= 0.1 or not math.isfinite(loss) else f"{loss:.3g}"


def learning_rate_text(learning_rate: float) -> str:
    """``1.9e-05``."""
    return f"{learning_rate:.2g}" if learning_rate >= 1e-3 or learning_rate == 0 else f"{learning_rate:.1e}"


#: C0 and C1 controls, DEL, and the marks that override the order of text. Newline and tab stay.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from a data file or a model, safe for a terminal: an escape sequence could rewrite the screen."""
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
