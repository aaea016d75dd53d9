"""What the tests of pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from matplotlib.figure import Figure

from rlhf_cli.report import figures, plots, reward_plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the plots make, in order."""
    made: list[Figure] = []

    @contextmanager
    def recording(*arguments: Any) -> Iterator[Figure]:
        with figures.new_figure(*arguments) as figure:
            made.append(figure)
            yield figure

    for module in (plots, reward_plots):
        monkeypatch.setattr(module, "new_figure", recording)
    return made
