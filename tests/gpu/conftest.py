"""These tests run where ckptfuse need not be installed: their jobs find it as they do."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[2]))
