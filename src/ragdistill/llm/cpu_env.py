"""Process settings that decide CPU speed by factors; call `apply()` before the first `import torch`.

This module imports nothing heavy and knows no model.
"""

from __future__ import annotations

import ctypes
import os

OMP_WAIT_POLICY = "PASSIVE"
"""Idle OpenMP threads sleep. Spinning ones fight any other busy process: 50 s instead of 3.5 s for the same step."""
MALLOC_MMAP_THRESHOLD = 32 << 20
"""Bytes; glibc's largest. Fresh pages are slow to fault in, so tensors below this are reused, not unmapped."""
MALLOC_TRIM_THRESHOLD = 512 << 20
"""Bytes of free heap kept for reuse. Bounded, since a heap that is never trimmed grew to 14 GB."""
MALLOC_ARENA_MAX = 1
"""One heap: the engine's thread would get one of its own, made of 64 MB pieces that are unmapped when empty."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def apply() -> None:
    """Set the OpenMP wait policy (unless the user did) and keep freed memory; harmless to call twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", OMP_WAIT_POLICY)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:  # the MALLOC_* variables are read at process start only, so a running process asks glibc itself
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc: only speed is lost
    mallopt(_M_ARENA_MAX, MALLOC_ARENA_MAX)
    mallopt(_M_MMAP_THRESHOLD, MALLOC_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, MALLOC_TRIM_THRESHOLD)
