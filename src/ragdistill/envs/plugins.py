"""Environments of other packages, found by entry point.

    [project.entry-points."ragdistill.envs"]
    repair_shop = "repair_shop:RepairShop"

The entry names a callable that takes `env.options` as keyword arguments and returns a `ragdistill.envs.Domain`. This
module knows no environment; a plug-in's code runs with the user's rights, as any installed package does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from ragdistill.errors import ConfigError, RagdistillError

if TYPE_CHECKING:
    from ragdistill.envs import Domain

GROUP = "ragdistill.envs"
"""Entry-point group."""
BUILT_IN = ("alfworld", "webshop")
"""Names that a plug-in cannot take."""


_PARTS = ("fingerprint", "env_factory", "tasks", "demonstrations")
"""What of a `Domain` is called."""


def installed() -> dict[str, EntryPoint]:
    """Name → entry point of every plug-in, by name; those whose name is taken (`clashes`) are left out."""
    return {name: found[0] for name, found in _named().items() if name not in BUILT_IN and len(found) == 1}


def clashes() -> dict[str, str]:
    """Name → what to do about it, where a name alone would not say which package's environment is meant."""
    out: dict[str, str] = {}
    for name, found in _named().items():
        whose = " and ".join(map(origin, found))
        if name in BUILT_IN:
            out[name] = f"{name} is built in; that of {whose} is not used: it needs another name."
        elif len(found) > 1:
            out[name] = f"{whose} each bring an environment {name}; uninstall all but one."
    return out


def origin(entry: EntryPoint) -> str:
    """Package and version, or what the entry names if that is unknown."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _named() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, origin(e))):
        found.setdefault(entry.name, []).append(entry)
    return found


def make(name: str, options: Mapping[str, Any]) -> Domain:
    """The plug-in environment `name`; `ConfigError` says what is available, what broke, or which options it takes."""
    plugins = installed()
    if name not in plugins and (clash := clashes().get(name)):
        raise ConfigError(f"env.name is {name!r}, and {clash}")
    if name not in plugins:
        raise ConfigError(
            f"env.name is {name!r}; available are {', '.join([*BUILT_IN, *plugins])}. An environment of your own is a "
            f"package with an entry point in the group {GROUP} (examples/repair_shop)."
        )
    entry = plugins[name]
    try:
        factory = entry.load()
    except (Exception, SystemExit) as e:  # boundary: other people's code, whatever it raises on import
        raise ConfigError(
            f"The plug-in environment {name} ({entry.value}) cannot be loaded ({_said(e)}); mend or uninstall its "
            "package."
        ) from e
    _check_options(name, factory, options)
    try:
        made = factory(**options)
    except RagdistillError:
        raise
    except Exception as e:  # boundary: other people's code
        raise ConfigError(f"The plug-in environment {name} refuses env.options {dict(options)} ({_said(e)}).") from e
    return _check_domain(name, made)


def _said(error: BaseException) -> str:
    """Other people's error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_domain(name: str, made: Any) -> Domain:
    lacks = [part for part in _PARTS if not callable(getattr(made, part, None))]
    lacks += ["name"] * (not isinstance(getattr(made, "name", None), str))
    splits = getattr(made, "evaluation_splits", None)
    lacks += ["evaluation_splits"] * (
        not isinstance(splits, (tuple, list)) or not all(isinstance(s, str) for s in splits)
    )
    if lacks:
        raise ConfigError(
            f"The plug-in environment {name} is a {type(made).__name__} that lacks {', '.join(lacks)}; its entry point "
            "has to make a ragdistill.envs.Domain."
        )
    return made


def _check_options(name: str, factory: Any, options: Mapping[str, Any]) -> None:
    if not callable(factory):
        raise ConfigError(f"The plug-in environment {name} is no callable; its entry point must name one.")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of some built-in callables nothing is known
        return
    try:
        signature.bind(**options)
    except TypeError as e:
        takes = ", ".join(map(str, signature.parameters.values())) or "none"
        raise ConfigError(f"env.options does not suit {name} ({e}); its options: {takes}.") from None
