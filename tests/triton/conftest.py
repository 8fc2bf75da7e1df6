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
    import torch

    from tests.triton import _interpreter

    _interpreter.prepare()
    torch.set_num_threads(1)  # tensors of some hundred elements: a second thread only waits


def pytest_addoption(parser):
    parser.addoption("--share", default="1/1", help="runs every n-th test only: 1/3, 2/3, 3/3")


def pytest_collection_modifyitems(config, items):
    """Tests cost as much as their neighbours: every n-th is an even share."""
    # where all tests are collected this file comes too late to add an option
    number, count = map(int, config.getoption("--share", "1/1").split("/"))
    if count > 1:
        others = [item for n, item in enumerate(items) if n % count != number - 1]
        config.hook.pytest_deselected(items=others)
        items[:] = items[number - 1 :: count]


@pytest.fixture(autouse=True)
def _forced():
    from fastlm import ops

    with ops.use_backend("triton"):
        yield
