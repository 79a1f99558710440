"""Memory of this process."""

from __future__ import annotations

import ctypes
import os


def return_free_memory() -> None:
    """Give freed memory back to the kernel: glibc keeps it, and blocks of other sizes leave ever more of it behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
