"""Parameters that differ from given ones in every key that a profile has to decide. Knows no profile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from ragdistill.params import Params

USERS = (
    "seed", "env.recycle_after", "env.step_timeout", "model.script", "endpoint.deadline", "endpoint.retries",
    "endpoint.max_concurrency", "coldstart.demos", "coldstart.plain", "coldstart.hinted", "coldstart.irrelevant",
    "coldstart.lora", "lift.tasks", "lift.attempts", "training.launch", "training.processes", "training.attention",
    "training.packing", "report", "track.uri", "track.experiment", "promote", "vllm", "ray",
)  # fmt: skip
"""Keys and sections that decide no cell: seed, machine, speed, what a profile switches off, the report."""


def _another(kind: inspect.Type, value: Any) -> Any:
    """A valid value of that type which is not `value`."""
    match kind:
        case inspect.UnionType():
            return _another(next(t for t in kind.types if not isinstance(t, inspect.NoneType)), value)
        case inspect.LiteralType():
            return next(v for v in reversed(kind.values) if v != value)
        case inspect.VarTupleType():
            return [_another(kind.item_type, (value or [None])[0])]
        case inspect.DictType():
            return {"other": 1}
        case inspect.BoolType():
            return value is not True
        case inspect.IntType():
            return (value or 1) + 1
        case inspect.FloatType():
            return (value or 1.0) / 2
    return "http://127.0.0.1:8000/v1" if str(value).startswith("http") else "OTHER"


def altered(values: dict[str, Any]) -> list[str]:
    """Every key of parameters with another value, as `override` takes them, but for those of `USERS`."""
    return list(_section(inspect.type_info(Params), values))


def _section(kind: inspect.Type, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    assert isinstance(kind, inspect.StructType)
    for f in kind.fields:
        key, value = f"{prefix}{f.name}", values[f.name]
        if isinstance(f.type, inspect.StructType) and key not in USERS:
            yield from _section(f.type, value, f"{key}.")
        elif key not in USERS:
            yield f"{key}={json.dumps(_another(f.type, value))}"
