"""`ragdistill smoke`: the same DAG with small numbers, in a copy of the project, in minutes.

The copy (`.cache/smoke/`) has its own git and DVC state, so that a smoke run never touches the evidence; downloaded
models and translated games are shared through `RAGDISTILL_CACHE`. Its report says "smoke, not evidence".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ragdistill.errors import ConfigError
from ragdistill.journal import cache_dir

PROFILE = Path("profiles/smoke.txt")
"""One `key=value` a line, as `dvc exp run -S` takes them."""


def smoke(keep: bool) -> int:
    """Copy, override, `dvc repro`, print the table; returns DVC's exit status."""
    if not PROFILE.is_file():
        raise ConfigError(f"{PROFILE} does not exist; run `ragdistill smoke` from the project's root.")
    copy = cache_dir("smoke").resolve()
    if not keep:
        shutil.rmtree(copy, ignore_errors=True)
    copy_project(copy)
    overrides = [line.split("#")[0].strip() for line in PROFILE.read_text().splitlines()]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "RAGDISTILL_CACHE": str(cache_dir().resolve()), "PATH": path}
    env.pop("DVC_ROOT", None)
    print(f"smoke, not evidence: the DAG of this project with {PROFILE} in {copy}", flush=True)
    override(copy / "params.yaml", [o for o in overrides if o])
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=copy, env=env, check=False)
    if done.returncode == 0:
        subprocess.run([sys.executable, "-m", "ragdistill.cli", "table"], cwd=copy, env=env, check=True)
        print(f"report: {copy / 'results/report.html'}")
    return done.returncode


def copy_project(copy: Path) -> None:
    """Tracked and not ignored files, as they stand; a fresh repository around them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=False
    )
    if listed.returncode:
        raise ConfigError("`ragdistill smoke` needs the project's git repository; clone it with git.")
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, dest = Path(name), copy / name
        if source.is_file() and name not in ("dvc.lock",) and not name.startswith("results/"):
            dest.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, dest)
    if not (copy / ".git").exists():
        subprocess.run(["git", "init", "-q"], cwd=copy, check=True)


def override(path: Path, overrides: list[str]) -> None:
    """Set dotted keys in params.yaml, with the YAML editor that DVC itself uses (comments survive)."""
    from dvc.utils.serialize import modify_yaml
    from ruamel.yaml import YAML

    reader = YAML(typ="safe")
    with modify_yaml(str(path)) as params:
        for override in overrides:
            key, _, value = override.partition("=")
            section = params
            *parents, last = key.strip().split(".")
            for name in parents:
                section = section[name]
            section[last] = reader.load(value)
