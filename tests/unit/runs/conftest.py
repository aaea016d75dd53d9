"""Runs of tiny models, whose curves nobody looks at."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_runs: None) -> None:
    """Drawn by tests/unit/report."""
