"""Environments on the nodes of a Ray cluster: `RayPool`, with the leases of `EnvPool`.

    pool = RayPool(params.ray, params.env, admissible=False, at_once=64, cache=cache_dir("env"))
    async with pool.lease() as env:
        ...
    await pool.close()

Each worker is an actor on a node chosen here, the one with most free CPUs. The project's code goes to the nodes from
here (Ray's `py_modules`) and each game with its reset, checked by its hash; what else an environment reads is found
there as here, and a node whose environment has another fingerprint is refused. A node that dies fails its episodes with
`EnvironmentFault`, as a dead process does, so that they are played again elsewhere; what is finished lies in the
journal of the machine that plays. Knows no particular environment, no model and no journal.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import ragdistill
from ragdistill.envs import check_game, identity_of, make_domain
from ragdistill.envs.hosts import PREPARE, Factory, Host
from ragdistill.envs.pool import EnvPool, LeasedEnv
from ragdistill.envs.ray_node import NodeWorker, open_on_node
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.params import EnvParams, RayParams
from ragdistill.records import Task

AVOIDED = 30.0
"""Seconds a node gets no new episode after an actor on it died; Ray needs some to find out that a node is gone."""
OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory of a cluster started here: a message is an observation or one game."""
_CPUS = 0.5
"""Of a node's CPUs one is counted for an actor, and half of it reserved: its successor starts before it has ended."""
_FRESH = 1.0
"""Seconds for which the list of nodes is not asked for again."""


def connect(address: str) -> ModuleType:
    """Ray, connected to the cluster at `address` (auto | local | host:port); `ConfigError` when that is impossible."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = import_module("ray")
    except ImportError:
        raise ConfigError(
            "ray.address is set, but Ray is not installed; in the project's root run "
            "`.venv/bin/pip install -c constraints.txt -e '.[ray]'`, or set ray.address: null."
        ) from None
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if ":" in place and "://" not in place and (silence := _silence(place)):
        raise ConfigError(f"No Ray cluster answers at ray.address {place} ({silence}); name the head's host:port.")
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    package = str(Path(ragdistill.__file__).parent)
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"py_modules": [package]}, **local
        )
    except Exception as e:  # noqa: BLE001 - boundary: Ray raises bare exceptions too, on a time-out for one
        raise ConfigError(f"No Ray cluster answers ({said(e)}); `ray start` one (docs/cluster.md), or "
                          "set ray.address to local, or to null.") from None  # fmt: skip
    return ray


def _silence(place: str) -> str:
    """Why nobody listens at host:port, "" if somebody does. Ray itself waits for a minute and then ends the process."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as e:
        return str(e)
    return ""


def said(e: Exception) -> str:
    """Ray's long messages in one line: what happened is in the first of theirs, and why in the last."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(e)).splitlines() if line.strip()]
    if len(lines) < 2:
        return (lines or [type(e).__name__])[0][:300].rstrip(".")
    return f"{lines[0][:150].rstrip('.:')}: {lines[-1][:300].rstrip('.')}"


def sizes(params: RayParams, at_once: int) -> tuple[int, int]:
    """(most actors, episodes each). Without `ray.workers` as many as there is room for, now or when nodes join."""
    workers = min(params.workers or at_once, at_once)
    return workers, -(-at_once // workers)


class RayPool:
    """Up to `params.workers` actors (null: one a CPU of the cluster, as it is then), together for `at_once` episodes.

    `cache` is this machine's folder of what environments keep; nodes that see it under the same name share it. Connects
    at once. Raises `ConfigError` without Ray, without a cluster, or where no node has a CPU.
    """

    def __init__(self, params: RayParams, env: EnvParams, admissible: bool, at_once: int, cache: Path) -> None:
        shared = shared_name(cache)
        factory = partial(open_on_node, env, admissible, identity_of(make_domain(env), env), shared)
        self._cluster = Cluster(connect(params.address or "auto"), shared)
        if not self._cluster.rooms():
            self._cluster.ray.shutdown()
            raise ConfigError("No node of the Ray cluster has a CPU for an environment; start one with --num-cpus.")
        workers, slots = sizes(params, at_once)
        self._pool = EnvPool(factory, workers, slots, env.recycle_after, env.step_timeout, self._cluster.open)

    def lease(self) -> AbstractAsyncContextManager[LeasedEnv]:
        """As `EnvPool.lease`."""
        return self._pool.lease()

    @property
    def busy_seconds(self) -> float:
        """CPU seconds that all actors spent on requests."""
        return self._pool.busy_seconds

    async def close(self) -> None:
        """End all actors and leave the cluster (a local one ends). May be called twice."""
        await self._pool.close()
        if not self._cluster.gone:
            self._cluster.ray.shutdown()


def shared_name(cache: Path) -> Path:
    """What the folder `cache`, which is made, is called here; a node that has it under this name shares it."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache.resolve()


class Cluster:
    """The nodes, and which of them are avoided for now."""

    def __init__(self, ray: ModuleType, shared: Path) -> None:
        self.ray, self._shared = ray, shared
        self.gone = False
        """The head does not answer: what asks it would wait for a minute, and then end the process."""
        self._avoided: dict[str, float] = {}
        self._rooms: tuple[float, dict[str, int]] = (-_FRESH, {})

    def rooms(self) -> dict[str, int]:
        """Living node → its whole CPUs, where it has any. `ConfigError` when the cluster's head does not answer."""
        asked, found = self._rooms
        if time.monotonic() - asked > _FRESH:
            nodes = self._nodes()
            alive = [n for n in nodes if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
            found = {n["NodeID"]: int(n["Resources"]["CPU"]) for n in alive}
            self._rooms = time.monotonic(), found
        return found

    def _nodes(self) -> list[dict[str, Any]]:
        silence = _silence(self.ray.get_runtime_context().gcs_address)
        try:
            nodes = [] if silence else self.ray.nodes()
        except Exception as e:  # noqa: BLE001 - boundary: whatever Ray raises, it cannot go on
            silence, nodes = said(e), []
        if silence:
            self.gone = True
            raise ConfigError(
                f"The head of the Ray cluster does not answer any more ({silence}); start the cluster and run again, "
                "finished episodes are kept."
            )
        return nodes

    def avoids(self, node: str) -> bool:
        """Whether `node` gets no new episode for now."""
        return time.monotonic() < self._avoided.get(node, 0.0)

    def lost(self, node: str) -> None:
        """An actor of `node` died, perhaps with the node; avoid it, unless all others are avoided too."""
        if any(n != node and not self.avoids(n) for n in self.rooms()):
            self._avoided[node] = time.monotonic() + AVOIDED

    def open(self, factory: Factory, working: Sequence[Host]) -> Host | None:
        """The `hosts.Opener`: an actor on the node with most room beside those at work; None when there is no room."""
        taken = Counter(h.node for h in working if isinstance(h, Actor))
        room = {node: cpus - taken[node] for node, cpus in self.rooms().items()}
        room = {node: free for node, free in room.items() if not self.avoids(node)} or room
        node = max(room, key=lambda n: room[n], default="")
        return Actor(self, node, factory, self._shared) if node and room[node] > 0 else None


class Actor:
    """A `Host` on a node. Created without waiting: its first answer includes the start of its process, which is bounded
    as a step is, and what its first environment builds there, a catalogue perhaps, which is not.
    """

    pid: int | None = None

    def __init__(self, cluster: Cluster, node: str, factory: Factory, shared: Path) -> None:
        self._cluster, self.node, self._ready = cluster, node, False
        strategies = import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        made = cluster.ray.remote(NodeWorker).options(num_cpus=_CPUS, max_restarts=0, scheduling_strategy=there)
        self._handle: Any = made.remote(factory, shared)

    def alive(self) -> bool:
        return not self._cluster.avoids(self.node)

    def exchange(self, slot: int, verb: str, argument: Task | str, timeout: float) -> tuple[Any, float]:
        wrong, get = self._cluster.ray.exceptions, self._cluster.ray.get
        game = game_of(argument) if isinstance(argument, Task) else None
        try:
            if not self._ready:
                get(self._handle.begin.remote(), timeout=timeout)  # its process is there
                failed, seconds = get(self._handle.answer.remote(slot, PREPARE, "", None))
                if failed:
                    return failed, seconds
                self._ready = True
            return get(self._handle.answer.remote(slot, verb, argument, game), timeout=timeout)
        except wrong.GetTimeoutError:
            late = f"An environment actor did not start within {timeout:g} s; free a CPU of the cluster for each of "
            raise TimeoutError("" if self._ready else f"{late}ray.workers, or raise env.step_timeout.") from None
        except wrong.RayTaskError as e:  # the actor lives
            return (EnvironmentFault.__name__, f"A Ray node failed on {verb} ({said(e)})."), 0.0
        except wrong.RayError as e:
            if getattr(e, "actor_init_failed", False):
                raise ConfigError(
                    f"A Ray node cannot run environments ({said(e)}); install there what is installed here "
                    "(docs/cluster.md), or take it out of the cluster."
                ) from None
            self._cluster.lost(self.node)
            raise EOFError(f"{type(e).__name__}: {said(e)}") from None

    def quit(self) -> None:
        """Nothing to wait for: the process ends with its environments."""

    def kill(self) -> None:
        if self._cluster.gone:
            return
        with suppress(self._cluster.ray.exceptions.RayError):
            self._cluster.ray.kill(self._handle)

    def close(self) -> None:
        """Nothing is left on this machine."""


def game_of(task: Task) -> bytes | None:
    """Content of the file below the working directory that `task` names; None when it names none.

    It may be a link out of there, as DVC's `cache.type` symlink makes them: the name is what has to stay below, and
    the content has to be the task's. `IdentityError` when it is not.
    """
    here = Path.cwd()
    path = Path(os.path.normpath(here / task.data))
    if not task.data or not path.is_relative_to(here) or not path.is_file():
        return None
    game = path.read_bytes()
    check_game(task, game)
    return game
