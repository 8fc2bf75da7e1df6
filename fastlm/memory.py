"""The process's memory allocator, which on a CPU decides as much as a kernel does.

PyTorch caches no freed memory on the CPU. glibc hands every block above 32 MiB back to the system,
so that each large tensor is mapped and page-faulted anew, at some 5 GB/s: a training step of a
model with a large vocabulary can spend a third of its time there. docs/performance.md has figures.
"""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

_KEPT = "glibc malloc keeping freed memory (mallopt)"
_kept = False


def allocator() -> str:
    """Which allocator PyTorch's CPU tensors come from, as far as the loaded libraries tell."""
    try:
        libraries = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"/lib(tcmalloc\w*|jemalloc|mimalloc)[-.]\S*so", libraries)
    if found:
        return found[1]
    if _kept:
        return _KEPT
    return f"{platform.libc_ver()[0] or 'system'} malloc"


def keep_freed_memory() -> str:
    """Tells glibc to keep freed memory for the next tensor instead of returning it to the system.

    Process-wide, for every library in it, and until the process ends; nothing calls it unasked.
    `FASTLM_MALLOC=keep` does the same when fastlm is imported. What was freed stays with the
    process, so its resident size is that of its largest moment. It frees no one from an allocator
    of their own: with tcmalloc, jemalloc or mimalloc preloaded nothing changes, nor on systems
    without glibc.

    Returns:
        `allocator()` after the call: what tensors come from now.
    """
    global _kept
    if allocator().startswith("glibc") and not _kept:
        # malloc.h: no block gets a mapping of its own, and the heap's end is not given back
        mmap_max, trim_threshold = -4, -1
        mallopt = ctypes.CDLL(None).mallopt
        _kept = bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
    return allocator()
