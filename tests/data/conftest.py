"""A user who may do nothing, for tests that run as root too."""

from __future__ import annotations

import contextlib
import os

import pytest


@pytest.fixture
def nobody():
    """A block in which the process has no more rights than the files' modes give it."""

    @contextlib.contextmanager
    def block(folder):
        if os.geteuid() != 0:
            yield
            return
        parents = (folder, *folder.parents)  # pytest's own are closed to others
        modes = {path: path.stat().st_mode & 0o7777 for path in parents}
        closed = {path: mode for path, mode in modes.items() if mode & 0o055 != 0o055}
        for path, mode in closed.items():
            path.chmod(mode | 0o055)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            for path, mode in closed.items():
                path.chmod(mode)

    return block
