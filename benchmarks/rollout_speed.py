"""Whole episodes per minute: the same games, weights and cores, played by plain transformers and by this project.

    python benchmarks/rollout_speed.py --model models/base [--episodes 12] [--modes abcd]
    python benchmarks/rollout_speed.py --model models/base --growth 50,200,800
    python benchmarks/rollout_speed.py --scripted --growth 50,200,800     # the environment alone

Run it from the project's root, on a machine that does nothing else. All modes play greedily on real ALFWorld games
that were translated before; loading is not timed. Modes:
  a  plain float32 `generate` of the whole history each turn, one episode at a time, no KV cache kept between turns
  b  plain float32 `generate` of all running episodes as one left-padded batch, the whole histories each turn
  c  this project as `model.engine: auto` has it
  d  this project's torch engine in float32: the precision of a
  e  this project's OpenVINO engine in float32 arithmetic (its weights are rounded to 16 bits first)
  f  as b, in the precision that c computes in
Each is measured in a process of its own. Then: how often c plays the action that a played, on a's histories.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
from plain_models import BatchedModel, Clock, Memory, PlainModel, TimedModel, TimedPool, start_workers, walk

from ragdistill.agents import make_agent
from ragdistill.envs import make_domain
from ragdistill.envs.pool import EnvPool
from ragdistill.errors import EnvironmentFault
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import ChatModel, Sampling, cpu_env
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, load_params
from ragdistill.records import Message, StopReason, Task, Trajectory, read_jsonl
from ragdistill.rollout import Setting, fit, play_all
from ragdistill.stages.common import quiet_libraries
from ragdistill.stages.defaults import settle
from ragdistill.stages.playing import open_model
from ragdistill.stats import ratio_interval, wilson

MODES = {
    "a": "transformers float32, one by one",
    "b": "transformers float32, batched",
    "c": "ours, engine auto",
    "d": "ours, torch float32",
    "e": "ours, OpenVINO float32",
    "f": "transformers, batched, best precision",
    "s": "scripted",
}
DRAWS = 4000  # bootstrap resamples of the agreement's interval


@dataclass(frozen=True)
class Job:
    """One measurement."""

    mode: str
    model: Path | None
    tasks: tuple[Task, ...]
    episodes: int
    """More than tasks: the tasks are played again."""
    max_steps: int
    concurrency: int
    histories: tuple[Trajectory, ...] = ()
    """Played by a; the mode's next action on each of their histories is compared."""


@dataclass(frozen=True)
class Measured:
    """What a measurement found."""

    played: tuple[Trajectory, ...]
    seconds: float
    shares: dict[str, float]
    """Wall time: some reply being made, else some environment at work, else neither."""
    env_cpu: float
    """CPU seconds of the environment workers; they overlap with the engine."""
    memory: tuple[tuple[float, float], ...]
    """MiB of (process, workers): at the start, at the end, at the peak of the sum."""
    agreement: tuple[tuple[int, int], ...]
    """(equal actions, actions) of each history."""


def measure(job: Job) -> Measured:
    """Load, warm up, play, compare; runs in a process of its own."""
    quiet_libraries()
    cpu_env.apply()
    return asyncio.run(_measure(job, settle(load_params())))


async def _measure(job: Job, params: Params) -> Measured:
    setting, model = _setting(job, params), open_engine(job, params)
    concurrency = 1 if job.mode == "a" else job.concurrency
    workers, factory = params.env.workers, make_domain(params.env).env_factory(cache_dir("env"), False)
    pool = EnvPool(factory, workers, -(-job.concurrency // workers), params.env.recycle_after, params.env.step_timeout)
    jobs = [(job.tasks[i % len(job.tasks)], i // len(job.tasks)) for i in range(job.episodes)]
    try:
        await asyncio.gather(*start_workers(pool, workers, job.tasks[0]))
        await model.chat(_HELLO, Sampling(max_tokens=8), "warm")
        await model.forget("warm")
        cpu = pool.busy_seconds
        with tempfile.TemporaryDirectory() as folder, Memory(pool) as memory:
            journal, clock, started = Journal(Path(folder), Trajectory), Clock(), time.perf_counter()
            timed = TimedModel(model, clock), TimedPool(pool, clock)
            played = await play_all(jobs, setting, *timed, journal, concurrency)
            clock.advance()
            seconds = time.perf_counter() - started
        cpu = pool.busy_seconds - cpu
    finally:
        await pool.close()
    faults = [t.error for t in played if t.stop is StopReason.INFRA_ERROR]
    if faults:
        raise EnvironmentFault(f"{len(faults)} episodes of mode {job.mode} had faults ({faults[0]}); run it again.")
    agreement = await asyncio.gather(*(agree(model, setting, t) for t in job.histories))
    shares = {what: spent / seconds for what, spent in clock.seconds.items()}
    sizes = memory.first, memory.last, memory.peak
    return Measured(tuple(played), seconds, shares, cpu, sizes, tuple(agreement))


_HELLO = (Message(role="system", content="Be brief."), Message(role="user", content="Say hello."))


def _setting(job: Job, params: Params) -> Setting:
    """Greedy play of the project's agent, within the context that every mode can hold."""
    limits = params.agent
    if job.model:
        from ragdistill.llm.local import MAX_CONTEXT

        limits = msgspec.structs.replace(limits, context_tokens=min(limits.context_tokens, MAX_CONTEXT))
    return Setting(
        policy=job.mode, run="benchmark", agent=make_agent(params.agent.name), limits=limits,
        max_steps=job.max_steps, temperature=0.0, environment="", model=job.mode,
    )  # fmt: skip


def open_engine(job: Job, params: Params) -> ChatModel:
    """The model of a mode."""
    if job.model is None:
        return ScriptedModel(walk, "walk")
    from ragdistill.llm.local import LocalEngine, best_dtype
    from ragdistill.llm.openvino import OpenVinoEngine

    match job.mode:
        case "a":
            return PlainModel(job.model)
        case "b" | "f":
            return BatchedModel(job.model, "float32" if job.mode == "b" else best_dtype())
        case "d":
            return LocalEngine(job.model, dtype="float32", max_batch=job.concurrency)
        case "e":
            with mock.patch("ragdistill.llm.openvino.best_dtype", return_value="float32"):
                return OpenVinoEngine(job.model, None, max_batch=job.concurrency, cache=cache_dir("gguf"))
    auto = msgspec.structs.replace(params.model, engine="auto", dtype="auto", concurrency=job.concurrency)
    return open_model(msgspec.structs.replace(params, model=auto), job.model)


async def agree(model: ChatModel, setting: Setting, t: Trajectory) -> tuple[int, int]:
    """On how many of the histories of `t` that led to an action the model plays the same one, and of how many."""
    agent, limits, equal = setting.agent, setting.limits, 0
    acted = [(i, step) for i, step in enumerate(t.steps) if step.action]
    for i, step in acted:
        budget = limits.context_tokens - limits.reply_tokens
        chat = fit(agent.render(t.first_observation, t.hints, t.steps[:i]), budget, model.count_tokens)
        if chat is not None:
            reply = await model.chat(chat, Sampling(max_tokens=limits.reply_tokens), t.id)
            equal += agent.parse(reply.text).action == step.action
    await model.forget(t.id)
    return equal, len(acted)


def games(args: argparse.Namespace, count: int, out: Path) -> tuple[Task, ...]:
    """`count` tasks of the given file, spread over it, or new development games; each translated once, untimed."""
    domain = make_domain(load_params().env)
    if args.tasks:
        found = read_jsonl(args.tasks, Task)
        if len(found) < count:
            raise SystemExit(f"{args.tasks} holds {len(found)} tasks; give --episodes that many at most, or another.")
        tasks = [found[i * len(found) // count] for i in range(count)]
    else:
        tasks = domain.tasks("dev", count, 0, out)
    env = domain.env_factory(cache_dir("env"), False)()
    for task in tasks:
        env.reset(task)
    env.close()
    return tuple(tasks)


def compare(jobs: Sequence[Job], alone: ProcessPoolExecutor) -> None:
    """Measure and print the modes, then the agreement of actions."""
    _print("engine", "episodes", "episodes/min", "steps/min", "generated tokens/s", "× a, episodes", "× a, steps",
           "success [95 %]", "engine", "environment", "elsewhere", "environment CPU", "peak memory, MiB")  # fmt: skip
    _print(*["---"] * 13)
    first = compared = None
    for job in jobs:
        if first and job.mode == "c":
            job = replace(job, histories=first.played)  # noqa: PLW2901 - the same job, with a's play
        m = alone.submit(measure, job).result()
        first = m if job.mode == "a" else first
        compared = m if job.histories else compared
        _print(MODES[job.mode], *_row(m, first))
    if compared:
        equal, total = (np.array(column, float)[:, None] for column in zip(*compared.agreement, strict=True))
        share = ratio_interval(equal, total, DRAWS, 0.95)
        found = f"{100 * share.value:.1f} % [{100 * share.lo:.1f}, {100 * share.hi:.1f}]" if share else "none"
        print(f"\nOn a's histories, c's next action equals a's in {found} of {total.sum():.0f} turns with an action "
              f"({len(total)} episodes, bootstrap over episodes).")  # fmt: skip


def _row(m: Measured, first: Measured | None) -> list[str]:
    n, won, minutes = len(m.played), sum(t.success for t in m.played), m.seconds / 60
    steps, tokens = sum(len(t.steps) for t in m.played), sum(t.usage.completion_tokens for t in m.played)
    ratios = ["–", "–"]
    if first:
        before = first.seconds / 60
        ratios = [f"{n / minutes / (len(first.played) / before):.1f}"]
        ratios += [f"{steps / minutes / (sum(len(t.steps) for t in first.played) / before):.1f}"]
    success = wilson(won, n)
    shares = [f"{100 * m.shares[what]:.0f} %" for what in ("engine", "environment", "elsewhere")]
    return [
        str(n), f"{n / minutes:.1f}", f"{steps / minutes:.0f}", f"{tokens / m.seconds:.0f}", *ratios,
        f"{won}/{n} [{100 * success.lo:.0f}–{100 * success.hi:.0f}]", *shares,
        f"{100 * m.env_cpu / m.seconds:.0f} %", f"{sum(m.memory[2]):.0f}",
    ]  # fmt: skip


def grow(jobs: Sequence[Job], alone: ProcessPoolExecutor) -> None:
    """Measure and print how time and memory go with the number of episodes."""
    _print("episodes", "seconds", "seconds/episode", "steps/episode", "seconds/step", "environment CPU s/episode",
           "process MiB, start → end", "workers MiB, start → end", "peak of both, MiB")  # fmt: skip
    _print(*["---"] * 9)
    for job in jobs:
        m = alone.submit(measure, job).result()
        n, steps, (start, end, peak) = len(m.played), sum(len(t.steps) for t in m.played), m.memory
        _print(
            str(n), f"{m.seconds:.1f}", f"{m.seconds / n:.2f}", f"{steps / n:.1f}", f"{m.seconds / steps:.3f}",
            f"{m.env_cpu / n:.2f}", f"{start[0]:.0f} → {end[0]:.0f}", f"{start[1]:.0f} → {end[1]:.0f}",
            f"{sum(peak):.0f}",
        )  # fmt: skip


def _print(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--tasks", type=Path, help="a tasks jsonl; without it development games are made")
    parser.add_argument("--episodes", type=int, default=12, help="each on a game of its own")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=32, help="episodes at once, in all modes but a")
    parser.add_argument("--modes", default="abcd")
    parser.add_argument("--growth", type=_numbers, metavar="N,N", help="play so many episodes with c instead")
    parser.add_argument("--games", type=int, default=24, help="of --growth; further episodes play them again")
    parser.add_argument("--scripted", action="store_true", help="of --growth: no model, the environment alone")
    args = parser.parse_args()
    if set(args.modes) - set("abcdef"):
        parser.error("--modes are letters of abcdef")
    if (args.model is None) != args.scripted or (args.scripted and not args.growth):
        parser.error("give --model DIR, or --growth N,N with --scripted")
    return args


def main() -> None:
    """Make the games, measure, print."""
    args = parse()
    cpu_env.apply()
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} before the start, "
          f"at most {args.max_steps} steps, {args.concurrency} episodes at once\n", flush=True)  # fmt: skip
    cache = Path(".cache")  # games lie below the working directory, as in the pipeline
    cache.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix="benchmark.") as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        out, shape = Path(folder), (args.max_steps, args.concurrency)
        if args.growth:
            tasks, mode = games(args, min(args.games, max(args.growth)), out), "s" if args.scripted else "c"
            grow([Job(mode, args.model, tasks, n, *shape) for n in args.growth], alone)
        else:
            tasks = games(args, args.episodes, out)
            compare([Job(m, args.model, tasks, args.episodes, *shape) for m in sorted(args.modes)], alone)


if __name__ == "__main__":
    main()
