"""Before torch is loaded: one thread per test process that sleeps while it waits, so that workers share the cores.

After the tests: the table of architectures and what was shown for each.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _quick_composition() -> None:
    from tests.quick import compose_quickly

    compose_quickly()


# Tests say which cell they fill by record_property; it travels from the workers with their reports.
MATRIX = "architecture matrix"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints architecture x property, ok only where every test of the cell passed."""
    cells: dict[tuple[str, str], set[str]] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == MATRIX and (outcome != "passed" or report.when == "call"):
                    cells.setdefault(tuple(value), set()).add(outcome)
    if not cells:
        return
    rows, columns = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    width = max(map(len, rows))
    terminalreporter.section(MATRIX)
    terminalreporter.write_line("  ".join([" " * width, *columns]))
    for row in rows:
        shown = []
        for column in columns:
            outcomes = cells.get((row, column), set())
            word = "-" if not outcomes else "ok" if outcomes == {"passed"} else max(outcomes - {"passed"})
            shown.append(word.ljust(len(column)))
        terminalreporter.write_line("  ".join([row.ljust(width), *shown]).rstrip())
