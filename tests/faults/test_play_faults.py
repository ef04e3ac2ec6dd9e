"""Infrastructure that fails under episodes: nothing is scored for it, and the next run ends as if it had not been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.envs.pool import EnvPool
from ragdistill.journal import Journal
from ragdistill.llm import ChatModel, Sampling
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import AgentParams
from ragdistill.records import Message, StopReason, Task, Trajectory
from ragdistill.rollout import Setting, play_all
from tests.faults.conftest import Figure
from tests.faults.project import entries, fresh, run
from tests.faults.toy import Slow

LIMITS = AgentParams(
    name="react", context_tokens=4000, max_reply_tokens=20, loop_limit=3, no_action_limit=2, examples=0
)
TASKS = [Task(id=f"t{i}", env="toy", split="train", kind="k", group="g", data="", sha256=str(i)) for i in range(16)]


def answer(messages: Sequence[Message], sampling: Sampling) -> str:
    return f"Thought: I go.\nAction: poke {sampling.seed % 97}"


def play(
    root: Path, model: ChatModel, trouble: Callable[[EnvPool], object] | None = None, timeout: float = 30.0,
    tasks: Sequence[Task] = TASKS,
) -> list[Trajectory]:  # fmt: skip
    """`tasks` on two real worker processes, while `trouble(pool)` is called every 0.1 s."""
    setting = Setting(
        policy="base", run="0", agent=make_agent("react"), limits=LIMITS, max_steps=8, temperature=0.7,
        environment="toy", model="toy",
    )  # fmt: skip

    async def harass(pool: EnvPool) -> None:
        while trouble:
            await asyncio.sleep(0.1)
            trouble(pool)

    async def main() -> list[Trajectory]:
        pool = EnvPool(Slow, workers=2, slots=4, timeout=timeout)
        torment = asyncio.create_task(harass(pool))
        try:
            return await play_all([(t, 0) for t in tasks], setting, model, pool, Journal(root, Trajectory), 8)
        finally:
            torment.cancel()
            await pool.close()

    return asyncio.run(main())


def timeless(done: Sequence[Trajectory]) -> list[Trajectory]:
    return [msgspec.structs.replace(t, seconds=0.0) for t in done]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    return timeless(play(tmp_path_factory.mktemp("clean"), ScriptedModel(answer, "toy")))


@pytest.mark.parametrize(("blow", "timeout"), [(signal.SIGKILL, 30.0), (signal.SIGSTOP, 4.0)], ids=["dead", "hanging"])
def test_workers_that_die_or_hang_cost_no_episode(
    undisturbed: list[Trajectory], tmp_path: Path, figure: Figure, blow: signal.Signals, timeout: float
) -> None:
    rng, struck = random.Random(7), []

    def trouble(pool: EnvPool) -> None:
        if len(struck) < (4 if blow is signal.SIGKILL else 2) and pool.pids and rng.random() < 0.5:
            struck.append(victim := rng.choice(pool.pids))
            with suppress(ProcessLookupError):
                os.kill(victim, blow)

    model = ScriptedModel(answer, "toy")
    first = play(tmp_path, model, trouble, timeout)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.json")}
    lost = [t for t in first if t.stop is StopReason.INFRA_ERROR]
    assert struck, "no worker was struck"
    assert len(finished) == len(first) - len(lost)
    again = play(tmp_path, model)
    assert timeless(again) == undisturbed
    assert all(p.stat().st_mtime_ns == at for p, at in finished.items()), "a finished episode was played again"
    figure(
        f"worker {'killed' if blow is signal.SIGKILL else 'stopped'} x{len(struck)}",
        f"{len(lost)} of {len(first)} episodes left to the next run, 0 scored as failures; then equal to undisturbed",
    )


def test_an_engine_out_of_memory_in_a_step_costs_no_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    import torch

    from ragdistill.llm.local import LocalEngine
    from tests.llm_toys import toy_model

    def meagre(step: Callable[..., torch.Tensor], failing: dict[int, Exception]) -> Callable[..., torch.Tensor]:
        calls = iter(range(1, 10**9))

        def limited(*args: object) -> torch.Tensor:
            if (error := failing.get(next(calls))) is not None:
                raise error
            return step(*args)

        return limited

    results, blows = [], {3: torch.OutOfMemoryError("out of memory"), 40: MemoryError("out of memory")}
    for failing in ({}, blows):
        engine = LocalEngine(toy_model(tmp_path / "model"), max_batch=8, reference=True)
        monkeypatch.setattr(engine._runner, "step", meagre(engine._runner.step, failing))
        try:
            results.append(timeless(play(tmp_path / str(len(failing)), engine, tasks=TASKS[:4])))
        finally:
            engine.close()
    assert not [t for t in results[1] if t.stop is StopReason.INFRA_ERROR]
    assert results[0] == results[1]
    figure("engine out of memory, 2 steps", f"{len(results[1])} of 4 episodes equal to undisturbed, 0 lost")


JUMPING = """
import random, runpy, time
real, rng = time.time, random.Random(3)
time.time = lambda: real() + rng.choice((-1e9, -86400.0, -1.0, 0.0, 3600.0, 1e9))
time.time_ns = lambda: int(time.time() * 1e9)
runpy.run_module("ragdistill.stages.rollouts", run_name="__main__")
"""


@pytest.mark.timeout(300)
def test_a_clock_that_jumps_changes_nothing(small: Path, tmp_path: Path, figure: Figure) -> None:
    project = fresh(small, tmp_path / "project")
    for i, path in enumerate(p for p in project.rglob("*") if p.is_file() and ".git/" not in str(p)):
        os.utime(path, (0, 0) if i % 2 else (4e9, 4e9))  # files of 1970 and of 2096
    done = run(project, "-c", JUMPING)
    assert done.returncode == 0, done.stderr
    played = Path("data/rollouts.jsonl")
    expected, found = (
        [msgspec.json.decode(line, type=Trajectory) for line in (p / played).read_bytes().splitlines()]
        for p in (small, project)
    )
    assert timeless(found) == timeless(expected)
    assert all(0 <= t.seconds < 300 for t in found)
    assert len(entries(project)) == len(found)
    figure("clock jumps by years", f"{len(found)} of {len(found)} episodes equal, 0 negative times")
