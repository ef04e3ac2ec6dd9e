"""Crash-safe, content-addressed store of finished episodes and calls.

One file a record, named by the digest of everything that decides its content, written temp-then-rename: a file that
exists is complete, a kill at any moment loses only what had not finished, and no code edit that leaves the key alone
pays again. A second line seals key and content by a hash, so that a flipped bit or a file under another's name counts
as absent instead of passing for an episode; version 0.1.0 wrote episodes without it, which are known by their form and
their id. DVC deletes a stage's outputs before a rerun, so the journal lives outside
of them, under `$DVC_ROOT/.cache/journal` (queued experiments share it with the main workspace).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ragdistill.files import write_atomic
from ragdistill.records import Record

R = TypeVar("R", bound=Record)


def project_root() -> Path:
    """`$DVC_ROOT` inside a stage, the working directory otherwise."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def cache_dir(*parts: str) -> Path:
    """A folder under the project's `.cache/` (or `$RAGDISTILL_CACHE`)."""
    given = os.environ.get("RAGDISTILL_CACHE")
    return (Path(given) if given else project_root() / ".cache").joinpath(*parts)


class Journal(Generic[R]):
    """`get(key)` → record or None; `put(key, record)`. Safe for several processes at once."""

    def __init__(self, root: Path, cls: type[R]) -> None:
        self.root, self.cls = root, cls
        self.damaged = 0
        """Entries that could not be read back; they count as absent and are written again."""

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"

    def get(self, key: str) -> R | None:
        """The record of `key`; None when there is none that can be trusted."""
        try:
            content, broken, seal = self._path(key).read_bytes().partition(b"\n")
            if broken and seal == _seal(key, content):
                return msgspec.json.decode(content, type=self.cls)
            if not broken and _from_0_1_0(content):
                record = msgspec.json.decode(content, type=self.cls)
                if getattr(record, "id", None) == key:
                    return record
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            pass
        self.damaged += 1
        return None

    def put(self, key: str, record: R) -> None:
        """Keep `record`; `StorageError` when the disk refuses."""
        content = msgspec.json.encode(record)
        write_atomic(self._path(key), content + b"\n" + _seal(key, content))


def _from_0_1_0(content: bytes) -> bool:
    """Whether an entry without a seal can be one of version 0.1.0, whose steps have no `state`: that came before seals.

    A quotation mark inside a text is escaped, so the name of a field is not found there.
    """
    return b'"state":' not in content


def _seal(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
