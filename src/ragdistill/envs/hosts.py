"""Where environments run for a pool: `Host`, and the one that is a process of this machine.

Processes, because engines such as TextWorld are not thread-safe; spawned, so that no lock or engine is inherited; each
holds many environments (`Slots`), because episodes wait for the model most of the time. Knows no particular
environment and no lease.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

from ragdistill.envs import Checked, Env
from ragdistill.errors import ConfigError, EnvironmentFault, RagdistillError
from ragdistill.records import Task

Factory = Callable[[], Env]
PREPARE = "prepare"
"""What a host is asked first where making an environment can take long: no time-out of a step counts for it."""
_GRACE = 2.0
"""Seconds a healthy worker gets to close its environments before it is killed."""


class Host(Protocol):
    """Where a worker's environments live: a process of this machine, or of another one (`ray_pool`)."""

    pid: int | None
    """Of a process of this machine."""

    def alive(self) -> bool:
        """False as soon as it should get no new episode; those it holds go on."""
        ...

    def exchange(self, slot: int, verb: str, argument: Task | str, timeout: float) -> tuple[Any, float]:
        """What `Slots.answer` says there. `TimeoutError` after `timeout` seconds, `EOFError`, `OSError` if it died."""
        ...

    def quit(self) -> None:
        """Let an idle one close its environments and end, for a moment at most."""
        ...

    def kill(self) -> None:
        """End it at once; a running `exchange` ends with one of its errors."""
        ...

    def close(self) -> None:
        """Free what is left of one that was killed."""
        ...


Opener = Callable[[Factory, Sequence[Host]], Host | None]
"""Starts one more host beside those that work; None when there is no room for it now."""


class Slots:
    """The environments of one host by slot number, made by `factory` on first use and then `reset` again and again."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._envs: dict[int, Env] = {}

    def answer(self, slot: int, verb: str, argument: Any) -> tuple[object, float]:
        """(observation, or an error's class name and text; CPU seconds). With `PREPARE` it is only made."""
        started = time.process_time()
        try:
            if slot not in self._envs:
                self._envs[slot] = Checked(self._factory())
            env = self._envs[slot]
            answer: object = None
            if verb != PREPARE:
                answer = env.reset(argument) if verb == "reset" else env.step(argument)
        except RagdistillError as e:
            answer = (type(e).__name__, str(e))
        except Exception as e:  # noqa: BLE001 - boundary: any engine failure becomes one EnvironmentFault
            _close(self._envs.pop(slot, None))
            answer = (EnvironmentFault.__name__, f"The environment failed on {verb}: {type(e).__name__}: {e}.")
        return answer, time.process_time() - started

    def close(self) -> None:
        """Close all environments."""
        for env in self._envs.values():
            _close(env)


def _close(env: Env | None) -> None:
    """Free what `env` holds; one that is broken may fail at that too."""
    with suppress(Exception):
        if env is not None:
            env.close()


def _serve(link: Connection, factory: Factory) -> None:
    """Main loop of a worker process: one request at a time; ends when the parent closes the pipe or dies."""
    slots = Slots(factory)
    while True:
        try:
            slot, verb, argument = link.recv()
            if verb == "quit":
                break
            link.send(slots.answer(slot, verb, argument))
        except (EOFError, OSError):  # the parent died; nobody is left to tell
            break
    slots.close()


def _check_sendable(factory: Factory) -> None:
    try:
        ForkingPickler.dumps(factory)
    except Exception as e:  # boundary: other people's objects
        raise ConfigError(
            f"What the environment's env_factory gave cannot be sent to a worker process ({e}); let it give a class or "
            "function of a module, or functools.partial of one, not a lambda."
        ) from e


def _start(process: BaseProcess) -> None:
    """Start a worker that never sees Ctrl-C, not even while it imports: the parent handles it and closes the pipe."""
    resource_tracker.ensure_running()  # starting it later would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits the mask
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """A host that is a process of this machine."""

    def __init__(self, factory: Factory) -> None:
        _check_sendable(factory)
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory), name="env", daemon=True)
        _start(self._process)
        theirs.close()
        self.pid = self._process.pid

    def alive(self) -> bool:
        return self._process.is_alive()

    def exchange(self, slot: int, verb: str, argument: Task | str, timeout: float) -> tuple[Any, float]:
        self._link.send((slot, verb, argument))
        if not self._link.poll(timeout):
            raise TimeoutError
        return self._link.recv()

    def quit(self) -> None:
        with suppress(OSError):
            self._link.send((0, "quit", ""))
        self._process.join(_GRACE)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.join()
        self._link.close()
        self._process.close()


def open_process(factory: Factory, working: Sequence[Host]) -> Host:
    """The `Opener` of this machine, where there always is room."""
    del working
    return _Process(factory)
