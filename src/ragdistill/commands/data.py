"""`ragdistill data alfworld|webshop`: fetch the official data, or import it with DVC, and say how to use it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import msgspec

from ragdistill.downloads import Source, fetch
from ragdistill.errors import ConfigError, DataError
from ragdistill.progress import bar, display

FOLDER = Path("data/official")


class DataSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `data.json`: where an official data set is, and which variable names it."""

    variable: str
    licence: str
    files: dict[str, list[Source]]
    """Size ("all", "small") → files."""


def data_sets() -> dict[str, DataSet]:
    """The data sets that can be fetched."""
    raw = (files("ragdistill.commands") / "data.json").read_bytes()
    return msgspec.json.decode(raw, type=dict[str, DataSet])


def get_data(name: str, size: str, with_dvc: bool) -> int:
    """Fetch (or `dvc import-url`), unpack, and print the variable to set."""
    found = data_sets()[name]
    if size not in found.files:
        raise ConfigError(f"{name} has no size {size!r}; choose one of {', '.join(found.files)}.")
    folder, sources = FOLDER / name, found.files[size]
    for source in sources:
        print(f"{source.name}: {source.about}")
    if with_dvc:
        for source in sources:
            _import(source, folder)
    with display(name):
        for path in fetch(sources, folder):
            if path.suffix == ".zip":
                with bar(f"unpacking {path.name}"):
                    _unpack(path, folder)
    print(f"{found.licence}\nexport {found.variable}={folder.resolve()}")
    return 0


def _import(source: Source, folder: Path) -> None:
    """A `.dvc` file beside the data, to be committed: `dvc update` fetches a new version, `dvc pull` this one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    if path.with_name(f"{path.name}.dvc").is_file():
        return
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "import-url", "--force", source.address, str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"dvc could not import {source.address} ({reason}); without --dvc it says what to do.")


def _unpack(path: Path, folder: Path) -> None:
    """Extract a zip; its members cannot leave `folder` (zipfile drops `..` and leading slashes)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not (folder / m.filename).exists()]
            archive.extractall(folder, members)
    except zipfile.BadZipFile:
        raise DataError(f"{path} is no zip file; delete it and run this again.") from None
