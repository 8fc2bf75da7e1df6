"""Fixed seeds, and fresh memory poisoned with NaN so that an unwritten element shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DATA = Path(os.environ.get("FASTLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    # deterministic mode also fills every torch.empty with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights and texts; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA} (set FASTLM_TEST_DATA)")
    return DATA
