"""Gymnasium-style text environments as `Env` and `Domain`, by duck typing: gymnasium itself is not needed.

    def doors(level: int = 1) -> GymnasiumDomain:           # the package's entry point in the group ragdistill.envs
        return GymnasiumDomain("doors", partial(Doors, level), version="doors-1")

What it takes: `reset(seed=…) → (observation, info)`, `step(action) → (observation, reward, terminated, truncated,
info)`, texts as observations and actions. A task is a seed; which split it belongs to is decided by a hash of what the
seed's game shows first (or of `info["group"]`), so no game is in two splits. From `info` it reads, where they are:
`goal` (else the first observation), `kind` and `group` (for balance and intervals; never shown to a policy), `valid`
(False: the action was refused), `success`. This module knows no environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ragdistill.envs import Demo, Env
from ragdistill.errors import ConfigError, DataError
from ragdistill.params import ColdstartParams
from ragdistill.records import Observation, Task, digest, seed_of

SHARES = {"test": 20, "dev": 10, "train": 70}
"""Percent of all games."""
_TRIES = 50
"""Seeds looked at for each task that is wanted."""
_DIGITS = 9
"""Of a sum of rewards: ten times 0.1 is the whole reward, though not in binary."""


class TextEnv(Protocol):
    """What of Gymnasium's `Env` is used."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...
    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...
    def close(self) -> None: ...


def one_bucket(_goal: str) -> str:
    """All tasks share their hints."""
    return "all"


class GymnasiumEnv:
    """See `ragdistill.envs.Env`. The score is the sum of rewards, within [0, 1]; `info["success"]` decides alone."""

    def __init__(self, env: TextEnv, bucket: Callable[[str], str] = one_bucket) -> None:
        self._env, self._bucket = env, bucket
        self._total = 0.0

    def reset(self, task: Task) -> Observation:
        """Start the game of the task's seed; `DataError` when it is not the game that the task was made of."""
        text, goal, info = start(self._env, int(task.data))
        if content(text, goal) != task.sha256:
            raise DataError(f"Seed {task.data} gives another game than when {task.id} was made; run the tasks stage.")
        self._total = 0.0
        return Observation(text=text, goal=goal, bucket=self._bucket(goal), valid=bool(info.get("valid", True)))

    def step(self, action: str) -> Observation:
        """Play one action; a truncated episode is done, too."""
        seen, reward, terminated, truncated, info = self._env.step(action)
        self._total += float(reward)
        success = info.get("success")
        score = min(max(round(self._total, _DIGITS), 0.0), 1.0) if success is None else float(bool(success))
        return Observation(
            text=text_of(seen), reward=score, done=bool(terminated or truncated), valid=bool(info.get("valid", True))
        )

    def close(self) -> None:
        self._env.close()


class GymnasiumDomain:
    """See `ragdistill.envs.Domain`. It has no demonstrations: set `coldstart.enabled: false`.

    `make` (picklable) makes an environment; `version` has to change whenever a game, a text or a reward changes;
    `bucket` infers from a goal's words the kind of task whose hints are shown.
    """

    evaluation_splits: tuple[str, ...] = ("test", "dev")

    def __init__(
        self, name: str, make: Callable[[], TextEnv], version: str, bucket: Callable[[str], str] = one_bucket
    ) -> None:
        self.name, self._make, self._version, self._bucket = name, make, version, bucket

    def fingerprint(self) -> str:
        return f"{self.name}/{self._version}/{ADAPTER}"

    def env_factory(self, cache: Path, admissible: bool) -> Callable[[], Env]:
        return partial(open_env, self._make, self._bucket)

    def tasks(self, split: str, count: int, seed: int, out: Path) -> list[Task]:
        """`count` different games of `split`; `DataError` when the seeds give too few different ones."""
        if split not in SHARES:
            raise ConfigError(f"{self.name} has no split {split}; choose test or dev, and tasks.source generated.")
        env, found = self._make(), {}
        try:
            for i in range(_TRIES * count):
                number = seed_of("gymnasium", self.name, seed, split, i)
                text, goal, info = start(env, number)
                sha = content(text, goal)
                group = str(info.get("group", sha[:12]))
                if split_of(group) == split:
                    kind = str(info.get("kind", self._bucket(goal)))
                    found[sha] = Task(
                        id=f"{self.name}/{split}/{number}", env=self.name, split=split, kind=kind, group=group,
                        data=str(number), sha256=sha,
                    )  # fmt: skip
                if len(found) == count:
                    break
        finally:
            with suppress(Exception):  # one that is broken may fail at that too, and the games are found
                env.close()
        if len(found) < count:
            raise DataError(f"{self.name} has only {len(found)} different games for {split}; lower tasks.{split}.")
        return list(found.values())

    def demonstrations(self, params: ColdstartParams, seed: int, out: Path) -> list[Demo]:
        raise ConfigError(f"{self.name} has no demonstrations; set coldstart.enabled to false.")


ADAPTER = "gymnasium-2"
"""Changes whenever what this module makes of an environment changes."""


def open_env(make: Callable[[], TextEnv], bucket: Callable[[str], str]) -> GymnasiumEnv:
    """Made inside a worker process."""
    return GymnasiumEnv(make(), bucket)


def start(env: TextEnv, seed: int) -> tuple[str, str, Mapping[str, Any]]:
    """(text, goal, info) of the game with this seed."""
    seen, info = env.reset(seed=seed)
    text = text_of(seen)
    return text, str(info.get("goal", text)), info


def text_of(seen: Any) -> str:
    """The observation, which has to be text."""
    if not isinstance(seen, str):
        raise ConfigError(f"The environment's observation is a {type(seen).__name__}; wrap it so that it is text.")
    return str(seen)  # NumPy's is a subclass, which no record takes


def content(text: str, goal: str) -> str:
    """Hash of what a game shows first; two seeds with the same hash are the same game."""
    return digest("gymnasium", text, goal)


def split_of(group: str) -> str:
    """train, dev or test, by a hash of `group`."""
    place = int(digest("gymnasium split", group)[:8], 16) % 100
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError("the shares add up to 100")
