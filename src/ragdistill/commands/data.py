"""`ragdistill data alfworld|webshop`: fetch the official data, or import it with DVC, and say how to use it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib.resources import files
from pathlib import Path

import msgspec

from ragdistill.downloads import NOTED, Source, fetch
from ragdistill.errors import ConfigError, DataError
from ragdistill.files import TEMPORARY
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
    """Extract what is missing or cut off of a zip; its members cannot leave `folder` (zipfile drops `..` and `/`).

    A member gets its name once it is whole: after a kill or on a full disk what is there is complete.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=folder, suffix=TEMPORARY) as draft:
            for member in (m for m in archive.infolist() if not m.is_dir()):
                there = folder / member.filename
                if not there.is_file() or there.stat().st_size != member.file_size:
                    whole = Path(archive.extract(member, draft))
                    place = folder / whole.relative_to(draft)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(whole, place)
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path} is damaged ({e}); delete it and {folder / NOTED}, and run this again.") from None
