"""`ragdistill use PROFILE`: write a profile into params.yaml and say what changes."""

from __future__ import annotations

import msgspec

from ragdistill import profiles
from ragdistill.errors import ConfigError

SMOKE = "smoke"
"""Has a command of its own, in a copy of the project."""


def use(name: str | None) -> int:
    """Apply the profile `name`; without a name, list the profiles."""
    if name is None:
        print("\n".join(n for n in profiles.names() if n != SMOKE))
        return 0
    if name == SMOKE:
        raise ConfigError("The smoke profile runs in a copy of the project: `ragdistill smoke`.")
    _, changes = profiles.apply(name)
    width = max((len(key) for key, _, _ in changes), default=0)
    for key, before, after in changes:
        print(f"{key:<{width}}  {_show(before)} → {_show(after)}")
    print(f"params.yaml: {len(changes)} values changed to profile {name}; `dvc repro` runs what depends on them.")
    return 0


def _show(value: object) -> str:
    return msgspec.json.encode(value).decode()
