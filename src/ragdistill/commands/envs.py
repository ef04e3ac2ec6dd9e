"""`ragdistill envs`: which environments are available, whose they are, and the fingerprint of each."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ragdistill.envs import identity_of, make_domain
from ragdistill.envs.plugins import BUILT_IN, installed
from ragdistill.errors import RagdistillError
from ragdistill.params import EnvParams, load_params


def show_envs() -> int:
    """Print one line an environment; the one that params.yaml names has a star. 1 if that one is not to be had."""
    env = load_params().env
    rows = list(rows_of(env))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
    return 0 if any(row[0] == "*" and not row[3].startswith("! ") for row in rows) else 1


def rows_of(env: EnvParams) -> Iterator[tuple[str, str, str, str]]:
    """(star, name, origin, fingerprint or what is wrong). Plug-ins that are not chosen are shown without options."""
    plugins = installed()
    for name in (*BUILT_IN, *plugins):
        chosen = name == env.name
        origin = "built in"
        if name in plugins:
            package = plugins[name].dist
            origin = f"{package.name} {package.version}" if package else plugins[name].value
        params = msgspec.structs.replace(env, name=name, options=env.options if chosen else {})
        try:
            said = identity_of(make_domain(params), params)
        except RagdistillError as e:
            said = f"! {e}"
        yield "*" if chosen else " ", name, origin, said
