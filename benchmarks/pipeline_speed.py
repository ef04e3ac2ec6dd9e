"""What everyday commands cost: `ragdistill --help`, a `dvc repro` with nothing to do, the memory of a whole run.

    python benchmarks/pipeline_speed.py                        # after `make run`: the two short ones, and their bars
    python benchmarks/pipeline_speed.py --run 'dvc repro'      # any command: its wall time and peak memory

Run it from the project's root, in a shell with `. .venv/bin/activate && . scripts/env`. Memory is the proportional set
size of the command and all that it started, summed (a shared page counts once), read twice a second.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

HELP, NOTHING, MEMORY = 0.5, 5.0, 8.0
"""Bars: seconds of `ragdistill --help`, seconds of a `dvc repro` with nothing to do, GB of a whole run."""


def measured(command: Sequence[str], quiet: bool = True) -> tuple[float, float]:
    """(wall seconds, peak GB) of `command`; ends with its words and status when it fails."""
    out = subprocess.PIPE if quiet else None
    started, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT if quiet else None) as process:
        root, said = psutil.Process(process.pid), b""
        while True:
            try:
                said += process.communicate(timeout=0.5)[0] or b""
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, sum(map(_share, [root, *_children(root)])))
    if process.returncode:
        sys.stderr.buffer.write(said)
        raise SystemExit(process.returncode)
    return time.perf_counter() - started, peak / 1e9


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _share(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it has ended
        return 0


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="COMMAND", help="measure this instead")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.run:
        seconds, memory = measured(shlex.split(args.run), quiet=False)
        print(f"{args.run}: {seconds / 60:.1f} min, at most {memory:.2f} GB (bar {MEMORY:g})")
        return
    bin_dir = Path(sys.executable).parent
    commands = {"ragdistill --help": HELP, "dvc repro": NOTHING}
    print("| command | median s | each | bar |\n|---|---:|---|---|")
    for command, bar in commands.items():
        name, *rest = command.split()
        times = [measured([str(bin_dir / name), *rest])[0] for _ in range(args.rounds)]
        median = statistics.median(times)
        each = ", ".join(f"{t:.2f}" for t in times)
        print(
            f"| {command} | {median:.2f} | {each} | {bar:g} s: {'reached' if median <= bar else 'missed'} |", flush=True
        )


if __name__ == "__main__":
    main()
