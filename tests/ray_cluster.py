"""A real Ray cluster on this machine: one `ray start --block` a node, with a raylet each, killed as machines die."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

HOST = "127.0.0.1"
STORE = 80 * 2**20
STARTED = b"Ray runtime started"
TRIES = 8
OWN = "own"
"""Folder of what nodes keep for themselves."""
Node = subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _start(where: Path, *arguments: str) -> Node:
    """A node that has joined. Its processes know nothing of this checkout: the code has to come from the driver.

    Ray gives a node 30 seconds to start, which are not enough on a busy machine: then it is tried again.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAGDISTILL_CACHE", "DVC_ROOT")}
    env |= {"RAGDISTILL_CACHE": str(where / OWN), "HOME": str(where)}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--include-log-monitor=false",
        f"--object-store-memory={STORE}", "--disable-usage-stats", *arguments,
    ]  # fmt: skip
    log = where / "log"
    for _ in range(TRIES):
        with log.open("wb") as out:
            node = subprocess.Popen(command, cwd=where, env=env, stdout=out, stderr=out)
        while node.poll() is None:
            if STARTED in log.read_bytes():
                return node
            time.sleep(0.2)
    raise AssertionError(f"no node started: {log.read_text()[-2000:]}")


def kill(node: Node) -> int:
    """SIGKILL for the node's raylet, agents and actors at once; returns how many processes there were."""
    try:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            process.suspend()  # so that none of them sees another one end first
        except psutil.NoSuchProcess:
            continue
    for process in family:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    node.wait()
    return len(family)


@contextmanager
def cluster(size: int) -> Iterator[tuple[str, Sequence[Node], Path]]:
    """`size` raylets of one CPU; yields the address, the nodes, the head (the driver's) first, and their folder."""
    where = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie below it
    port = free_port()
    nodes: list[Node] = []
    try:
        nodes += [_start(where, "--head", f"--port={port}", f"--temp-dir={where / 't'}", "--include-dashboard=false")]
        found = re.search(rb"--address='([^']+)'", (where / "log").read_bytes())
        address = found[1].decode() if found else f"{HOST}:{port}"
        while len(nodes) < size:
            nodes.append(_start(where, f"--address={address}"))
        yield address, nodes, where
    finally:
        for node in reversed(nodes):
            kill(node)
        shutil.rmtree(where, ignore_errors=True)
