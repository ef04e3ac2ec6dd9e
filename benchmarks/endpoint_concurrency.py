"""Throughput of the adaptive number of calls at once, against the best fixed number found by a sweep.

    PYTHONPATH=src:. python benchmarks/endpoint_concurrency.py [--calls 1500] [--clients 96] [--seconds 1]

A real HTTP server of a fixed capacity, and `EndpointModel` itself with its journal and ledger. Three kinds of server:
`queue` computes so many calls at once and lets others wait, `refuse` answers 429 with Retry-After instead, `batch` is
slower the more calls it has (throughput saturates). Each call takes about `--seconds`, drawn anew, all of it sleep. The
adaptive run knows nothing of the server; "settled" leaves out its first third. Prints one table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.misbehaving import Act, Seen, serving

from ragdistill.llm import Sampling
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.llm.limiter import AdaptiveLimiter
from ragdistill.params import EndpointParams, PriceParams
from ragdistill.records import Message

SWEEP = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96)


class FixedLimiter(AdaptiveLimiter):
    """Always the same number of calls at once."""

    def __init__(self, most: int) -> None:
        """`most`: that number."""
        super().__init__(most)
        self._level = self._limit = float(most)

    def _judge(self, throughput: float) -> None:
        del throughput

    def congested(self, turn: object) -> None:
        """Nothing changes."""
        del turn


def server_kind(kind: str, capacity: int, seconds: float, seen: Callable[[], Seen]) -> Callable[..., Act]:
    """What the server does with each request."""
    rng = random.Random(0)
    free_at = [0.0] * capacity

    def act(number: int, body: dict) -> Act:
        del number, body
        takes, under_way = seconds * max(0.2, rng.gauss(1, 0.3)), seen().at_once
        if kind == "refuse":
            return (
                Act(delay=takes) if under_way <= capacity else Act("status", status=429, headers={"retry-after": "0.2"})
            )
        if kind == "batch":
            return Act(delay=takes * (1 + under_way / capacity))
        now = time.monotonic()
        first = min(range(capacity), key=free_at.__getitem__)
        free_at[first] = max(now, free_at[first]) + takes
        return Act(delay=free_at[first] - now)

    return act


def settings(url: str, clients: int) -> EndpointParams:
    """A free, patient endpoint."""
    free = PriceParams(prompt=0.0, cached=0.0, completion=0.0)
    return EndpointParams(
        base_url=url, model="m", api_key_env=None, tokenizer=None, deadline=60.0, retries=1000,
        max_concurrency=clients, prices=free, budget=None, currency="USD",
    )  # fmt: skip


def measure(kind: str, capacity: int, fixed: int | None, args: argparse.Namespace) -> tuple[float, float, int]:
    """(calls a second, the same without the first third, the limit in the end)."""
    server: list[Seen] = []
    with (
        serving(server_kind(kind, capacity, args.seconds, lambda: server[0])) as seen,
        tempfile.TemporaryDirectory() as folder,
    ):
        server.append(seen)
        model = EndpointModel(settings(seen.url, args.clients), Path(folder) / "calls", Path(folder) / "l", "bench")
        if fixed is not None:
            model._limiter = FixedLimiter(fixed)
        left = iter(range(args.calls))
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
        start, stop = len(ends) // 3, len(ends) - args.clients  # the end, where clients run out, is nobody's
        settled = (stop - start) / (ends[stop] - ends[start])
        return stop / (ends[stop] - began), settled, model._limiter.limit


def main() -> None:
    """Sweep, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--capacity", type=int, default=16)
    parser.add_argument("--sweep", type=int, nargs="+", default=SWEEP)
    parser.add_argument("--kinds", nargs="+", default=["queue", "refuse", "batch"])
    args = parser.parse_args()
    print(f"{args.calls} calls of {args.seconds} s, {args.clients} clients, {os.cpu_count()} cores")
    print("server      best fixed    its calls/s    adaptive, whole run    settled    limit in the end")
    for kind in args.kinds:
        numbers = [n for n in args.sweep if n <= args.clients]
        fixed = {n: measure(kind, args.capacity, n, args)[0] for n in numbers}
        best = max(fixed, key=fixed.__getitem__)
        whole, settled, limit = measure(kind, args.capacity, None, args)
        print(
            f"{kind:<10}  {best:>10}  {fixed[best]:>13.1f}  {whole:>11.1f} ({whole / fixed[best]:.0%})"
            f"  {settled:>8.1f} ({settled / fixed[best]:.0%})  {limit:>10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
