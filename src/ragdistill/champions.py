"""The alias `champion` of the registered model: who moves it, on which numbers, and the way back.

Promotions are a stack: each can be undone, down to no champion. Plays no episode: the re-evaluation before a promotion
is its caller's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlflow.tracking import MlflowClient

from ragdistill.errors import ConfigError
from ragdistill.registry import CHALLENGER, CHAMPION, now, require
from ragdistill.stats import PairedTest
from ragdistill.tracking import Store, open_client, recorded

PREVIOUS_TAG = "ragdistill.previous_champion"
HISTORY_TAG, REMEMBERED = "ragdistill.champions", 100
"""Of the registered model: champions in the order of promotion, the present one last; so many are kept."""


@dataclass(frozen=True)
class Aliases:
    """Version numbers behind the two aliases; None where an alias is not set."""

    champion: str | None
    challenger: str | None


@dataclass(frozen=True)
class Decision:
    """Whether to move `champion`, and why in one sentence."""

    promote: bool
    reason: str


@recorded
def champion_and_challenger(store: Store, name: str) -> Aliases:
    """Versions behind the aliases of the registered model `name`."""
    client = open_client(store)
    return Aliases(_aliased(client, name, CHAMPION), _aliased(client, name, CHALLENGER))


def decide(difference: PairedTest, margin: float, has_champion: bool) -> Decision:
    """Whether the challenger may become champion, by the lower bound of its advantage.

    `difference` is challenger − champion, or, without a champion, challenger − base. `margin` is the success share
    (0.05 = 5 points) that a successor may be worse by (non-inferiority), and that the first champion must beat base by.
    """
    found, rival = difference.diff, "champion" if has_champion else "base"
    bound = 0.0 - margin if has_champion else margin
    numbers = (
        f"challenger - {rival} = {100 * found.value:+.1f} points "
        f"[{100 * found.lo:+.1f}, {100 * found.hi:+.1f}] on {difference.n} tasks"
    )
    if found.lo > bound:
        return Decision(True, f"Promote: {numbers}; the lower bound is above {100 * bound:+.1f}.")
    return Decision(False, f"Refuse: {numbers}; evaluate more tasks until the lower bound is above {100 * bound:+.1f}.")


@recorded
def promote(store: Store, name: str, played: Aliases, decision: Decision, who: str, difference: PairedTest) -> None:
    """Move `champion` to the challenger of `played`; who, when, why and numbers go on the version.

    `played` are the aliases as they were when the evaluation began, because on a shared server others move them.
    `ConfigError` when the decision refuses, an alias moved meanwhile, or the challenger already is the champion.
    """
    if not decision.promote:
        raise ConfigError(decision.reason)
    client, version = open_client(store), played.challenger
    current = str(require(client, name, CHALLENGER).version)
    if version is None or current != version:
        raise ConfigError(
            f"The challenger of {name} became version {current} meanwhile; evaluate it and promote again."
        )
    previous = _aliased(client, name, CHAMPION)
    if previous == version:
        raise ConfigError(f"Version {version} of {name} already is the champion.")
    if previous != played.champion:
        raise ConfigError(f"The champion of {name} became version {previous} meanwhile; promote again to compare.")
    record = {
        PREVIOUS_TAG: previous or "",  # for people; `rollback` reads the history
        "ragdistill.promoted_by": who,
        "ragdistill.promoted_at": now(),
        "ragdistill.promotion": decision.reason,
        "ragdistill.promotion_numbers": json.dumps(asdict(difference), sort_keys=True),
    }
    # Tags first: an interruption leaves a record without a move, never a champion that cannot be rolled back.
    for key, value in record.items():
        client.set_model_version_tag(name, version, key, value)
    _remember(client, name, [*_history(client, name, previous), version])
    client.set_registered_model_alias(name, CHAMPION, version)


@recorded
def rollback(store: Store, name: str, who: str) -> str | None:
    """Undo the last promotion and return the version that is champion again; None when the first one was undone.

    `ConfigError` when there is no champion.
    """
    client = open_client(store)
    current = require(client, name, CHAMPION)
    present = {str(v.version) for v in client.search_model_versions(f"name = '{name}'")}
    history = [v for v in _history(client, name, str(current.version))[:-1] if v in present]
    client.set_model_version_tag(name, str(current.version), "ragdistill.rolled_back", f"{who}, {now()}")
    if history:
        client.set_registered_model_alias(name, CHAMPION, history[-1])
    else:
        client.delete_registered_model_alias(name, CHAMPION)
    _remember(client, name, history)
    return history[-1] if history else None


def _aliased(client: MlflowClient, name: str, alias: str) -> str | None:
    versions = [m.aliases.get(alias) for m in client.search_registered_models(f"name = '{name}'")]
    return str(versions[0]) if versions and versions[0] is not None else None


def _history(client: MlflowClient, name: str, champion: str | None) -> list[str]:
    """Champions up to `champion`, which holds the alias now; an interrupted or a person's own move is taken in."""
    if champion is None:
        return []
    kept = client.get_registered_model(name).tags.get(HISTORY_TAG)
    if kept is None:  # promoted before there was a history
        known = [client.get_model_version(name, champion).tags.get(PREVIOUS_TAG, ""), champion]
        return [v for v in known if v]
    history = [str(v) for v in json.loads(kept)]
    if champion not in history:
        return [*history, champion]
    return history[: len(history) - history[::-1].index(champion)]


def _remember(client: MlflowClient, name: str, history: Sequence[str]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(history[-REMEMBERED:]))
