"""`ragdistill table [REV …]`: the table of policies of this workspace, or several experiments as one table.

A REV is a branch, tag or commit of git, the name of a DVC experiment, or `workspace`. Reads `results/metrics.json` of
each, which git holds; nothing is checked out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.errors import ConfigError
from ragdistill.records import read_json
from ragdistill.report.table import comparison_table, policy_table

METRICS = Path("results/metrics.json")
HERE = "workspace"


def show_table(revs: Sequence[str]) -> int:
    """Print it; 0. Raises `DataError` where this workspace, `ConfigError` where a REV has no metrics."""
    if revs:
        print(comparison_table([(rev, read_json(METRICS) if rev == HERE else metrics_of(rev)) for rev in revs]))
    else:
        print(policy_table(read_json(METRICS)))
    return 0


def metrics_of(rev: str) -> Mapping[str, Any]:
    """`results/metrics.json` of a revision of this project."""
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        return msgspec.json.decode(dvc.api.read(str(METRICS), repo=".", rev=rev))
    except (DvcException, SCMError, OSError, msgspec.DecodeError) as e:
        raise ConfigError(
            f"{rev!r} has no {METRICS} ({type(e).__name__}); name a commit, a branch, an experiment of `dvc exp show` "
            f"or {HERE}."
        ) from None
