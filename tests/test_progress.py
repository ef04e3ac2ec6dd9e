"""Progress and timings: live on a terminal, quiet in a log, silent in CI; a replay never passes for a run."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ragdistill import progress
from ragdistill.errors import DataError
from ragdistill.params import Params
from ragdistill.progress import bar, display, duration, track
from ragdistill.records import read_json, write_json
from ragdistill.stages import common
from ragdistill.timing import Timing, collect, note, read_timings

ROOT = Path(__file__).resolve().parents[1]
SLOW_WORK = """
import sys, time
from ragdistill import progress
progress.FIRST, progress.EVERY = {first}, {every}
with progress.display("rollouts"):
    with progress.bar("episodes", 400) as b:
        for i in range(1, 41):
            b.at(10 * i, 100, "success 25%, 312 tokens/s [red]not markup[/red]")
            time.sleep(0.02)
    with progress.bar("converting"):
        time.sleep(0.5)
    print("said meanwhile", flush=True)
print("rollouts: done", flush=True)
"""


def script(first: float = 0.1, every: float = 0.2) -> list[str]:
    return [sys.executable, "-c", SLOW_WORK.format(first=first, every=every)]


def env(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "CI"}
    return kept | {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", "COLUMNS": "100"} | changes


def on_a_terminal(command: list[str], stdout: int | None = None, **changes: str) -> str:
    """Everything that `command` writes to a terminal; `stdout` goes elsewhere if it says where."""
    master, slave = pty.openpty()
    out = slave if stdout is None else stdout
    process = subprocess.Popen(command, stdin=slave, stdout=out, stderr=slave, env=env(**changes))
    os.close(slave)
    seen = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
    os.close(master)
    assert process.wait() == 0
    return seen.decode()


def test_a_terminal_shows_a_live_line_and_keeps_only_what_was_said() -> None:
    seen = on_a_terminal(script())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"rollouts .*\d+/400 episodes, ETA \d s, success 25%, 312 tokens/s \[red\]", plain)
    assert "converting, " in plain
    lines = [x.strip() for x in plain.replace("\r", "\n").split("\n")]
    assert "said meanwhile" in lines and "rollouts: done" in lines
    assert "\x1b[?25h" in seen[seen.rindex("\x1b[?25l") :], "the cursor is shown again"


def test_a_live_line_leaves_what_goes_into_a_file_alone(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        seen = on_a_terminal(script(), out.fileno())
    assert (tmp_path / "out").read_text() == "said meanwhile\nrollouts: done\n"
    assert "400 episodes" in seen and "said" not in seen


def test_a_log_gets_a_line_now_and_then_and_a_short_job_none() -> None:
    done = subprocess.run(script(), env=env(), capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) >= 3
    assert any(re.fullmatch(r"rollouts: \d+/400 episodes, ETA \d+ s, .*, 100 from the cache", x) for x in lines)
    assert re.fullmatch(r"rollouts: converting, \d s so far", lines[-1])
    short = subprocess.run(script(5, 30), env=env(), capture_output=True, text=True, check=True)
    assert (short.stderr, short.stdout) == ("", "said meanwhile\nrollouts: done\n")
    assert "episodes" not in on_a_terminal(script(5, 30))


def test_ci_gets_what_is_said_alone() -> None:
    done = subprocess.run(script(), env=env(CI="true"), capture_output=True, text=True, check=True)
    assert (done.stderr, done.stdout) == ("", "said meanwhile\nrollouts: done\n")
    assert on_a_terminal(script(), CI="1").split() == ["said", "meanwhile", "rollouts:", "done"]


def test_time_left_counts_what_is_done_now_not_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with bar("episodes", 100) as b:
        monkeypatch.setattr(time, "monotonic", lambda: b.started + 10)
        b.at(60, 50)
        assert b.words() == "60/100 episodes, ETA 40 s, 50 from the cache"
        b.at(100, 50)
        assert b.words() == "100/100 episodes, 50 from the cache"
    assert [duration(s) for s in (0.4, 99, 100, 3600, 7200)] == ["0 s", "99 s", "2 min", "60 min", "2.0 h"]


def test_the_share_is_of_all_that_was_counted_and_bars_end_with_an_error() -> None:
    def broken() -> None:
        with bar("episodes", 9) as b:
            b.at(1, 1)
            raise ZeroDivisionError

    with display("x") as tally:
        assert list(track("abc", "games", 3)) == ["a", "b", "c"]
        with pytest.raises(ZeroDivisionError):
            broken()
    assert (tally.done, tally.share, tally.words()) == (4, 0.25, "1 of 1 episodes from the cache")
    assert not progress._open and not progress._tallies


def test_a_replay_keeps_the_time_of_the_last_cold_run_of_the_same_work(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.json"
    note(path, "rollouts", 1900.0, 0.02, 480)
    note(path, "rollouts", 7.6, 1.0, 480)
    kept = collect(tmp_path)["rollouts"]
    assert kept == Timing(seconds=7.6, replayed=1.0, work=480, cold=1900.0) and kept.best == 1900.0
    note(path, "rollouts", 7.7, 0.5, 480)
    assert collect(tmp_path)["rollouts"].cold == 1900.0
    note(path, "rollouts", 8.0, 1.0, 24)
    kept = collect(tmp_path)["rollouts"]
    assert (kept.cold, kept.best) == (None, 8.0), "twenty-four episodes were never timed cold"


def test_bare_seconds_of_an_earlier_version_say_nothing_of_replays(tmp_path: Path) -> None:
    write_json(tmp_path / "timing.json", {"demos": 81.6, "sft": {"seconds": 4.0, "replayed": 1.0, "work": 10}})
    found = read_timings(tmp_path / "timing.json")
    assert found["demos"] == Timing(seconds=81.6) and found["demos"].cold is None
    assert found["sft"].replayed == 1.0
    write_json(tmp_path / "kept/demos.json", {"stage": "demos", "seconds": 5.0})
    note(tmp_path / "kept/demos.json", "demos", 1.0, 1.0, 3)
    assert collect(tmp_path / "kept")["demos"].cold is None, "nobody knows whether those seconds were a replay's"
    write_json(tmp_path / "timing.json", {"demos": "long"})
    with pytest.raises(DataError, match=r"delete \.cache/timing"):
        read_timings(tmp_path / "timing.json")


def test_a_stage_says_and_keeps_what_it_took_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def body(params: Params) -> str:
        with bar("episodes", 4) as b:
            b.at(4, 3)
        return "4 episodes"

    common.run_stage("rollouts", body)
    assert capsys.readouterr().out == "rollouts: 4 episodes (0 s, 3 of 4 episodes from the cache)\n"
    kept = read_json(tmp_path / ".cache/timing/rollouts.json")
    assert (kept["replayed"], kept["work"], kept["cold"]) == (0.75, 4, None)
    assert common.read_timing()["rollouts"].replayed == 0.75
