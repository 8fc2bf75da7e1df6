"""Every environment variable fastlm reads, in one place.

=================  ==========================================================================
FASTLM_BACKEND     Forces one implementation for every operator: ``cpu``, ``cuda``,
                   ``triton``, ``torch`` or ``reference``. An operator that cannot run there
                   raises an error that names the reasons. Any but ``cpu`` also turns off the
                   decode plan of ``Decoder.generate``.
FASTLM_CPU_ISA     Forces one CPU instruction set: ``baseline``, ``avx2``, ``avx512``,
                   ``avx512bf16`` or ``amx``. An unknown or unsupported one raises.
FASTLM_GRAPHS      ``0``: ``Decoder.generate`` launches the kernels of a step one by one on a
                   GPU, instead of as one CUDA graph.
FASTLM_MALLOC      ``keep`` tells glibc to keep freed memory (`fastlm.keep_freed_memory`).
FASTLM_QUIET       ``1`` silences the one warning given when no native kernels are present.
FASTLM_TUNE        ``1``: the first call of each class of calls that no table holds times the
                   implementations that can run it and keeps the winner (`fastlm.tune`).
FASTLM_TUNE_FILE   Where the table of measured winners lies (``fastlm tune``); ``none``: no table
                   is read or written, nor those read that come with the package for some GPUs.
                   By default ``fastlm/tuned.json`` in XDG_CACHE_HOME, which is ``~/.cache`` where
                   it is not set.
TRITON_INTERPRET   Triton's own: ``1`` runs its kernels in Python, slowly. The backend
                   ``triton`` then serves CPU tensors too; the tests use it.
=================  ==========================================================================

Read by ``tools/compile_kernels.py`` only: ``FASTLM_RECOMPILE`` (``1``: compiles the Triton kernels
that did not change, too).

Read by the build only (``build_support/native.py``): ``FASTLM_CUDA`` (``0``, ``1``, ``auto``),
``FASTLM_BUILD_ISAS`` (``all``, ``native``), ``FASTLM_TORCH_DIR``, ``FASTLM_REQUIRE_NATIVE``,
``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``CUDA_PATH``, ``NVCC_CCBIN``, ``NVCC_THREADS``, ``CXX``,
``MAX_JOBS``, ``VIRTUAL_ENV``.
"""

from __future__ import annotations

import os
from pathlib import Path

BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")


def forced_backend() -> str | None:
    """The backend FASTLM_BACKEND names, or None; an unknown name raises ValueError."""
    name = os.environ.get("FASTLM_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"FASTLM_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def keep_memory() -> bool:
    """Whether FASTLM_MALLOC asks for freed memory to be kept; another word raises ValueError."""
    word = os.environ.get("FASTLM_MALLOC") or None
    if word not in (None, "keep"):
        raise ValueError(f"FASTLM_MALLOC: expected keep, got {word!r}")
    return word == "keep"


def no_graphs() -> bool:
    """Whether FASTLM_GRAPHS turns the CUDA graphs of decoding off; a third word raises."""
    word = os.environ.get("FASTLM_GRAPHS") or "1"
    if word not in ("0", "1"):
        raise ValueError(f"FASTLM_GRAPHS: expected 0 or 1, got {word!r}")
    return word == "0"


def quiet() -> bool:
    """Whether the warning about missing native kernels is off."""
    return os.environ.get("FASTLM_QUIET") == "1"


def tuning() -> bool:
    """Whether calls that no table of measured winners knows are measured as they come."""
    return os.environ.get("FASTLM_TUNE") == "1"


def tune_file() -> Path | None:
    """Where the table of measured winners lies; None: nowhere."""
    named = os.environ.get("FASTLM_TUNE_FILE")
    if named == "none":
        return None
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fastlm" / "tuned.json"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
