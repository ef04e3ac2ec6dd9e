"""The `Env` protocol: Gymnasium-shaped, one task at a time, blocking.

An environment knows no model. `ragdistill.envs.pool` runs many of them in worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from ragdistill.errors import ConfigError, IdentityError
from ragdistill.params import ColdstartParams, EnvParams
from ragdistill.records import Observation, Record, Task, digest


class Env(Protocol):
    """One environment instance; it is reused for many tasks (`reset` loads the next)."""

    def reset(self, task: Task) -> Observation:
        """Load `task` and start it. `Observation.goal` and `.bucket` are set."""
        ...

    def step(self, action: str) -> Observation:
        """Play one command."""
        ...

    def close(self) -> None: ...


class Turn(Record, frozen=True, kw_only=True):
    """One demonstrated turn."""

    thought: str
    action: str
    observation: str
    state: dict[str, str] = msgspec.field(default_factory=dict)
    """Label → text of the goal and of what the demonstrator knows of its state, in the order to state it in.

    Optional: an environment that fills it can teach agents that restate it each turn (StateAct).
    """


class Demo(Record, frozen=True, kw_only=True):
    """One demonstration: what an agent could have seen, thought and done. Hints are shown to it, never spoken of."""

    task_id: str
    kind: str
    hints: tuple[str, ...]
    first_observation: str
    turns: tuple[Turn, ...]
    won: bool
    """False for a search that was cut off at its turn limit; kept, because long searches are part of the skill."""


class Domain(Protocol):
    """What a stage asks of an environment besides playing it. One object per environment name."""

    name: str
    evaluation_splits: tuple[str, ...]
    """What `tasks.eval_split` may say. "test" and "dev" share no group with "train"."""

    def fingerprint(self) -> str:
        """Identity of engine, grammar and parser versions."""
        ...

    def env_factory(self, cache: Path, admissible: bool) -> Callable[[], Env]:
        """A picklable maker of `Env` instances that share `cache`; `admissible` fills `Observation.admissible`."""
        ...

    def tasks(self, split: str, count: int, seed: int, out: Path) -> list[Task]:
        """`count` tasks of `split`, balanced over task types; their files under `out`. Official splits ignore `out`."""
        ...

    def demonstrations(self, params: ColdstartParams, seed: int, out: Path) -> list[Demo]:
        """Cold-start demonstrations, played in the real environment."""
        ...


@runtime_checkable
class HasExamples(Protocol):
    """What a `Domain` that has example episodes for prompts (`agent.examples`) offers beside the rest."""

    def examples(self) -> Mapping[str, Sequence[Demo]]:
        """Task type → won episodes without hints, as many for each; none of them is of an evaluation task's group."""
        ...

    def example_type(self, first_observation: str) -> str:
        """The task type, read from the task sentence alone, of what begins with this text."""
        ...


class Defaults(Record, frozen=True, kw_only=True):
    """What `null` in params.yaml stands for, where the environment decides it. Those of one that says nothing."""

    max_steps: int = 50
    """`env.max_steps`."""
    attempts: int = 2
    """`rollouts.attempts`."""
    reply_tokens: int = 64
    """`agent.max_reply_tokens` of a style that has at most a thought and an action each turn."""
    stated_reply_tokens: int = 200
    """The same of a style that states goal and state too."""
    kinds: tuple[str, ...] = ()
    """Every task type (`Task.kind`) there is; empty: not known in advance."""
    primary: tuple[str, ...] = ()
    """`evaluate.primary`: the types whose rules the demonstrations withhold; empty: all types."""
    buckets: int = 1
    """How many kinds of tasks (`Observation.bucket`) have hints of their own, for estimates of what a run costs."""
    group: str = "group"
    """What tasks of one `Task.group` share, as a word for people: room, product; its plural has an s."""


@runtime_checkable
class HasDefaults(Protocol):
    """What a `Domain` that knows its own defaults offers beside the rest."""

    defaults: Defaults


def defaults_of(domain: Domain) -> Defaults:
    """What `domain` stands for where params.yaml says null."""
    return domain.defaults if isinstance(domain, HasDefaults) else Defaults()


@runtime_checkable
class HasNote(Protocol):
    """What a `Domain` whose choice of tasks needs a word beside every result offers beside the rest."""

    def task_note(self, games: Path) -> str:
        """Sentences on the tasks whose files lie in `games`, such as what was left out; "" where there is nothing."""
        ...


def note_of(domain: Domain, games: Path) -> str:
    """What `domain` has to say about the tasks whose files lie in `games`."""
    return domain.task_note(games) if isinstance(domain, HasNote) else ""


def make_domain(params: EnvParams) -> Domain:
    """The environment called `params.name`: built in, or a plug-in (`ragdistill.envs.plugins`) made with its options.

    `ConfigError` when there is none of that name, or it does not take `params.options`.
    """
    from ragdistill.envs import plugins

    name = params.name
    if name in plugins.BUILT_IN and params.options:
        raise ConfigError(f"env.options is for plug-ins, and {name} is built in; set it back to {{}}.")
    if name == "alfworld":
        from ragdistill.envs.alfworld.domain import AlfworldDomain

        return AlfworldDomain()
    if name == "webshop":
        from ragdistill.envs.webshop.domain import WebshopDomain

        return WebshopDomain(params.webshop)
    return plugins.make(name, params.options)


class Checked:
    """`env`, whose answers are observations as `records.Observation` says, whoever wrote it.

    Numbers of NumPy become plain ones. `ConfigError` says what else came: another type, or a reward that is no number
    from 0 to 1. Without this a wrong answer shows up stages later, as an unreadable file or a mean above 1.
    """

    def __init__(self, env: Env) -> None:
        self._env = env

    def reset(self, task: Task) -> Observation:
        return _checked(self._env.reset(task), "reset")

    def step(self, action: str) -> Observation:
        return _checked(self._env.step(action), "step")

    def close(self) -> None:
        self._env.close()


def _checked(seen: object, verb: str) -> Observation:
    wrong = f"The environment's {verb} has to return a ragdistill.records.Observation"
    if not isinstance(seen, Observation):
        raise ConfigError(f"{wrong}, not a {type(seen).__name__}.")
    try:
        found = msgspec.to_builtins(seen, builtin_types=(bytes, bytearray), enc_hook=_plain)
        if isinstance(found["reward"], bool):  # a float to type checkers, not to msgspec
            found["reward"] = float(found["reward"])
        sound = msgspec.convert(found, Observation)
    except (TypeError, msgspec.ValidationError) as e:
        raise ConfigError(f"{wrong} of the right types ({str(e).rstrip('.')}).") from None
    numbers = {"reward": sound.reward, **(sound.parts if isinstance(sound.parts, dict) else {})}
    if bad := next((f"{name} {value}" for name, value in numbers.items() if not 0.0 <= value <= 1.0), ""):
        raise ConfigError(f"{wrong} with rewards from 0 to 1, not {bad}; 1 is full success.")
    return sound


def _plain(value: Any) -> Any:
    """A scalar of NumPy, or of what imitates it, as Python's own; `TypeError` for anything else."""
    if not hasattr(value, "item"):
        raise TypeError(f"{type(value).__name__} is no plain value")
    return value.item()


def check_game(task: Task, game: bytes) -> None:
    """`IdentityError` when this is not the content of the task's game."""
    if hashlib.sha256(game).hexdigest() != task.sha256:
        raise IdentityError(f"{task.data} is not the game that task {task.id} names; regenerate the task list.")


def identity_of(domain: Domain, params: EnvParams) -> str:
    """The environment's fingerprint as tasks and episodes are filed under; options count, whether it knows or not."""
    own = domain.fingerprint()
    if not isinstance(own, str) or not own:
        raise ConfigError(f"The fingerprint of the environment {params.name} is {own!r}; it has to be a text.")
    return f"{own}/{digest(params.options)}" if params.options else own
