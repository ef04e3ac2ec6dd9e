"""`ragdistill envs`: which environments are available, whose they are, and the fingerprint of each."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ragdistill.envs import identity_of, make_domain
from ragdistill.envs.plugins import BUILT_IN, clashes, installed, origin
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
        whose = origin(plugins[name]) if name in plugins else "built in"
        params = msgspec.structs.replace(env, name=name, options=env.options if chosen else {})
        try:
            said = identity_of(make_domain(params), params)
        except RagdistillError as e:
            said = f"! {e}"
        except Exception as e:  # noqa: BLE001 - boundary: other people's code; one that breaks must not hide the rest
            said = f"! its fingerprint cannot be told ({type(e).__name__}: {e}); mend or uninstall its package."
        yield "*" if chosen else " ", name, whose, " ".join(said.split())
    for name, trouble in clashes().items():
        yield "*" if name == env.name and name not in BUILT_IN else " ", name, "name taken", f"! {trouble}"
