"""Stage `identity`: what environment and package versions is this? A cheap probe that DVC always runs.

Downstream stages depend on `data/identity.json`, so they rerun only when its content changes.
"""

from __future__ import annotations

from ragdistill.envs import identity_of, make_domain
from ragdistill.params import Params
from ragdistill.records import SCHEMA, write_json
from ragdistill.stages.common import IDENTITY, run_stage


def body(params: Params) -> str:
    identity = {"environment": identity_of(make_domain(params.env), params.env), "schema": SCHEMA}
    write_json(IDENTITY, identity)
    return f"environment {identity['environment']}"


if __name__ == "__main__":
    run_stage("identity", body)
