"""What runs on the nodes of a Ray cluster: environments by slot, and the games they were sent.

The code comes from the machine that plays (Ray's `py_modules`), each game with its reset, checked by its hash; what
else an environment reads has to be there. Knows no pool and no Ray.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

import msgspec

from ragdistill.envs import Env, check_game, identity_of, make_domain
from ragdistill.envs.hosts import Factory, Slots
from ragdistill.errors import IdentityError, RagdistillError
from ragdistill.files import write_atomic
from ragdistill.params import EnvParams
from ragdistill.records import Task


class NodeWorker:
    """The actor: environments by slot, and the games they were sent. `shared` is the driver's cache."""

    def __init__(self, factory: Factory, shared: Path) -> None:
        self._games = node_cache(shared) / "games"
        self._games.mkdir(parents=True, exist_ok=True)
        os.chdir(self._games)  # tasks name their files relative to the working directory
        self._slots = Slots(factory)

    def begin(self) -> None:
        """Answers as soon as the actor's process runs."""

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
    check_game(task, game)
    path = folder / task.sha256[:2] / f"{task.sha256}{Path(task.data).suffix}"
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
