"""Designed errors: one root, each also a standard-library type, each one sentence that says what to change.

A failed episode is data (`records.StopReason`), never one of these.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator
from typing import Any

import msgspec


class RagdistillError(Exception):
    """Root of every error this package raises on purpose; the CLI prints it without a traceback."""


class ConfigError(RagdistillError, ValueError):
    """A parameter, profile or file the user wrote is wrong."""


class DataError(RagdistillError, ValueError):
    """An input file is missing, damaged or of another schema version."""


class IdentityError(RagdistillError, ValueError):
    """A model, adapter or environment is not the one it claims to be (wrong hash, other base, pickle)."""


class ContaminationError(RagdistillError, ValueError):
    """Evaluation tasks would touch hints or training; refused, never warned about."""


class StorageError(RagdistillError, OSError):
    """The disk is full, read-only or not ours; what was finished before is kept."""


class MemoryFault(RagdistillError, MemoryError):
    """A computation wants more memory than there is; says what takes less."""


class EnvironmentFault(RagdistillError, RuntimeError):
    """Infrastructure failed under an episode (dead worker, time-out); the episode ends as `infra_error`."""


class BudgetError(RagdistillError, RuntimeError):
    """The next paid call might exceed `endpoint.budget`; it is not made, and what was paid for is kept."""


class EmptyResultError(RagdistillError, RuntimeError):
    """A stage produced nothing to go on with (zero successes, zero hints); says which parameter to change."""


def designed(failed: ExceptionGroup) -> RagdistillError | None:
    """The first designed error of a task group's failure; None when there is a bug among the others."""
    ours, bugs = failed.split(RagdistillError)
    first = ours.exceptions[0] if ours and not bugs else None
    return first if isinstance(first, RagdistillError) else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, the members of groups, and what led to each: `raise from`, and what was being handled meanwhile."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            context = None if one.__suppress_context__ else one.__context__
            todo += [e for e in (one.__cause__, context) if e is not None]
            todo += one.exceptions if isinstance(one, BaseExceptionGroup) else []


_SHORT = re.compile(
    r"out of memory|not enough memory|can't alloc|cannot allocate memory|failed to allocate|bad[_ ]alloc", re.IGNORECASE
)
"""How PyTorch and OpenVINO say it; both raise a bare RuntimeError."""


def lacks_memory(error: BaseException) -> str:
    """The words of the memory that `error` could not get; empty when it is about something else."""
    for e in causes(error):
        text = str(e)
        said = _SHORT.search(text) if isinstance(e, RuntimeError) else None
        if said or isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno == errno.ENOMEM):
            return " ".join((text[said.start() :] if said else text).split())[:160] or "the machine gave no number"
    return ""


def memory_fault(error: BaseException, relief: str) -> MemoryFault | None:
    """`error` as one sentence, with `relief` as what takes less memory; None when it is about something else."""
    short = lacks_memory(error)
    if not short:
        return None
    return MemoryFault(f"the memory is not enough ({short}); {relief} and run again, finished work is kept.")


def explain(message: str, root: type[msgspec.Struct]) -> str:
    """A decoder's `message` about data for `root`, with the nearest valid key where it complains of an unknown one."""
    unknown = re.match(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", message)
    if not unknown:
        return message
    key, place = unknown.group(1), unknown.group(2) or ""
    near = difflib.get_close_matches(key, _keys_at(place, root), n=1, cutoff=0.0)
    dotted = f"{place}.{key}" if place else key
    return f"unknown key `{dotted}`; the nearest valid key is `{near[0]}`." if near else f"unknown key `{dotted}`."


def _keys_at(place: str, root: Any) -> list[str]:
    section = root
    for name in filter(None, place.split(".")):
        section = {f.name: f.type for f in msgspec.structs.fields(section)}[name]
    return [f.name for f in msgspec.structs.fields(section)]
