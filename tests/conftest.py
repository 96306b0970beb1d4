"""Every test starts from the same seed, on one thread, and leaves no compiled code behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch starts its thread pool
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """The same random numbers whatever ran before; dynamo's caches are emptied after a test that compiled."""
    torch.manual_seed(0)
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded outputs of the original code; too large to be carried, so tests that need them skip without."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("golden values not present")
    return folder
