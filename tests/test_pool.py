"""The environment pool: isolation of faults, recovery, reuse and recycling, with a toy environment."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from ragdistill.envs.pool import EnvPool
from ragdistill.errors import ConfigError, DataError, EnvironmentFault
from ragdistill.records import Observation, Task


def task(name: str = "t") -> Task:
    return Task(id=name, env="toy", split="train", kind="k", group="g", data="", sha256="")


class Toy:
    """Counts its resets; a step can tell the process id, crash, hang or burn CPU."""

    def __init__(self) -> None:
        self.resets = 0

    def reset(self, task: Task) -> Observation:
        self.resets += 1
        if task.id == "missing":
            raise DataError("no such game")
        return Observation(text=f"{task.id} {self.resets} {os.getpid()}", goal="g")

    def step(self, action: str) -> Observation:
        if action == "hang":
            time.sleep(60)
        if action == "crash":
            raise ZeroDivisionError("bug in the engine")
        if action == "burn":
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
        return Observation(text=f"{action} {os.getpid()}")

    def close(self) -> None:
        pass


def gone(pid: int) -> bool:
    """No such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def play(body, **options):
    """Run `body(pool)` and close the pool; afterwards no worker may be left."""

    async def main():
        pool = EnvPool(Toy, **{"workers": 1, "slots": 2, "timeout": 20.0} | options)
        try:
            return await body(pool)
        finally:
            pids = pool.pids
            await pool.close()
            assert all(gone(p) for p in pids)

    return asyncio.run(main())


def test_a_slot_keeps_its_environment_and_designed_errors_keep_their_type() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as env:
            assert (await env.reset(task())).text.startswith("t 1 ")
            with pytest.raises(DataError, match="no such game"):
                await env.reset(task("missing"))
        async with pool.lease() as env:
            assert (await env.reset(task("u"))).text.startswith("u 3 ")

    play(body)


def test_leases_wait_for_slots_and_spread_over_workers() -> None:
    async def body(pool: EnvPool) -> None:
        busy = most = 0

        async def one(i: int) -> str:
            nonlocal busy, most
            async with pool.lease() as env:
                busy += 1
                most = max(most, busy)
                pid = (await env.reset(task(str(i)))).text.split()[2]
                await asyncio.sleep(0.02)
                busy -= 1
                return pid

        pids = await asyncio.gather(*(one(i) for i in range(12)))
        assert most == 4 and len(set(pids)) == 2

    play(body, workers=2, slots=2)


def test_a_killed_worker_fails_its_own_leases_only_and_is_replaced() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as first, pool.lease() as second:
            await second.reset(task())
            victim = int((await first.reset(task())).text.split()[2])
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(EnvironmentFault, match="died"):
                await first.step("look")
            with pytest.raises(EnvironmentFault):
                await first.step("look")
            assert (await second.step("look")).text.startswith("look")
        async with pool.lease() as one, pool.lease() as two:
            assert all([(await e.reset(task())).goal == "g" for e in (one, two)])
        assert gone(victim) and len(pool.pids) == 2

    play(body, workers=2, slots=1)


def test_a_hanging_worker_becomes_a_fault_after_the_timeout() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as env:
            await env.reset(task())
            with pytest.raises(EnvironmentFault, match="no answer within 3 s"):
                await env.step("hang")
        async with pool.lease() as env:
            assert (await env.reset(task())).text.startswith("t 1 ")

    play(body, timeout=3.0)


def test_an_exception_of_the_engine_is_a_fault_of_that_slot_only() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as env, pool.lease() as other:
            await env.reset(task())
            await other.reset(task())
            with pytest.raises(EnvironmentFault, match="ZeroDivisionError: bug in the engine"):
                await env.step("crash")
            assert (await other.step("look")).text.startswith("look")
            assert (await env.reset(task())).text.startswith("t 1 ")  # a fresh environment, not the broken one

    play(body)


def test_a_worker_is_recycled_without_breaking_running_leases() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as long:
            old = new = (await long.reset(task())).text.split()[2]
            for _ in range(2):
                async with pool.lease() as env:
                    new = (await env.reset(task())).text.split()[2]
            assert new != old
            assert (await long.step("look")).text == f"look {old}"
        assert gone(int(old))

    play(body, recycle_after=2)


def test_a_cancelled_request_does_not_leave_its_answer_to_the_next() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as env:
            await env.reset(task())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(env.step("burn"), 0.001)
            assert (await env.step("after")).text.startswith("after ")
        assert pool.busy_seconds >= 0.04

    play(body)


def test_closing_ends_a_running_request_and_all_processes() -> None:
    async def body(pool: EnvPool) -> None:
        async with pool.lease() as env:
            await env.reset(task())
            hanging = asyncio.create_task(env.step("hang"))
            await asyncio.sleep(0.1)
            await pool.close()
            with pytest.raises(EnvironmentFault):
                await hanging

    play(body)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError):
        EnvPool(Toy, workers=0)
