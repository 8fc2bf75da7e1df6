"""Triton's kernels on the CPU, in Triton's interpreter.

It has to be on before Triton is imported, and nothing else works in such a process: so these files
are collected only under TRITON_INTERPRET=1, where tests/test_triton.py runs them.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


if INTERPRETED:
    from tests.triton import _interpreter

    _interpreter.prepare()


@pytest.fixture(autouse=True)
def _forced():
    from fastlm import ops

    with ops.use_backend("triton"):
        yield
