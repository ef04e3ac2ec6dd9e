"""Stage `report`: `metrics.json`, csv for `dvc plots`, and one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.envs import defaults_of, make_domain, note_of
from ragdistill.hints.lift import LiftRow
from ragdistill.llm import Engine
from ragdistill.params import Params
from ragdistill.records import EvalEpisode, Hint, Task, Trajectory, read_json, read_jsonl, write_json
from ragdistill.report.csvs import LossPoint, read_loss, write_csvs
from ragdistill.report.metrics import compute_metrics
from ragdistill.report.page import Page, write_page
from ragdistill.report.paper import compare
from ragdistill.report.table import policy_table
from ragdistill.report.words import UNRECORDED, played_by
from ragdistill.stages.common import (
    BANK,
    BASE,
    ENGINE,
    EVAL,
    GAMES,
    IDENTITY,
    LIFT,
    RESULTS,
    ROLLOUTS,
    SFT,
    STUDENTS,
    TASKS,
    TEACH,
    read_timing,
    run_stage,
)  # fmt: skip
from ragdistill.stages.defaults import primary, settle
from ragdistill.stages.spending import SERVED, collect


def runs(params: Params) -> list[Path]:
    """Folders of the evaluations that belong to these parameters (older ones may still lie beside them)."""
    students = [f"{v}-{s}" for v in params.sft.variants for s in params.sft.seeds]
    return [EVAL / f"{p}-0" for p in params.evaluate.policies] + [EVAL / s for s in students]


def adapters(params: Params) -> tuple[dict[str, list[LossPoint]], dict[str, Any]]:
    """Loss curves and training facts, the cold start's first."""
    sources = {}
    if (BASE / "coldstart_loss.csv").exists():
        sources["coldstart"] = (BASE / "coldstart_loss.csv", BASE / "coldstart_training.json")
    for name in (f"{v}-{s}" for v in params.sft.variants for s in params.sft.seeds):
        sources[name] = (STUDENTS / name / "loss.csv", STUDENTS / name / "training.json")
    return {n: read_loss(c) for n, (c, _) in sources.items()}, {n: read_json(t) for n, (_, t) in sources.items()}


def engines(folders: Sequence[Path]) -> dict[str, str]:
    """Policy and seed → what played it, in words; older evaluations do not say it."""

    def said(path: Path) -> str:
        return msgspec.convert(read_json(path), Engine).words() if path.is_file() else UNRECORDED

    return {f.name: said(f / ENGINE) for f in folders}


def player(params: Params) -> dict[str, str]:
    """What the untrained policies are, as the page calls it, and its name: the base, or the served model."""
    served = params.model.engine == SERVED
    return {"served model": params.endpoint.model} if served else {"base model": params.model.base}


def body(params: Params) -> str:
    folders = runs(params)
    episodes = [e for f in folders for e in read_jsonl(f / "episodes.jsonl", EvalEpisode)]
    metrics = compute_metrics(
        episodes, env=params.env.name, agent=params.agent.name, split=params.tasks.eval_split, label=params.label,
        primary=primary(params), params=params.report,
        infeasible={t.id for t in read_jsonl(TASKS / "eval.jsonl", Task) if not t.feasible},
    )  # fmt: skip
    domain, players = make_domain(params.env), engines(folders)
    if note := note_of(domain, GAMES / "eval"):
        metrics["task_note"] = note
    metrics["engine"] = played_by(players)
    losses, trainings = adapters(params)
    timing, spending = read_timing(), collect(params)
    # rooms are for the page: hundreds of numbers would bury the others in `dvc metrics` and MLflow
    write_json(RESULTS / "metrics.json", {k: v for k, v in metrics.items() if k != "by_room"})
    write_json(RESULTS / "timing.json", timing)
    if spending:
        write_json(RESULTS / "spending.json", spending)
    else:
        (RESULTS / "spending.json").unlink(missing_ok=True)
    write_csvs(RESULTS / "plots", metrics, losses)
    first = {f.name.rpartition("-")[0]: f for f in reversed(folders)}
    page = Page(
        metrics=metrics,
        hints=read_jsonl(BANK, Hint),
        measured=read_jsonl(LIFT / "measured.jsonl", LiftRow),
        trajectories={name: read_jsonl(f / "trajectories.jsonl", Trajectory) for name, f in first.items()},
        rollouts=read_jsonl(ROLLOUTS, Trajectory),
        taught=read_jsonl(TEACH / "hints.jsonl", Trajectory) if "hints" in params.teach.variants else (),
        episodes=episodes,
        losses=losses,
        trainings=trainings,
        kept=read_json(SFT / "report.json"),
        temperatures={"rollouts": params.rollouts.temperature, "teach": params.teach.temperature},
        timings=timing,
        spending=spending,
        engines=players,
        paper=compare(metrics, settle(params).env, *player(params).values()),
        bootstrap=params.report.bootstrap,
        at_once=params.model.concurrency,
        provenance={"environment": read_json(IDENTITY)["environment"]} | player(params),
        coldstart=params.coldstart.enabled,
        group=defaults_of(domain).group,
    )
    write_page(RESULTS / "report.html", page)
    print(policy_table(metrics))
    return f"{len(episodes)} episodes of {len(metrics['policies'])} policies; open {RESULTS / 'report.html'}"


if __name__ == "__main__":
    run_stage("report", body)
