"""Fetch files by URL: streamed, whole or not at all, with a checksum that never changes unnoticed.

A file whose sha256 is not pinned is trusted on first use: its hash is noted beside it (`sha256.json`) and demanded ever
after, unless a `.dvc` file beside it says what it is. `RAGDISTILL_MIRROR` names another server (or a `file://` folder)
that has the same file names. Knows no data set.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ragdistill.checks import address_fault, yaml_fault
from ragdistill.errors import DataError, IdentityError
from ragdistill.files import TEMPORARY, storage_error
from ragdistill.progress import bar
from ragdistill.records import read_json, write_json

MIRROR = "RAGDISTILL_MIRROR"
"""Environment variable: base address that is asked instead of the official ones."""
NOTED = "sha256.json"
_TIMEOUT = 60.0
"""Seconds without a byte before a server counts as silent."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of an official data set."""

    name: str
    url: str
    about: str
    sha256: str | None = None
    """Pinned; None = noted on first use."""

    @property
    def address(self) -> str:
        """Where it is fetched: the mirror if one is set, else the official server."""
        mirror = os.environ.get(MIRROR)
        if not mirror:
            return self.url
        if not mirror.startswith("file://") and (fault := address_fault(mirror)):
            # it ends in `.dvc` files, which are committed
            raise DataError(f"{MIRROR} {fault}; give https://, http:// or file://, and neither user nor query.")
        return f"{mirror.rstrip('/')}/{self.name}"


class _Output(msgspec.Struct):
    md5: str | None = None


class _Tracked(msgspec.Struct):
    """A `.dvc` file."""

    outs: tuple[_Output]


def fetch(sources: Sequence[Source], folder: Path) -> list[Path]:
    """The files of `sources` in `folder`, fetched if they are not there.

    Raises `DataError` with what to do by hand when a server cannot be reached or another file lies there, and
    `IdentityError` when a file is not what is pinned, what its `.dvc` file says, or what was noted.
    """
    noted = read_json(folder / NOTED) if (folder / NOTED).is_file() else {}
    for source in sources:
        path = folder / source.name
        if not path.is_file():
            _download(source, path)
        elif source.name not in noted:
            _check_found(path)
        found, tracked = _hash(path, "sha256"), _tracked(path)
        if tracked and not source.sha256:
            _demand(path, "md5", _hash(path, "md5"), tracked, f"`dvc update` {path}.dvc")
        else:
            wanted = source.sha256 or noted.get(source.name, found)
            _demand(path, "sha256", found, wanted, f"delete {folder / NOTED}")
        noted[source.name] = found
        write_json(folder / NOTED, noted)
    return [folder / s.name for s in sources]


def _demand(path: Path, kind: str, found: str, wanted: str, otherwise: str) -> None:
    if found != wanted:
        path.unlink()
        raise IdentityError(
            f"{path} has {kind} {found}, not {wanted}, and was removed; fetch it again, or {otherwise} if its "
            "publisher has a new version."
        )


def _tracked(path: Path) -> str | None:
    """The md5 in the `.dvc` file beside `path`, for which the repository vouches; None where there is none."""
    from ruamel.yaml import YAML, YAMLError

    beside = path.with_name(f"{path.name}.dvc")
    if not beside.is_file():
        return None
    try:
        return msgspec.convert(YAML(typ="safe").load(beside.read_text(encoding="utf-8")), _Tracked).outs[0].md5
    except (YAMLError, ValueError, msgspec.ValidationError) as e:
        raise DataError(f"{beside} is no .dvc file ({yaml_fault(e)}); take it from git again, or delete it.") from None


def _check_found(path: Path) -> None:
    """Look at a file that somebody put there, before its hash becomes what is demanded."""
    try:
        _check(path, None)
    except _BrokenFile as e:
        raise DataError(f"{path} is not the file ({e}); delete it, and its .dvc file, and run this again.") from None


def _download(source: Source, path: Path) -> None:
    """Stream to a temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY, delete=False) as out:
        try:
            with urllib.request.urlopen(source.address, timeout=_TIMEOUT) as answer:
                length = answer.headers.get("Content-Length")
                total = int(length) if length else 0
                with bar(f"MB of {source.name}", total >> 20 or None) as read:
                    for block in iter(lambda: answer.read(1 << 20), b""):
                        out.write(block)
                        read.at(out.tell() >> 20)
            out.flush()
            _check(Path(out.name), int(length) if length else None, source.name)
            os.chmod(out.name, 0o644)
            shutil.move(out.name, path)
        except BaseException as e:
            Path(out.name).unlink(missing_ok=True)
            reached = isinstance(e, urllib.error.URLError | http.client.HTTPException | ValueError | _BrokenFile)
            if reached or (isinstance(e, OSError) and storage_error(e) is None):
                raise _unreachable(source, path, e) from None
            if isinstance(e, OSError) and (designed := storage_error(e, str(path))):
                raise designed from None
            raise


class _BrokenFile(Exception):
    """What came is not the file."""


def _check(path: Path, length: int | None, name: str = "") -> None:
    """Raise `_BrokenFile` for what cannot be the file `name` (default: as `path`)."""
    size = path.stat().st_size
    if length is not None and size != length:
        raise _BrokenFile(f"only {size} of {length} bytes came")
    with path.open("rb") as f:
        if f.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise _BrokenFile("it is a web page: a quota, or a question")
    if (name or path.name).endswith(".zip") and not zipfile.is_zipfile(path):
        raise _BrokenFile("it is no whole zip file")


def _unreachable(source: Source, path: Path, error: BaseException) -> DataError:
    reason = getattr(error, "reason", None) or error
    return DataError(
        f"{source.name} could not be fetched from {source.address} ({reason}). Without internet: fetch it on another "
        f"machine and put it at {path}, or set {MIRROR} to a server or file:// folder that has it; then run this again."
    )


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()
