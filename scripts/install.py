"""Make `.venv` with the pinned dependencies; a second call does nothing. Standard library only; run by setup.sh.

torch comes first and alone: where no GPU is listed, a CUDA build (gigabytes) is refused before anything is downloaded.
Knows no package registry: where packages come from is pip's own configuration.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
"""Distributions that only a CUDA build of torch requires."""


class SetupError(Exception):
    """A sentence for the person who runs the setup; printed without a traceback."""


def place_key(root: Path) -> str:
    """What a virtual environment is bound to: its absolute path and the Python version."""
    return f"{root.resolve()} python{sys.version_info[0]}.{sys.version_info[1]}"


def pins_key(root: Path) -> str:
    """Hash of the files that decide what is installed."""
    content = b"\0".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(content).hexdigest()


def is_current(root: Path, key: str, stamp: str) -> bool:
    """Whether `.venv` exists and its stamp file holds `key`."""
    path = root / ".venv" / stamp
    return (root / ".venv/bin/python").exists() and path.is_file() and path.read_text() == key


def is_complete(root: Path) -> bool:
    """Whether there is nothing left to do."""
    return is_current(root, place_key(root), "place") and is_current(root, pins_key(root), "pins")


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the setup lock; two calls at once take turns. Released by the kernel when the process dies."""
    path = root / ".cache" / "setup.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another setup is running here; waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print one line for a step: its name, then its seconds."""
    print(f"setup: {what} … ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def pip(root: Path, *args: str) -> str:
    """Run the environment's pip quietly and return its output; the log and its last lines explain a failure."""
    bin_dir = root / ".venv" / "bin"
    # Source distributions call a bare `python` while they build: it has to be the environment's.
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    env.pop("PYTHONPATH", None)
    command = [str(bin_dir / "python"), "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(
        command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    log = root / ".cache" / "setup.log"
    with log.open("a") as f:
        f.write(f"$ pip {' '.join(args)}\n{done.stdout if done.returncode else ''}{done.stderr}\n")
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SetupError(f"pip failed; its last lines follow, the rest is in .cache/{log.name}.\n{tail}{build_hint()}")
    return done.stdout


def build_hint() -> str:
    """One sentence when the tools are missing that the environment's engine (a source distribution) is built with."""
    missing = [tool for tool in ("gcc", "g++", "make") if shutil.which(tool) is None]
    if not missing:
        return ""
    return (
        f"\n{', '.join(missing)} not found: textworld's engines are compiled on installation, install a C++ toolchain."
    )


def has_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def cuda_packages(report: dict[str, Any]) -> list[str]:
    """Names in a pip report that only a CUDA build of torch brings."""
    names = (item["metadata"]["name"].lower().replace("_", "-") for item in report["install"])
    return sorted(name for name in names if name.startswith(CUDA_PREFIXES))


def torch_pin(lines: Iterable[str]) -> str:
    """The requirement `torch==…` out of the lines of constraints.txt."""
    found = [line.strip() for line in lines if line.startswith("torch==")]
    if len(found) != 1:
        raise SetupError("constraints.txt must hold exactly one line `torch==<version>`.")
    return found[0]


def installed_torch(root: Path, pin: str) -> bool:
    """Whether the environment holds the pinned torch, of whatever build; a new pin has to pass the CUDA check again."""
    version = pin.removeprefix("torch==")
    site = root / ".venv"
    return any(any(site.glob(f"lib/python3*/site-packages/torch-{version}{local}.dist-info")) for local in ("", "+*"))


def install_torch(root: Path, pin: str) -> None:
    """Install torch alone, without its dependencies; never a CUDA build where there is no GPU to use it."""
    index = os.environ.get("RAGDISTILL_TORCH_INDEX")
    if index:
        pip(root, "install", "--quiet", "--no-deps", "--index-url", index, pin)
        return
    if not has_gpu() and os.environ.get("RAGDISTILL_ALLOW_CUDA") != "1":
        check_cpu_build(root, pin)
    pip(root, "install", "--quiet", "--no-deps", pin)


def check_cpu_build(root: Path, pin: str) -> None:
    """Ask pip what `pin` would bring, downloading as little as it can; refuse a CUDA build."""
    report = json.loads(pip(root, "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", pin))
    cuda = cuda_packages(report)
    if cuda:
        raise SetupError(
            f"no GPU is listed here, but `{pin}` resolves to a CUDA build ({len(cuda)} extra packages, gigabytes): set "
            'RAGDISTILL_TORCH_INDEX to the CPU wheel index that PyTorch\'s "get started" page shows, '
            "or RAGDISTILL_ALLOW_CUDA=1 to accept it."
        )


def install(root: Path) -> None:
    """Bring `.venv` up to date; each stamp is written after what it vouches for."""
    venv_dir = root / ".venv"
    (root / ".cache" / "setup.log").write_text("")
    if not is_current(root, place_key(root), "place"):
        with timed("virtual environment .venv"):
            venv.EnvBuilder(clear=True, with_pip=True, symlinks=True).create(venv_dir)
        (venv_dir / "place").write_text(place_key(root))
    pin = torch_pin((root / "constraints.txt").read_text().splitlines())
    if not installed_torch(root, pin):
        with timed("torch"):
            install_torch(root, pin)
    with timed("pinned dependencies (a few minutes the first time)"):
        pip(root, "install", "--quiet", "--constraint", "constraints.txt", "--editable", ".[dev]")
    with timed("consistency check"):
        pip(root, "check")
    (venv_dir / "pins").write_text(pins_key(root))


def main(root: Path = ROOT) -> int:
    """Entry point; 0 when `.venv` is ready."""
    if is_complete(root):
        print("setup: .venv is up to date")
        return 0
    start = time.monotonic()
    try:
        with lock(root):
            if not is_complete(root):  # another call may have done it while this one waited
                install(root)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    print(f"setup: ready in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
