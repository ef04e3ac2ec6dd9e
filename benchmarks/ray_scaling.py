"""Environment-bound episodes per second with 1, 2, 4 … workers: processes of this machine, and actors of a Ray cluster.

    python benchmarks/ray_scaling.py [--workers 1,2] [--rounds 5] [--address local]

The workload is what scales: a script in place of the model, and episodes of few steps, so that nearly all the time goes
into loading real ALFWorld games (translated before, as in a second attempt). Rounds of all sizes take turns, so that
other work on the machine falls on all alike. A ratio cannot exceed the number of free cores: with `--address local` on
two cores two workers can reach 2.0 at best, and less, because the loop that plays needs a core now and then. A cluster
that claims more CPUs than it has (`ray start --head --num-cpus=4`) shows the cost of many actors, not a speed-up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ragdistill.agents import make_agent
from ragdistill.envs import identity_of, make_domain
from ragdistill.envs.pool import EnvPool
from ragdistill.envs.ray_node import open_on_node
from ragdistill.envs.ray_pool import Cluster, connect
from ragdistill.journal import Journal
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, load_params
from ragdistill.records import StopReason, Task, Trajectory
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.defaults import settle

STEPS = 3
AT_ONCE = 8
"""Episodes at once; more than workers, as in a run."""


@dataclass
class Side:
    """One pool and what was measured on it."""

    name: str
    workers: int
    pool: EnvPool
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


def script(messages: Sequence[Any], sampling: Any) -> str:
    """No thought is cheaper."""
    return "Thought: I look.\nAction: look"


async def play(side: Side, jobs: Sequence[tuple[Task, int]], setting: Setting) -> None:
    """One round, with an empty journal; its time is kept."""
    with tempfile.TemporaryDirectory() as folder:
        before, started = side.pool.busy_seconds, time.perf_counter()
        model = ScriptedModel(script, "look")
        done = await play_all(jobs, setting, model, side.pool, Journal(Path(folder), Trajectory), AT_ONCE)
        side.seconds.append(time.perf_counter() - started)
        side.busy.append(side.pool.busy_seconds - before)
    faults = [t.error for t in done if t.stop is StopReason.INFRA_ERROR]
    if faults:
        raise SystemExit(f"{len(faults)} episodes ended in faults: {faults[0]}")


async def measure(sides: Sequence[Side], jobs: Sequence[tuple[Task, int]], setting: Setting, rounds: int) -> None:
    """Start all workers and translate all games, unmeasured; then `rounds` rounds, in turns."""
    for side in sides:
        await play(side, jobs, setting)
        side.seconds.clear()
        side.busy.clear()
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            await play(side, jobs, setting)


def table(sides: Sequence[Side], episodes: int) -> str:
    """Median episodes a second, and the ratio to one worker of the same kind, round by round."""
    lines = [
        "| workers | episodes/s, median | ratio to 1, median [min, max] | workers' CPU / wall |",
        "|---|---|---|---|",
    ]
    for side in sides:
        one = next(s for s in sides if s.name == side.name and s.workers == min(x.workers for x in sides))
        ratios = [a / b for a, b in zip(one.seconds, side.seconds, strict=True)]
        rate = episodes / statistics.median(side.seconds)
        load = sum(side.busy) / sum(side.seconds)
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {side.workers} {side.name} | {rate:.1f} | {ratio} | {load:.2f} |")
    return "\n".join(lines)


async def run(params: Params, sizes: Sequence[int], rounds: int, address: str | None) -> None:
    """All pools are open at once; those that do not play are idle."""
    domain, cache = make_domain(params.env), Path.cwd() / "cache"
    tasks = domain.tasks("train", 12, 0, Path("games"))
    jobs = [(t, a) for a in range(4) for t in tasks]
    setting = Setting(
        policy="look", run="0", agent=make_agent(params.agent.name), limits=params.agent, max_steps=STEPS,
        temperature=0.0, environment=domain.fingerprint(), model="look",
    )  # fmt: skip
    factory, cluster = domain.env_factory(cache, False), None
    if address:
        cluster = Cluster(connect(address), cache)
        room = sum(cluster.rooms().values())
        if sizes[-1] > room:  # the rest would find no room, and fewer would be measured than stand in the table
            raise SystemExit(f"The cluster has {room} CPUs, an actor each; give fewer --workers than {sizes[-1]}.")
    sides = [Side("processes", n, EnvPool(factory, n, -(-AT_ONCE // n), 10_000)) for n in sizes]
    if cluster:
        there = partial(open_on_node, params.env, False, identity_of(domain, params.env), cache)
        sides += [Side("actors", n, EnvPool(there, n, -(-AT_ONCE // n), 10_000, opener=cluster.open)) for n in sizes]
        print(f"nodes (CPUs): {sorted(cluster.rooms().values())}")
    print(f"{len(jobs)} episodes of {STEPS} steps a round, {rounds} rounds, {os.cpu_count()} cores\n", flush=True)
    try:
        await measure(sides, jobs, setting, rounds)
    finally:
        for side in sides:
            await side.pool.close()
    print(table(sides, len(jobs)))


def main() -> None:
    """Read the arguments and measure in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", default="1,2", help="numbers of workers; the smallest is what others are compared to"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--address", default="local", help="ray.address; empty: processes only")
    args = parser.parse_args()
    sizes = sorted(int(n) for n in args.workers.split(","))
    params, before = settle(load_params()), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a task's data is relative to the working directory
        try:
            asyncio.run(run(params, sizes, args.rounds, args.address or None))
        finally:
            os.chdir(before)


if __name__ == "__main__":
    main()
