"""The small scripted project, and the table of figures at the end of a run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.project import make_project

# As a background job of a shell, pytest ignores Ctrl-C and passes that on; what a terminal starts hears it.
signal.signal(signal.SIGINT, signal.default_int_handler)

Figure = Callable[[str, str], None]
FIGURES: list[tuple[str, str]] = []


@pytest.fixture
def figure() -> Figure:
    """`figure(fault, what was counted)`: a row of the closing table."""

    def note(fault: str, counted: str) -> None:
        FIGURES.append((fault, counted))

    return note


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project after `dvc repro strip`; tests copy it and never change it."""
    return make_project(tmp_path_factory.mktemp("faults") / "project")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was counted."""
    if FIGURES:
        terminalreporter.section("faults")
        width = max(len(fault) for fault, _ in FIGURES)
        for fault, counted in FIGURES:
            terminalreporter.write_line(f"{fault:<{width}}  {counted}")
