"""Whole episodes per minute: the same games, weights and cores, played by plain transformers and by this project.

    python benchmarks/rollout_speed.py --model models/base [--episodes 42] [--modes abcd]
    python benchmarks/rollout_speed.py --model models/base --growth [50,100,200]
    python benchmarks/rollout_speed.py --scripted --growth [50,200,800]     # the environment alone

Run it from the project's root, on a machine that does nothing else: each takes about half an hour on two cores with
the embedded model. All modes play greedily on real ALFWorld games that were translated before; loading is not
timed. Modes:
  a  plain float32 `generate` of the whole history each turn, one episode at a time, no KV cache kept between turns
  b  plain float32 `generate` of all running episodes as one left-padded batch, the whole histories each turn
  c  this project as `model.engine: auto` has it
  d  this project's torch engine in float32: the precision of a
  e  this project's OpenVINO engine in float32 arithmetic (its weights are rounded to 16 bits first)
  f  as b, in the precision that c computes in
Each is measured in a process of its own. Beside d, a and b do not play: it would take them hours. They answer turns of
what d played, whose float32 play is their own token by token (their actions are compared), which tells their speed: a
answers turns drawn at random, b batches spread evenly over the length of the games, each the next turn of all episodes
that got so far, which is the lock-step that costs it the least padding. Then, on all that d played: how often c's next
action is d's, the paired difference of their successes, and whether the bars are reached. --growth has every worker
replaced several times in its longest run, so that memory that grows beyond that would be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import msgspec
import rollout_tables
from plain_models import BatchedModel, Clock, Memory, PlainModel, TimedModel, TimedPool, start_workers, walk
from rollout_tables import Measured
from rollout_turns import Job, agree, alone, together

from ragdistill.agents import make_agent
from ragdistill.envs import make_domain
from ragdistill.envs.pool import EnvPool
from ragdistill.errors import EnvironmentFault
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import ChatModel, Sampling, cpu_env
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, load_params
from ragdistill.records import Message, StopReason, Task, Trajectory, read_jsonl
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.common import quiet_libraries
from ragdistill.stages.defaults import settle
from ragdistill.stages.playing import open_model

REPLACED = 3
"""Times that --growth has each worker replaced in its longest run."""


def measure(job: Job) -> Measured:
    """Load, warm up, play, compare; runs in a process of its own."""
    quiet_libraries()
    cpu_env.apply()
    return asyncio.run(_measure(job, settle(load_params())))


async def _measure(job: Job, params: Params) -> Measured:
    setting, model = _setting(job, params), open_engine(job, params)
    if job.turns:
        await model.chat(_HELLO, Sampling(max_tokens=8), "warm")
        await model.forget("warm")
        return await (together if isinstance(model, BatchedModel) else alone)(model, setting, job)
    concurrency = 1 if job.mode == "a" else job.concurrency
    workers, factory = params.env.workers, make_domain(params.env).env_factory(cache_dir("env"), False)
    pool = EnvPool(factory, workers, -(-job.concurrency // workers), job.recycle, params.env.step_timeout)
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
            seconds, replaced = time.perf_counter() - started, memory.replaced
        cpu = pool.busy_seconds - cpu
    finally:
        await pool.close()
    faults = [t.error for t in played if t.stop is StopReason.INFRA_ERROR]
    if faults:
        raise EnvironmentFault(f"{len(faults)} episodes of mode {job.mode} had faults ({faults[0]}); run it again.")
    agreement = await asyncio.gather(*(agree(model, setting, t) for t in job.histories))
    shares = {what: spent / seconds for what, spent in clock.seconds.items()}
    sizes = memory.first, memory.last, memory.peak
    return Measured(tuple(played), seconds, shares, cpu, sizes, tuple(agreement), replaced, memory.quarters)


_HELLO = (Message(role="system", content="Be brief."), Message(role="user", content="Say hello."))


def _setting(job: Job, params: Params) -> Setting:
    """Greedy play of the project's agent, within the context that every mode can hold."""
    limits = params.agent
    if job.model:
        from ragdistill.llm.weights import MAX_CONTEXT

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


def compared(jobs: Sequence[Job], one: ProcessPoolExecutor, drawn: Mapping[str, int]) -> dict[str, Measured]:
    """Measure the modes, float32 first: what it played is what the others are compared on."""
    found: dict[str, Measured] = {}
    for job in sorted(jobs, key=lambda job: "dabcef".index(job.mode)):
        exact = found.get("d") or found.get("a")
        if exact and drawn.get(job.mode):
            job = replace(job, histories=exact.played, turns=drawn[job.mode])  # noqa: PLW2901 - the same, on d's play
        elif exact and job.mode == "c":
            job = replace(job, histories=exact.played)  # noqa: PLW2901 - the same, on float32's play
        found[job.mode] = one.submit(measure, job).result()
        print(f"{job.mode} measured", file=sys.stderr, flush=True)
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--tasks", type=Path, help="a tasks jsonl; without it development games are made")
    parser.add_argument("--episodes", type=int, default=42, help="each on a game of its own")
    parser.add_argument("--turns", type=int, default=60, help="of d's that a answers; 0 = a plays all episodes")
    parser.add_argument("--batches", type=int, default=6, help="of d's turns that b answers; 0 = b plays all episodes")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=32, help="episodes at once, in all modes but a")
    parser.add_argument("--modes", default="abcd")
    parser.add_argument(
        "--growth", type=_numbers, nargs="?", const=[], metavar="N,N", help="play so many with c instead"
    )
    parser.add_argument("--games", type=int, default=24, help="of --growth; further episodes play them again")
    parser.add_argument("--recycle", type=int, help="resets before a worker is replaced")
    parser.add_argument("--scripted", action="store_true", help="of --growth: no model, the environment alone")
    args = parser.parse_args()
    if set(args.modes) - set("abcdef"):
        parser.error("--modes are letters of abcdef")
    if (args.model is None) != args.scripted or (args.scripted and args.growth is None):
        parser.error("give --model DIR, or --growth with --scripted")
    env = load_params().env
    if args.growth is not None:
        args.growth = args.growth or ([50, 200, 800] if args.scripted else [50, 100, 200])
        args.recycle = args.recycle or max(1, max(args.growth) // (REPLACED * env.workers))
    args.recycle = args.recycle or env.recycle_after
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
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as one,
    ):
        out, shape = Path(folder), (args.max_steps, args.concurrency, args.recycle)
        if args.growth:
            tasks, mode = games(args, min(args.games, max(args.growth)), out), "s" if args.scripted else "c"
            jobs = [Job(mode, args.model, tasks, n, *shape) for n in args.growth]
            rollout_tables.growth([one.submit(measure, job).result() for job in jobs], args.recycle)
        else:
            tasks = games(args, args.episodes, out)
            jobs = [Job(m, args.model, tasks, args.episodes, *shape) for m in sorted(set(args.modes))]
            rollout_tables.compare(compared(jobs, one, {"a": args.turns, "b": args.batches}))


if __name__ == "__main__":
    main()
