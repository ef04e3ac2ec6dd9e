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


def installed() -> dict[str, EntryPoint]:
    """Name → entry point of every plug-in, by name; one that takes a built-in's name is left out."""
    found = {p.name: p for p in entry_points(group=GROUP) if p.name not in BUILT_IN}
    return dict(sorted(found.items()))


def make(name: str, options: Mapping[str, Any]) -> Domain:
    """The plug-in environment `name`; `ConfigError` says what is available, what broke, or which options it takes."""
    plugins = installed()
    if name not in plugins:
        raise ConfigError(
            f"env.name is {name!r}; available are {', '.join([*BUILT_IN, *plugins])}. An environment of your own is a "
            f"package with an entry point in the group {GROUP} (examples/repair_shop)."
        )
    entry = plugins[name]
    try:
        factory = entry.load()
    except Exception as e:  # boundary: other people's code, whatever it raises on import
        raise ConfigError(
            f"The plug-in environment {name} ({entry.value}) cannot be loaded ({type(e).__name__}: {e}); "
            "mend or uninstall its package."
        ) from e
    _check_options(name, factory, options)
    try:
        return factory(**options)
    except RagdistillError:
        raise
    except Exception as e:  # boundary: other people's code
        raise ConfigError(f"The plug-in environment {name} refuses env.options {dict(options)}: {e}.") from e


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
