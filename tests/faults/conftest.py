"""The small scripted project, and the table of figures at the end of a run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.project import STUDENT, in_namespace, learner, make_project, run, weights

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


@pytest.fixture(scope="session")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command after which a process may mount: as anybody, or as root where user namespaces are switched off."""
    place, said = tmp_path_factory.mktemp("mount"), ""
    for how in (("unshare", "-rm"), ("unshare", "-m")):
        try:
            tried = in_namespace(how, place, "mount -t tmpfs -o size=64k tmpfs .")
        except FileNotFoundError:
            pytest.skip("there is no `unshare` here")
        if not tried.returncode:
            return how
        said = tried.stderr.strip()
    pytest.skip(f"mounting is not permitted here ({said})")


@pytest.fixture(scope="session")
def learnt(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `learner` trains when nothing disturbs it: fingerprints by name. The cold start comes second: it makes
    another base."""
    project = learner(small, tmp_path_factory.mktemp("learnt") / "project")
    for stage in (("sft", STUDENT), ("coldstart",)):
        done = run(project, "-m", f"ragdistill.stages.{stage[0]}", *stage[1:])
        assert done.returncode == 0, done.stderr
    return weights(project)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was counted."""
    if FIGURES:
        terminalreporter.section("faults")
        width = max(len(fault) for fault, _ in FIGURES)
        for fault, counted in FIGURES:
            terminalreporter.write_line(f"{fault:<{width}}  {counted}")
