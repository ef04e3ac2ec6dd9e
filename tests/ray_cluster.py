"""A real Ray cluster on this machine: one `ray start --block` a node, with a raylet each, killed as machines die."""

from __future__ import annotations

import os
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _start(where: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A node whose processes know nothing of this checkout: the code has to come from the driver."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAGDISTILL_CACHE", "DVC_ROOT")}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", f"--node-ip-address={HOST}",
        f"--object-store-memory={STORE}", "--disable-usage-stats", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=where, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(node: subprocess.Popen[bytes]) -> int:
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
def cluster(size: int) -> Iterator[tuple[str, Sequence[subprocess.Popen[bytes]]]]:
    """`size` raylets of one CPU; yields the address and the nodes, the head (where the driver is) first."""
    where = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie below it
    address = f"{HOST}:{free_port()}"
    head = ("--head", f"--port={address.split(':')[1]}", f"--temp-dir={where / 't'}", "--include-dashboard=false")
    nodes = [_start(where, *head)]
    try:
        _wait_for(address)
        nodes += [_start(where, f"--address={address}") for _ in range(size - 1)]
        yield address, nodes
    finally:
        for node in reversed(nodes):
            kill(node)
        shutil.rmtree(where, ignore_errors=True)


def _wait_for(address: str, seconds: float = 240.0) -> None:
    host, port = address.split(":")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def wait_for_nodes(address: str, size: int, seconds: float = 240.0) -> None:
    """Until all raylets have joined; leaves the cluster again."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        end = time.monotonic() + seconds
        while sum(n["Alive"] for n in ray.nodes()) < size:
            assert time.monotonic() < end, "the nodes did not join"
            time.sleep(0.5)
    finally:
        ray.shutdown()
