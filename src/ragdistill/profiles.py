"""Profiles: named sets of parameters under `profiles/`, merged over `params.yaml`, which keeps its comments.

A `.yaml` profile holds the sections of params.yaml that it decides, a `.txt` one `key=value` lines as `dvc exp run -S`
takes them. `default.yaml` has the shipped value of every key that some profile sets: it is laid under each profile, so
that nothing of the profile before is left. Knows no stage.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ragdistill.checks import yaml_fault
from ragdistill.errors import ConfigError
from ragdistill.files import write_atomic
from ragdistill.params import Params, convert_params, load_params

FOLDER = Path("profiles")
DEFAULT = "default"
WHOLE = frozenset({"env.options"})
"""Keys whose mapping is one value."""
Change = tuple[str, Any, Any]
"""(dotted key, old value, new value)."""


def names(folder: Path = FOLDER) -> list[str]:
    """The profiles of this project."""
    return sorted({p.stem for p in folder.glob("*") if p.suffix in (".yaml", ".txt")})


def read_profile(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Dotted key → value; `ConfigError` for an unknown profile or one that is no mapping."""
    return {key: _plain(node) for key, node in _nodes(name, folder).items()}


def _nodes(name: str, folder: Path) -> dict[str, Any]:
    """As `read_profile`, but values as they are written (`5.0e-4`, a list on one line)."""
    for path in (folder / f"{name}.yaml", folder / f"{name}.txt"):
        if path.is_file():
            return _flat_file(path)
    known = ", ".join(names(folder)) or "none: run from the project's root"
    raise ConfigError(f"There is no profile {name!r}; the profiles are {known}.")


def _flat_file(path: Path) -> dict[str, Any]:
    from ruamel.yaml.error import YAMLError

    reader = _editor()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            return dict(_leaves(reader.load(text) or {}))
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        return {k.strip(): reader.load(v) for k, _, v in (line.partition("=") for line in lines if line)}
    except (YAMLError, ValueError, RecursionError, AttributeError) as e:
        raise ConfigError(f"{path} is not a YAML mapping of parameters ({yaml_fault(e)}).") from None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and dotted not in WHOLE:
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def apply(name: str, path: Path = Path("params.yaml"), folder: Path = FOLDER) -> tuple[Params, list[Change]]:
    """Write profile `name` over the default's values into `path`; returns the parameters and what changed.

    `path` keeps its comments, order and every key that no profile sets. It is left as it was when the result would
    not be valid (`ConfigError` says why).
    """
    tree, params, changes = _merged(name, path, folder)
    out = io.StringIO()
    _editor().dump(tree, out)
    write_atomic(path, out.getvalue().encode())
    return params, changes


def overlaid(name: str, path: Path = Path("params.yaml"), folder: Path = FOLDER) -> Params:
    """The parameters that `apply` would leave; nothing is written."""
    return _merged(name, path, folder)[1]


def _merged(name: str, path: Path, folder: Path) -> tuple[Any, Params, list[Change]]:
    load_params(path)
    wanted = _nodes(DEFAULT, folder) | _nodes(name, folder)
    tree = _editor().load(path.read_text(encoding="utf-8"))
    changes = [c for key, value in wanted.items() if (c := _set(tree, key, value, f"profiles/{name}"))]
    return tree, convert_params(_plain(tree), f"profile {name}"), changes


def _set(tree: Any, dotted: str, value: Any, where: str) -> Change | None:
    """Set one key in place; None when it has the value already. An unknown last key is left to the strict check."""
    section, (*parents, last) = tree, dotted.split(".")
    for name in parents:
        if not isinstance(section, dict) or name not in section:
            raise ConfigError(f"{where} sets {dotted}, but params.yaml has no section {name}.")
        section = section[name]
    before, after = _plain(section.get(last)), _plain(value)
    if before == after and type(before) is type(after):
        return None
    section[last] = value
    comments = section.ca.items.get(last)
    if comments and comments[3] == []:  # left by a list on lines of its own: ruamel would write broken lines after it
        comments[3] = None
    return dotted, before, after


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as plain data (its numbers and texts are subclasses of Python's)."""
    if isinstance(node, dict):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_plain(v) for v in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _editor() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml
