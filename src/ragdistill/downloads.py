"""Fetch files by URL: streamed, whole or not at all, with a checksum that never changes unnoticed.

A file whose sha256 is not pinned is trusted on first use: its hash is noted beside it (`sha256.json`) and demanded ever
after. `RAGDISTILL_MIRROR` names another server (or a `file://` folder) that has the same file names. Knows no data set.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ragdistill.errors import DataError, IdentityError
from ragdistill.files import TEMPORARY, storage_error
from ragdistill.progress import bar
from ragdistill.records import read_json, write_json

MIRROR = "RAGDISTILL_MIRROR"
"""Environment variable: base address that is asked instead of the official ones."""
NOTED = "sha256.json"
_TIMEOUT = 60.0
"""Seconds without a byte before a server counts as silent."""
_SCHEMES = ("https://", "http://", "file://")


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
        address = f"{mirror.rstrip('/')}/{self.name}" if mirror else self.url
        if not address.startswith(_SCHEMES):
            raise DataError(f"{MIRROR} is {mirror!r}; give an address that begins with https://, http:// or file://.")
        return address


def fetch(sources: Sequence[Source], folder: Path) -> list[Path]:
    """The files of `sources` in `folder`, fetched if they are not there.

    Raises `DataError` with what to do by hand when a server cannot be reached, `IdentityError` when a file is not what
    is pinned or was noted.
    """
    noted = read_json(folder / NOTED) if (folder / NOTED).is_file() else {}
    for source in sources:
        path = folder / source.name
        found = _sha256(path) if path.is_file() else _download(source, path)
        wanted = source.sha256 or noted.get(source.name, found)
        if found != wanted:
            path.unlink()
            raise IdentityError(
                f"{path} has sha256 {found}, not {wanted}, and was removed; fetch it again, or delete "
                f"{folder / NOTED} if its publisher has a new version."
            )
        noted[source.name] = found
        write_json(folder / NOTED, noted)
    return [folder / s.name for s in sources]


def _download(source: Source, path: Path) -> str:
    """Stream to a temporary file, then rename; returns the sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY, delete=False) as out:
        try:
            with urllib.request.urlopen(source.address, timeout=_TIMEOUT) as answer:
                length = answer.headers.get("Content-Length")
                total = int(length) if length else 0
                with bar(f"MB of {source.name}", total >> 20 or None) as read:
                    for block in iter(lambda: answer.read(1 << 20), b""):
                        digest.update(block)
                        out.write(block)
                        read.at(out.tell() >> 20)
            out.flush()
            _check(out.name, int(length) if length else None)
            os.chmod(out.name, 0o644)
            shutil.move(out.name, path)
        except BaseException as e:
            Path(out.name).unlink(missing_ok=True)
            reached = isinstance(e, urllib.error.URLError | http.client.HTTPException | _BrokenFile)
            if reached or (isinstance(e, OSError) and storage_error(e) is None):
                raise _unreachable(source, path, e) from None
            if isinstance(e, OSError) and (designed := storage_error(e, str(path))):
                raise designed from None
            raise
    return digest.hexdigest()


class _BrokenFile(Exception):
    """What came is not the file."""


def _check(name: str, length: int | None) -> None:
    size = os.path.getsize(name)
    if length is not None and size != length:
        raise _BrokenFile(f"only {size} of {length} bytes came")
    with open(name, "rb") as f:
        if f.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise _BrokenFile("the server sent a web page instead (a quota, or a question)")


def _unreachable(source: Source, path: Path, error: BaseException) -> DataError:
    reason = getattr(error, "reason", None) or error
    return DataError(
        f"{source.name} could not be fetched from {source.address} ({reason}). Without internet: fetch it on another "
        f"machine and put it at {path}, or set {MIRROR} to a server or file:// folder that has it; then run this again."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
