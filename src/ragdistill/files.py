"""Writing files whole or not at all, and what identifies a directory. Knows nothing of what is in them.

A disk that is full or read-only is one designed error that says what to do; what was there before stays.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ragdistill.errors import StorageError, causes

TEMPORARY = ".tmp"
"""Suffix of a file in the making; a kill leaves one behind, and git and DVC ignore it."""

_CAUSES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space within the quota",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "give yourself write permission",
    errno.EPERM: "give yourself write permission",
    errno.EIO: "check the disk",
}
"""What the machine may refuse, and what helps. Other errors are bugs and keep their traceback."""


_SQLITE = {8: errno.EROFS, 10: errno.EIO, 13: errno.ENOSPC, 14: errno.EACCES}
"""SQLITE_READONLY, _IOERR, _FULL and _CANTOPEN; the higher bits of a code say more."""
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
"""As Rust (safetensors, tokenizers) and Python print it."""
_ARCHIVE = re.compile(r"\[enforce fail at inline_container\.cc:\d+\] \. (.*)")
"""PyTorch's writer of *.pt files: it may keep the reason to itself, which then is a full disk nearly always."""


def storage_error(error: BaseException, what: str = "") -> StorageError | None:
    """`error` as one sentence about the file `what` (its own if empty), or None when it is not the storage's.

    Libraries wrap what the system said, or only print it: all that led to `error` is looked at.
    """
    for number, place, said in (refusal for e in causes(error) for refusal in _refusals(e)):
        remedy = _CAUSES.get(number)
        if remedy is not None:
            file, reason = what or place or "a file", said or os.strerror(number)
            return StorageError(f"{file} cannot be written ({reason}); {remedy} and run again, finished work is kept.")
    return None


def _refusals(e: BaseException) -> Iterator[tuple[int, str, str]]:
    """(errno, file if known, words if the library has its own) of what `e` itself says."""
    if isinstance(e, shutil.Error) and e.args and isinstance(e.args[0], list):
        for _, dest, reason in e.args[0]:  # of each file that was not copied
            yield _printed(str(reason)), str(dest), ""
    elif isinstance(e, OSError):
        file = e.filename2 or e.filename  # of a copy the target
        if file or e.errno not in (errno.EACCES, errno.EPERM):  # without one, a firewall's
            yield e.errno or 0, str(file or ""), ""
    elif isinstance(e, sqlite3.Error):
        yield _SQLITE.get(getattr(e, "sqlite_errorcode", 0) & 0xFF, 0), "", str(e)
    elif found := _ARCHIVE.match(str(e)):
        words = found.group(1)
        yield next((n for n in _CAUSES if os.strerror(n) in words), errno.ENOSPC), "", words
    else:
        yield _printed(str(e)), "", ""


def _printed(text: str) -> int:
    found = _NUMBER.search(text)
    return int(found.group(1) or found.group(2)) if found else 0


def tree_sha256(directory: Path) -> str:
    """Hex sha256 over names and contents of all files below `directory`, in name order."""
    outer = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        outer.update(path.relative_to(directory).as_posix().encode() + b"\0")
        outer.update(hashlib.sha256(path.read_bytes()).digest())
    return outer.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write temp-then-rename, so that a file that exists is complete; `StorageError` when the disk refuses."""
    tmp = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    except BaseException as e:
        if tmp:
            Path(tmp).unlink(missing_ok=True)
        designed = storage_error(e, str(path)) if isinstance(e, OSError) else None
        if designed is None:
            raise
        raise designed from None
