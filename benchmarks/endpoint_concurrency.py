"""Throughput of the adaptive number of calls at once, against the best fixed number found by a sweep.

    PYTHONPATH=src:. python benchmarks/endpoint_concurrency.py [--calls 1500] [--clients 96] [--seconds 1]
    PYTHONPATH=src:. python benchmarks/endpoint_concurrency.py --virtual [--calls 800 3000] [--capacity 16 48]

A real HTTP server of a fixed capacity, and `EndpointModel` itself with its journal and ledger. Three kinds of server:
`queue` computes so many calls at once and lets others wait, `refuse` answers 429 with Retry-After instead, `batch` is
slower the more calls it has (throughput saturates). Each call takes about `--seconds`, drawn anew, all of it sleep. The
adaptive run knows nothing of the server; "settled" leaves out its first third. Prints one table.

`--virtual`: the same servers and the limiter alone, without HTTP, on a clock that costs no time; many runs in minutes.
It prints the calls' latency too: at a queue, throughput alone would praise a limiter that lets everything through.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.misbehaving import Act, Seen, serving
from tests.virtual_server import KINDS, RETRY_AFTER, FixedLimiter, Run, Server, measured, simulate

from ragdistill.llm import Sampling
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.llm.limiter import AdaptiveLimiter
from ragdistill.params import EndpointParams, PriceParams
from ragdistill.records import Message

SWEEP = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 200, 256)


def script(server: Server, seen: Callable[[], Seen]) -> Callable[..., Act]:
    """What the HTTP server does with each request."""

    def act(number: int, body: dict) -> Act:
        del number, body
        takes = server.takes(time.monotonic(), seen().at_once)
        if takes is None:
            return Act("status", status=429, headers={"retry-after": str(RETRY_AFTER)})
        return Act(delay=takes)

    return act


def settings(url: str, clients: int) -> EndpointParams:
    """A free, patient endpoint."""
    free = PriceParams(prompt=0.0, cached=0.0, completion=0.0)
    return EndpointParams(
        base_url=url, model="m", api_key_env=None, tokenizer=None, deadline=60.0, retries=1000,
        max_concurrency=clients, prices=free, budget=None, currency="USD",
    )  # fmt: skip


def measure(kind: str, capacity: int, fixed: int | None, calls: int, args: argparse.Namespace) -> Run:
    """One run over real HTTP."""
    seens: list[Seen] = []
    server = Server(kind, capacity, args.seconds, args.noise)
    with serving(script(server, lambda: seens[0])) as seen, tempfile.TemporaryDirectory() as folder:
        seens.append(seen)
        model = EndpointModel(settings(seen.url, args.clients), Path(folder) / "calls", Path(folder) / "l", "bench")
        if fixed is not None:
            model._limiter = FixedLimiter(fixed, time.monotonic)
        left = iter(range(calls))
        ends: list[float] = []

        async def client() -> None:
            for i in left:
                await model.chat([Message(role="user", content=str(i))], Sampling(max_tokens=8))
                ends.append(time.monotonic())

        async def everyone() -> None:
            await asyncio.gather(*(client() for _ in range(args.clients)))

        began = time.monotonic()
        asyncio.run(everyone())
        model.close()
        refused = len(seen.bodies) - len(seen.answered)
        rates = measured([end - began for end in ends], args.clients)
        return Run(*rates, math.nan, refused, model._limiter.limit)  # how long the server took is not known here


def virtual_table(args: argparse.Namespace) -> None:
    """Print what is measured on the virtual clock: means over the seeds, in brackets the least."""
    print(f"virtual clock: {args.clients} clients, {args.seeds} seeds, sd {args.noise:.0%} of a call's seconds;")
    print("for each number of calls: whole run (least) / settled, seconds at the server, refused\n")
    print("| server | capacity | best fixed |" + "".join(f" {n:,} calls |" for n in args.calls))
    print("|---|---:|---:|" + "---:|" * len(args.calls))

    def runs(kind: str, capacity: int, calls: int, fixed: int | None, seeds: int) -> list[Run]:
        def limiter(most: int, clock: Callable[[], float]) -> AdaptiveLimiter:
            return AdaptiveLimiter(most, clock) if fixed is None else FixedLimiter(fixed, clock)

        servers = (Server(kind, capacity, args.seconds, args.noise, seed) for seed in range(seeds))
        return [simulate(server, calls, args.clients, limiter) for server in servers]

    for kind in args.kinds:
        for capacity in args.capacity:
            numbers = [n for n in args.sweep if n <= args.clients]
            swept = {n: runs(kind, capacity, args.calls[0], n, 1)[0].whole for n in numbers}
            best = max(swept, key=swept.__getitem__)
            cells = []
            for calls in args.calls:
                bar = statistics.mean(run.whole for run in runs(kind, capacity, calls, best, args.seeds))
                found = runs(kind, capacity, calls, None, args.seeds)
                whole = [run.whole / bar for run in found]
                settled = statistics.mean(run.settled / bar for run in found)
                refused = statistics.mean(run.refused for run in found)
                seconds = statistics.mean(run.seconds for run in found)
                share = f"{statistics.mean(whole):.0%} ({min(whole):.0%}) / {settled:.0%}, {seconds:.1f} s"
                cells.append(share + (f", {refused:.0f}" if kind == "refuse" else ""))
            print(f"| `{kind}` | {capacity} | {best} | {' | '.join(cells)} |", flush=True)


def http_table(args: argparse.Namespace) -> None:
    """Print what is measured over real HTTP."""
    print("server      capacity   calls    best fixed    its calls/s    adaptive, whole run    settled    refused")
    for kind in args.kinds:
        for capacity in args.capacity:
            for calls in args.calls:
                numbers = [n for n in args.sweep if n <= args.clients]
                fixed = {n: measure(kind, capacity, n, calls, args).whole for n in numbers}
                best = max(fixed, key=fixed.__getitem__)
                run = measure(kind, capacity, None, calls, args)
                print(
                    f"{kind:<10}  {capacity:>8}  {calls:>6}  {best:>12}  {fixed[best]:>13.1f}"
                    f"  {run.whole:>14.1f} ({run.whole / fixed[best]:.0%})"
                    f"  {run.settled:>8.1f} ({run.settled / fixed[best]:.0%})  {run.refused:>9}",
                    flush=True,
                )


def main() -> None:
    """Sweep, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--calls", type=int, nargs="+", default=[1500])
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of a call's time, as a share")
    parser.add_argument("--capacity", type=int, nargs="+", default=[16])
    parser.add_argument("--sweep", type=int, nargs="+", default=SWEEP)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", type=int, default=5, help="with --virtual")
    args = parser.parse_args()
    if args.virtual:
        virtual_table(args)
    else:
        print(f"real HTTP: calls of {args.seconds} s, {args.clients} clients, {os.cpu_count()} cores")
        http_table(args)


if __name__ == "__main__":
    main()
