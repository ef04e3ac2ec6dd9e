"""Stage `base`: fetches the untouched model (`models/raw`) and says which model teaches (`models/teacher`).

It says too what will play them on this machine, and refuses here what no engine could, and what a later
stage would find missing (4 bits, an API key), before anything is trained, played or paid.
"""

from __future__ import annotations

import shutil

from ragdistill.errors import ConfigError
from ragdistill.journal import cache_dir
from ragdistill.llm.choice import IN_PROCESS, best_device, choose, unmet
from ragdistill.llm.weights import model_fingerprint, resolve_model
from ragdistill.params import Params
from ragdistill.stages.common import RAW, TEACHER, link_tree, run_stage


def body(params: Params) -> str:
    for lack in unmet(params, best_device() == "cuda"):
        raise ConfigError(lack)
    link_tree(resolve_model(params.model.base, cache_dir("models")), RAW)
    shutil.rmtree(TEACHER, ignore_errors=True)
    if params.model.teacher is None:
        TEACHER.mkdir(parents=True)
        (TEACHER / "same_as_base").write_text("The base model teaches (model.teacher is null).\n")
    elif params.model.teacher == "endpoint":
        TEACHER.mkdir(parents=True)
        (TEACHER / "endpoint").write_text("A served model teaches (model.teacher is endpoint).\n")
    else:
        link_tree(resolve_model(params.model.teacher, cache_dir("models")), TEACHER)
    return f"{params.model.base}, {model_fingerprint(RAW)}{''.join(_played_by(params))}"


def _played_by(params: Params) -> list[str]:
    engine, dtype = params.model.engine, params.model.dtype
    if engine not in IN_PROCESS:
        return []
    own = {"base": RAW} | ({"teacher": TEACHER} if (TEACHER / "config.json").is_file() else {})
    return [f"; {name} played by {choose(engine, dtype, place)}" for name, place in own.items()]


if __name__ == "__main__":
    run_stage("base", body)
