"""Freed memory stays with a process that trains: what a step frees, the next one takes.

By default glibc hands large tensors back to the kernel as they are freed, and the next step has the kernel zero the same
memory again, page by page: a seventh of a round of small clients.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to its own peak; whether its C library knows of it (glibc does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library: its own ways are left to it
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
