"""Runs that are killed with all their processes: when, which stage was hit, and what the next run did once more.

Knows no assertion about results.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.faults.project import TRAINED, entries, group, orphans

RUNNING = re.compile(r"^Running stage '([^']+)'")
"""DVC's line before it starts a stage."""
REPRO = ("-m", "dvc", "repro")
UNLOCK = Path("scripts/unlock.py").resolve()


@dataclass(frozen=True)
class Aim:
    """Kill `after` seconds from the first line that matches `on`, or from the start of the run without one."""

    after: float
    on: str = ""


@dataclass
class Ended:
    """One run: how it ended, and what it said, in order."""

    status: int
    killed: bool = False
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(seconds after the start, line)."""

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def stages(self) -> list[tuple[float, str]]:
        """(when it was started, stage) of the stages DVC ran."""
        return [(at, m[1]) for at, line in self.lines if (m := RUNNING.match(line))]

    @property
    def hit(self) -> str:
        """The stage that was running, or DVC itself before its first."""
        return self.stages[-1][1] if self.stages else "dvc"

    @property
    def steps(self) -> dict[str, list[int]]:
        """Label of a training → its optimiser steps."""
        found: dict[str, list[int]] = defaultdict(list)
        for _, line in self.lines:
            if m := TRAINED.match(line):
                found[m[1]].append(int(m[2]))
        return dict(found)

    def spans(self) -> dict[str, float]:
        """Stage → seconds until the next was started, or until the end."""
        times = [at for at, _ in self.stages] + [self.lines[-1][0]]
        return {name: times[i + 1] - at for i, (at, name) in enumerate(self.stages)}


def watched(project: Path, command: Sequence[str], aim: Aim | None = None) -> Ended:
    """`python COMMAND` to its end, or until `aim` kills its process group; nothing of it is left running."""
    heard: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
    started = time.monotonic()

    def listen(pipe: IO[str]) -> None:
        for line in pipe:
            heard.put((time.monotonic() - started, line.rstrip("\n")))

    with group(project, *command, PYTHONUNBUFFERED="1") as leader:
        assert leader.stdout and leader.stderr
        ears = [threading.Thread(target=listen, args=(pipe,), daemon=True) for pipe in (leader.stdout, leader.stderr)]
        for ear in ears:
            ear.start()
        ended = Ended(0)
        due = started + aim.after if aim and not aim.on else float("inf")
        while any(ear.is_alive() for ear in ears) or not heard.empty():
            ended.lines += _next(heard, due)
            if aim and aim.on and due == float("inf") and ended.lines and re.search(aim.on, ended.lines[-1][1]):
                due = time.monotonic() + aim.after
            if time.monotonic() >= due and not ended.killed and leader.poll() is None:
                os.killpg(leader.pid, signal.SIGKILL)
                ended.killed = True
        leader.wait()
    assert not orphans(leader.pid)
    ended.status = leader.returncode
    ended.killed = ended.killed and ended.status == -signal.SIGKILL  # it may just have ended by itself
    return ended


def _next(heard: queue.SimpleQueue[tuple[float, str]], due: float) -> list[tuple[float, str]]:
    try:
        return [heard.get(timeout=min(0.1, max(0.0, due - time.monotonic())))]
    except queue.Empty:
        return []


def until_done(project: Path, command: Sequence[str], aims: Iterable[Aim]) -> list[Ended]:
    """COMMAND again and again as `make run` does it, each run killed by the next of `aims`, the last by none.

    No finished episode may be lost or played twice on the way.
    """
    runs: list[Ended] = []
    seen: dict[Path, int] = {}
    todo = iter(aims)
    while not runs or runs[-1].killed:
        subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
        runs.append(watched(project, command, next(todo, None)))
        assert runs[-1].killed or runs[-1].status == 0, runs[-1].text[-4000:]
        now = {p: p.stat().st_mtime_ns for p in entries(project)}
        assert all(now.get(p) == at for p, at in seen.items()), "an episode was lost or played twice"
        seen = now
    return runs


def hits(runs: Iterable[Ended]) -> Counter[str]:
    """Stage → kills that hit it."""
    return Counter(run.hit for run in runs if run.killed)


def repeated(runs: Sequence[Ended]) -> dict[str, list[int]]:
    """Training → for each run that took it up again, the optimiser steps that an earlier one had already done.

    Negative: steps were left out.
    """
    last: dict[str, int] = {}
    found: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        for label, steps in run.steps.items():
            assert steps == list(range(steps[0], steps[-1] + 1)), steps
            if label in last:
                found[label].append(last[label] - steps[0] + 1)
            else:
                assert steps[0] == 1, steps
            last[label] = steps[-1]
    return dict(found)
