"""A stage that plays a served model, against a real server that misbehaves: real games, real processes.

The server answers as the scripted player does, so what is played must be what the scripted engine played.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ragdistill.commands.smoke import override
from ragdistill.llm import Sampling
from ragdistill.llm.ledger import Spent, spending
from ragdistill.records import Message, StopReason, Trajectory, read_jsonl
from tests.faults.conftest import Figure
from tests.faults.project import fresh, group, journaled, run
from tests.misbehaving import KEY, Act, Script, Seen, serving
from tests.scripted_policy import play

ROLLOUTS = ("-m", "ragdistill.stages.rollouts")
PRICES = "endpoint.prices={prompt: 1.0, cached: 0.5, completion: 4.0}"


def player(number: int, body: dict[str, Any]) -> Act:
    del number
    messages = [Message(role=m["role"], content=m["content"]) for m in body["messages"]]
    text = play(messages, Sampling(), "base")
    words = sum(len(m.content.split()) for m in messages)
    return Act(text=text, usage={"prompt_tokens": words, "completion_tokens": len(text.split())}, delay=0.01)


def each(n: int, act: Act) -> Script:
    """Every n-th request meets `act`, the others the player."""
    return lambda number, body: act if number % n == n - 1 else player(number, body)


def served_project(small: Path, where: Path, server: Seen, *overrides: str) -> Path:
    project = fresh(small, where)
    override(project / "params.yaml", [
        "model.engine=endpoint", f"endpoint.base_url={server.url}", "endpoint.model=player", "endpoint.budget=null",
        "endpoint.api_key_env=TEST_KEY", "endpoint.deadline=20", "endpoint.max_concurrency=8", "rollouts.attempts=1",
        "sft.variants=[]", "evaluate.policies=[base, rag]", PRICES, *overrides,
    ])  # fmt: skip
    return project


def expected(small: Path) -> dict[str, list[str]]:
    """Task → actions of the scripted engine; the player does not look at the seed."""
    return {t.task_id: [s.action for s in t.steps] for t in read_jsonl(small / "data/rollouts.jsonl", Trajectory)}


def played(project: Path) -> dict[str, list[str]]:
    return {t.task_id: [s.action for s in t.steps] for t in read_jsonl(project / "data/rollouts.jsonl", Trajectory)}


def account(project: Path) -> Spent:
    """What all of `project`'s runs together have paid."""
    [found] = spending(project / ".cache/ledger.jsonl")
    assert (found.stage, found.model) == ("rollouts", "player")
    return found


def twice(server: Seen) -> int:
    """Answers that were given, and billed, more than once."""
    return sum(n - 1 for n in Counter(json.dumps(b, sort_keys=True) for b in server.answered).values())


def leaks(project: Path, *texts: str) -> list[str]:
    found = [str(p) for p in project.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    return found + [t for t in texts if KEY in t]


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


STORM = Act("status", status=429, headers={"retry-after": "0.3"})
PASSING: dict[str, tuple[Script, tuple[str, ...]]] = {
    "429 storm with Retry-After": (lambda n, b: STORM if n < 12 else player(n, b), ()),
    "500s, every third": (each(3, Act("status", status=500)), ()),
    "hung connections": (each(40, Act("hang")), ("endpoint.deadline=3",)),
    "garbage bodies, every fourth": (each(4, Act("garbage")), ()),
    "reset in mid-stream, every fourth": (each(4, Act("reset")), ()),
}


def check_passing(small: Path, tmp_path: Path, figure: Figure, fault: str, script: Script, *overrides: str) -> None:
    with serving(script) as server:
        project = served_project(small, tmp_path / "p", server, *overrides)
        done = run(project, *ROLLOUTS, TEST_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert played(project) == expected(small)
    paid = account(project)
    assert paid.paid_calls == len(server.answered) and paid.failed_attempts > 0
    assert "calls paid" in done.stdout and twice(server) == 0
    assert not leaks(project, done.stdout, done.stderr)
    figure(
        f"served model: {fault}",
        f"exit 0, {len(played(project))} of 6 episodes, {len(server.bodies)} requests, {paid.failed_attempts} "
        f"attempts failed, {paid.paid_calls} paid, {twice(server)} twice, "
        f"{paid.unsure_money / paid.money:.0%} of the money unsure",
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_a_fault_that_passes_changes_nothing_that_is_played(
    small: Path, tmp_path: Path, figure: Figure, fault: str
) -> None:
    script, overrides = PASSING[fault]
    check_passing(small, tmp_path, figure, fault, script, *overrides)


@pytest.mark.timeout(300)
def test_all_faults_at_once_change_nothing_that_is_played(small: Path, tmp_path: Path, figure: Figure) -> None:
    bad = [STORM, Act("status", status=500), Act("garbage"), Act("reset"), Act("half")]
    check_passing(
        small, tmp_path, figure, "all of these at once",
        lambda n, b: bad[n // 5 % len(bad)] if n % 5 == 4 else player(n, b),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "act"),
    [
        ("refusals", Act("body", body={"choices": [{"message": {"refusal": "I will not."}, "finish_reason": "stop"}]})),
        ("empty choices", Act("body", body={"choices": []})),
    ],
)
def test_an_unusable_reply_ends_its_episode_with_the_reason(
    small: Path, tmp_path: Path, figure: Figure, fault: str, act: Act
) -> None:
    with serving(lambda n, b: act if len(b["messages"]) == 6 else player(n, b)) as server:
        project = served_project(small, tmp_path / "p", server)
        done = run(project, *ROLLOUTS, TEST_KEY=KEY)
    assert done.returncode == 0, done.stderr
    ended = read_jsonl(project / "data/rollouts.jsonl", Trajectory)
    bad = [t for t in ended if t.stop is StopReason.BAD_REPLY]
    assert bad and all(len(t.steps) == 2 and t.error.startswith(("refusal: I will", "empty reply")) for t in bad)
    assert twice(server) == 0
    figure(f"served model: {fault}", f"exit 0, {len(bad)} of {len(ended)} episodes end as bad_reply: {bad[0].error}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "act", "says"),
    [
        ("wrong key", Act("status", status=401, body={"error": {"message": f"wrong key {KEY}"}}), "refuses the key"),
        pytest.param("unknown model", Act("status", status=404), "does not know the model", marks=pytest.mark.slow),
    ],
)
def test_what_nobody_can_mend_stops_the_stage_at_once(
    small: Path, tmp_path: Path, figure: Figure, fault: str, act: Act, says: str
) -> None:
    with serving(lambda n, b: act) as server:
        project = served_project(small, tmp_path / "p", server)
        done = run(project, *ROLLOUTS, TEST_KEY=KEY)
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert line.startswith("rollouts: ") and says in line and len(server.bodies) <= 6
    assert not leaks(project, done.stdout, done.stderr)
    figure(f"served model: {fault}", f"exit 1 after {len(server.bodies)} requests: {line.replace(server.url, 'URL')}")


@pytest.mark.timeout(300)
def test_a_spent_budget_stops_cleanly_and_a_larger_one_goes_on(small: Path, tmp_path: Path, figure: Figure) -> None:
    with serving(player) as server:
        project = served_project(small, tmp_path / "p", server, "endpoint.budget=0.01")
        stopped = run(project, *ROLLOUTS, TEST_KEY=KEY)
        spent, kept = account(project), len(journaled(project))
        calls = len(server.answered)
        override(project / "params.yaml", ["endpoint.budget=10.0"])
        done = run(project, *ROLLOUTS, TEST_KEY=KEY)
    assert stopped.returncode == 1 and 0.005 < spent.money <= 0.01
    assert "raise endpoint.budget" in one_line(stopped.stderr)
    assert spent.paid_calls == calls
    assert account(project).paid_calls == len(server.answered) > calls, "the second run's and the first's"
    assert done.returncode == 0 and played(project) == expected(small) and twice(server) == 0
    figure(
        "served model: budget reached",
        f"exit 1, {spent.money:.4f} of 0.0100 spent in {calls} calls, {kept} episodes kept; with more: exit 0, "
        f"{twice(server)} calls paid twice",
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_loses_only_calls_under_way(small: Path, tmp_path: Path, figure: Figure) -> None:
    with serving(player) as server:
        project = served_project(small, tmp_path / "p", server)
        with group(project, *ROLLOUTS, TEST_KEY=KEY) as victim:
            while len(server.answered) < 40:
                assert victim.poll() is None
                time.sleep(0.01)
            os.killpg(victim.pid, signal.SIGKILL)
            victim.wait()
        before = len(server.answered)
        done = run(project, *ROLLOUTS, TEST_KEY=KEY)
        again = twice(server)
    assert done.returncode == 0 and played(project) == expected(small)
    assert again <= server.most_at_once <= 8
    figure("served model: kill -9", f"{before} calls before; {again} of those under way were asked again, the rest not")


@pytest.mark.timeout(300)
def test_a_served_teacher_beside_a_local_model(small: Path, tmp_path: Path) -> None:
    with serving(player) as server:
        project = served_project(small, tmp_path / "p", server, "model.engine=scripted", "model.teacher=endpoint")
        for stage in ("base", "rollouts"):
            done = run(project, "-m", f"ragdistill.stages.{stage}", TEST_KEY=KEY)
            assert done.returncode == 0, done.stderr
        asked = len(server.bodies)
        done = run(project, "-m", "ragdistill.stages.evaluate", "base-0", TEST_KEY=KEY)
        assert done.returncode == 0, done.stderr
    assert played(project) == expected(small)
    assert asked == len(server.bodies) > 50, "the evaluation is the local model's"
