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

import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import ragdistill
from ragdistill.envs import Env, identity_of, make_domain
from ragdistill.envs.hosts import Factory, Host, Slots
from ragdistill.envs.pool import EnvPool, LeasedEnv
from ragdistill.errors import ConfigError, IdentityError, RagdistillError
from ragdistill.files import write_atomic
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
            "ray.address is set, but Ray is not installed; pip install 'ragdistill[ray]', or set ray.address: null."
        ) from None
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if ":" in place and "://" not in place:
        _knock(place)
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    package = str(Path(ragdistill.__file__).parent)
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"py_modules": [package]}, **local
        )
    except Exception as e:  # noqa: BLE001 - boundary: Ray raises bare exceptions too, on a time-out for one
        raise ConfigError(f"No Ray cluster answers ({_line(e)}); `ray start` one (docs/cluster.md), or "
                          "set ray.address to local, or to null.") from None  # fmt: skip
    return ray


def _knock(place: str) -> None:
    """Ray itself waits for minutes, and then ends the process, where nobody listens."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as e:
        raise ConfigError(f"No Ray cluster answers at ray.address {place} ({e}); name the head's host:port.") from None


def _line(e: Exception) -> str:
    """The first sentence of one of Ray's long messages."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300].rstrip(".")


class RayPool:
    """Up to `params.workers` actors (null: one a CPU of the cluster), together for `at_once` episodes.

    `cache` is this machine's folder of what environments keep; nodes that see it under the same name share it. Connects
    at once. Raises `ConfigError` without Ray, without a cluster, or where no node has a CPU.
    """

    def __init__(self, params: RayParams, env: EnvParams, admissible: bool, at_once: int, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        shared = cache.resolve()
        factory = partial(open_on_node, env, admissible, identity_of(make_domain(env), env), shared)
        self._cluster = Cluster(connect(params.address or "auto"), shared)
        cpus = sum(self._cluster.rooms().values())
        if not cpus:
            self._cluster.ray.shutdown()
            raise ConfigError("No node of the Ray cluster has a CPU for an environment; start one with --num-cpus.")
        workers = min(params.workers or cpus, at_once)
        slots = -(-at_once // workers)
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
        self._cluster.ray.shutdown()


class Cluster:
    """The nodes, and which of them are avoided for now."""

    def __init__(self, ray: ModuleType, shared: Path) -> None:
        self.ray, self._shared = ray, shared
        self._avoided: dict[str, float] = {}
        self._rooms: tuple[float, dict[str, int]] = (-_FRESH, {})

    def rooms(self) -> dict[str, int]:
        """Living node → its whole CPUs, where it has any."""
        asked, found = self._rooms
        if time.monotonic() - asked > _FRESH:
            nodes = [n for n in self.ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
            found = {n["NodeID"]: int(n["Resources"]["CPU"]) for n in nodes}
            self._rooms = time.monotonic(), found
        return found

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
    """A `Host` on a node. Created without waiting: its first answer includes the start of its process."""

    pid: int | None = None

    def __init__(self, cluster: Cluster, node: str, factory: Factory, shared: Path) -> None:
        self._cluster, self.node, self._answered = cluster, node, False
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
            answer = get(self._handle.answer.remote(slot, verb, argument, game), timeout=timeout)
        except wrong.GetTimeoutError:
            late = f"An environment actor did not start within {timeout:g} s; free a CPU of the cluster for each of "
            raise TimeoutError("" if self._answered else f"{late}ray.workers, or raise env.step_timeout.") from None
        except wrong.RayError as e:
            self._cluster.lost(self.node)
            raise EOFError(f"{type(e).__name__}: {_line(e)}") from None
        self._answered = True
        return answer

    def quit(self) -> None:
        """Nothing to wait for: the process ends with its environments."""

    def kill(self) -> None:
        with suppress(self._cluster.ray.exceptions.RayError):
            self._cluster.ray.kill(self._handle)

    def close(self) -> None:
        """Nothing is left on this machine."""


def game_of(task: Task) -> bytes | None:
    """Content of the file below the working directory that `task` names; None when it names none."""
    here = Path.cwd()
    path = (here / task.data).resolve()
    return path.read_bytes() if task.data and path.is_relative_to(here) and path.is_file() else None


# What follows runs on the nodes.


class NodeWorker:
    """The actor: environments by slot, and the games they were sent. `shared` is the driver's cache."""

    def __init__(self, factory: Factory, shared: Path) -> None:
        self._games = node_cache(shared) / "games"
        self._games.mkdir(parents=True, exist_ok=True)
        os.chdir(self._games)  # tasks name their files relative to the working directory
        self._slots = Slots(factory)

    def answer(self, slot: int, verb: str, argument: Task | str, game: bytes | None) -> tuple[object, float]:
        """As `Slots.answer`, with the content of the game that a task names."""
        try:
            if isinstance(argument, Task) and game is not None:
                argument = keep(argument, game, self._games)
        except RagdistillError as e:
            return (type(e).__name__, str(e)), 0.0
        return self._slots.answer(slot, verb, argument)


@cache
def node_cache(shared: Path) -> Path:
    """The driver's cache where it is there too (the same machine, a shared folder), else this node's own."""
    if shared.is_dir() and os.access(shared, os.W_OK):
        return shared
    own = os.environ.get("RAGDISTILL_CACHE")
    return (Path(own) if own else Path.home() / ".cache" / "ragdistill").resolve() / "env"


def keep(task: Task, game: bytes, folder: Path) -> Task:
    """`task`, naming a file of that content below `folder`; `IdentityError` when it is not the task's game."""
    if (found := hashlib.sha256(game).hexdigest()) != task.sha256:
        raise IdentityError(f"{task.data} is not the game that task {task.id} names; regenerate the task list.")
    path = folder / found[:2] / f"{found}{Path(task.data).suffix}"
    if not path.is_file():
        write_atomic(path, game)
    return msgspec.structs.replace(task, data=path.relative_to(folder).as_posix())


def open_on_node(env: EnvParams, admissible: bool, identity: str, shared: Path) -> Env:
    """An environment as the driver has it; `IdentityError` when its engine or data are others here."""
    domain = make_domain(env)
    if identity_of(domain, env) != identity:
        raise IdentityError(
            f"Node {socket.gethostname()} has another {env.name} environment than the machine that plays; install the "
            "same versions and data there (docs/cluster.md)."
        )
    return domain.env_factory(node_cache(shared), admissible)()
