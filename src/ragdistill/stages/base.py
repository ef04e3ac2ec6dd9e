"""Stage `base`: fetches the untouched model (`models/raw`) and says which model teaches (`models/teacher`)."""

from __future__ import annotations

import shutil

from ragdistill.journal import cache_dir
from ragdistill.llm.weights import model_fingerprint, resolve_model
from ragdistill.params import Params
from ragdistill.stages.common import RAW, TEACHER, link_tree, run_stage


def body(params: Params) -> str:
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
    return f"{params.model.base}, {model_fingerprint(RAW)}"


if __name__ == "__main__":
    run_stage("base", body)
