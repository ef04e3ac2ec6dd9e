"""Speed and memory of the WebShop simulator, with a verdict on each bar.

    python benchmarks/webshop_speed.py [--large 100000] [--workers 8] [--cache DIR]

First build (the embedded catalogue made anew; later starts find it in the cache), start-up (imports, catalogue opened,
first results), steps per second of one process on the embedded catalogue, search
time there and on a synthetic catalogue of `--large` products (0 leaves it out; building it takes minutes), and the
memory of `--workers` processes that each have that one open and as many products in memory as they ever keep (PSS:
shared pages are counted once). Times are CPU seconds, so that other work on the machine disturbs them little; start-up
is wall time. A smaller `--large` or `--workers` than the bar's, or fewer `--episodes` and `--queries`, is a trial of
the program: it reaches nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from ragdistill.envs.webshop.catalogue import KEPT, Catalogue
from ragdistill.envs.webshop.shop import Visit
from ragdistill.envs.webshop.sources import catalogue_folder

START_UP, STEPS, SMALL_SEARCH, LARGE_SEARCH, MEMORY = 1.0, 2000.0, 1.0, 50.0, 2.0
"""Bars: seconds to the first results, steps/s a core, ms a search on 1k and on `LARGE` products, GB of `WORKERS`."""
LARGE, WORKERS = 100_000, 8
EPISODES, QUERIES = 400, 500
_SEARCHES = 2000
"""Of a worker, at most, until it keeps `KEPT` products."""
START = """
import sys, time
from pathlib import Path
from ragdistill.envs.webshop.catalogue import Catalogue
from ragdistill.envs.webshop.shop import Visit
shelves = Catalogue(Path(sys.argv[1]))
Visit(shelves, shelves.goal("synthetic", 0)).act("search[shoes]")
print(time.process_time())
"""


def first_build(scratch: Path) -> float:
    """CPU seconds of making the embedded catalogue where there is none, imports left out."""
    with tempfile.TemporaryDirectory(dir=scratch) as empty:
        began = time.process_time()
        catalogue_folder(Path(empty), None)
        return time.process_time() - began


def start_up(folder: Path) -> tuple[float, float]:
    """(CPU, wall) seconds from a new interpreter to the first page of results."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", START, str(folder)], check=True, capture_output=True, text=True)
    return float(done.stdout), time.perf_counter() - began


def steps_per_second(folder: Path, episodes: int) -> float:
    """Random visits as an agent would make them: search, open, look, choose, buy; about nine actions each."""
    shelves, rng, steps = Catalogue(folder), random.Random(0), 0
    rows = shelves.goal_rows("synthetic")
    began = time.process_time()
    for row in rng.choices(rows, k=episodes):
        goal = shelves.goal(row.source, row.number)
        visit = Visit(shelves, goal, show_chosen=True)
        visit.act(f"search[{goal.instruction.split(', and price')[0]}]")
        steps += 1
        for _ in range(7):
            wanted = [c for c in visit.page.clickables if c != "buy now"]
            visit.act(f"click[{rng.choice(wanted)}]" if wanted else f"search[{goal.instruction}]")
            steps += 1
        if "buy now" in visit.page.clickables:
            visit.act("click[buy now]")
            steps += 1
    return steps / (time.process_time() - began)


def search_milliseconds(folder: Path, queries: int) -> float:
    """Mean CPU time of a search for an instruction."""
    shelves, rng = Catalogue(folder), random.Random(0)
    rows = rng.choices(shelves.goal_rows("synthetic"), k=queries)
    texts = [shelves.goal(row.source, row.number).instruction.split(", and price")[0] for row in rows]
    shelves.search(texts[0])
    began = time.process_time()
    for text in texts:
        shelves.search(text)
    return 1000 * (time.process_time() - began) / queries


def _work(folder: str, goals: int, number: int, link: Connection) -> None:
    shelves, rng, kept = Catalogue(Path(folder)), random.Random(number), set[str]()
    for _ in range(_SEARCHES):
        found = shelves.search(shelves.goal("synthetic", rng.randrange(goals)).instruction)
        kept.update(shelves.product(asin).asin for asin in found)
        if len(kept) >= min(KEPT, len(shelves)):
            break
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    link.send((int(fields["Pss"].split()[0]) * 1024, len(kept)))
    link.recv()  # all stay alive until all have been measured


def memory(folder: Path, workers: int) -> tuple[float, int]:
    """(GB of all workers together, shared pages once; products that the emptiest of them keeps)."""
    context = multiprocessing.get_context("spawn")
    goals, links, running = len(Catalogue(folder).goal_rows("synthetic")), [], []
    for number in range(workers):
        ours, theirs = context.Pipe()
        running.append(context.Process(target=_work, args=(str(folder), goals, number, theirs), daemon=True))
        running[-1].start()
        theirs.close()  # so that a worker that dies ends the wait
        links.append(ours)
    sizes = [link.recv() for link in links]
    for link, process in zip(links, running, strict=True):
        link.send(None)
        process.join()
    return sum(size for size, _ in sizes) / 1e9, min(kept for _, kept in sizes)


def row(what: str, measured: float, unit: str, bar: float, *, at_least: bool = False, trial: bool = False) -> None:
    """Print a line of the table."""
    met = measured >= bar if at_least else measured <= bar
    verdict = "a trial" if trial else "reached" if met else "missed"
    sign, digits = "≥" if at_least else "≤", 0 if measured >= 100 else 2
    print(f"| {what} | {measured:,.{digits}f} {unit} | {sign} {bar:g} {unit}: {verdict} |", flush=True)


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--large", type=int, default=LARGE)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--cache", type=Path, help="keeps the catalogues for the next time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="webshop-speed-") as scratch:
        measure(args, args.cache or Path(scratch), Path(scratch))


def measure(args: argparse.Namespace, cache: Path, scratch: Path) -> None:
    """All rows, the large catalogue's last."""
    print("| what | measured | bar |\n|---|---:|---|")
    built = first_build(scratch)  # before anything is built in this process, so that all it has to load counts
    small, few = catalogue_folder(cache, None), args.queries < QUERIES
    size = len(Catalogue(small))
    print(f"| first build, {size:,} products | {built:.1f} s CPU | – |", flush=True)
    cpu, wall = start_up(small)
    row(f"start-up, {size:,} products ({cpu:.2f} s CPU)", wall, "s", START_UP)
    steps = steps_per_second(small, args.episodes)
    row("steps, one process", steps, "steps/s", STEPS, at_least=True, trial=args.episodes < EPISODES)
    row(f"search, {size:,} products", search_milliseconds(small, args.queries), "ms", SMALL_SEARCH, trial=few)
    if args.large:
        began = time.process_time()
        large, trial = catalogue_folder(cache, args.large), args.large < LARGE
        built = time.process_time() - began
        print(f"| build, {args.large:,} products | {built:.0f} s CPU | – |", flush=True)
        milliseconds = search_milliseconds(large, args.queries)
        row(f"search, {args.large:,} products", milliseconds, "ms", LARGE_SEARCH, trial=trial or few)
        total, kept = memory(large, args.workers)
        what = f"memory (PSS), {args.workers} workers on these, each with {kept:,} of them in mind"
        row(what, total, "GB", MEMORY, trial=trial or args.workers < WORKERS)


if __name__ == "__main__":
    main()
