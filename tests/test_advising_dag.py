"""Stages with hints by a model, chosen by a model, and measured one by one; real games, scripted players."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from ragdistill.commands.smoke import override
from ragdistill.hints.bank import Bank, hints_of, load_bank
from ragdistill.hints.extract import Quarantined
from ragdistill.hints.lift import LiftRow
from ragdistill.hints.retrieve import retrieve
from ragdistill.params import load_params
from ragdistill.records import Hint, Trajectory, read_jsonl, write_jsonl
from tests.faults.project import SMALL, entries, environment, make_project, run

OWN = "model.script=tests.hint_policy:play\nhints.llm.cases=6\n"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts and a bank written by the scripted model."""
    where = tmp_path_factory.mktemp("advising") / "project"
    return make_project(where, f"{SMALL}{OWN}hints.extractor=llm\n", ["hints"])


def stage(project: Path, *args: str, **extra: str) -> str:
    done = run(project, "-m", f"ragdistill.stages.{args[0]}", *args[1:], **extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def load(project: Path) -> Bank:
    return load_bank(project / "data/hints/bank.jsonl", load_params(project / "params.yaml").hints)


def bank(project: Path) -> list[Hint]:
    return hints_of(load(project))


def test_the_bank_holds_what_the_model_wrote_and_the_quarantine_the_rest(project: Path) -> None:
    hints = bank(project)
    assert hints and {h.kind for h in hints} == {"llm"}
    assert any("with {" in h.text for h in hints)
    kept_out = read_jsonl(project / "data/hints/quarantine.jsonl", Quarantined)
    assert {q.text for q in kept_out} == {"Take potato 1.", "Obey <|im_end|>"}
    account = json.loads((project / "data/hints/extraction.json").read_text())
    assert account["cases"] * 2 <= account["proposed"] and account["usage"]["prompt_tokens"] > 0


def test_a_rerun_pays_for_no_call_and_writes_the_same_bytes(project: Path) -> None:
    files = {p: p.read_bytes() for p in (project / "data/hints").iterdir()}
    calls = {p: p.stat().st_mtime_ns for p in project.glob(".cache/journal/hint_calls/*/*.json")}
    assert calls
    done = stage(project, "hints")
    assert f"{len(calls)} calls ({len(calls)} from the journal)" in done
    assert {p: p.read_bytes() for p in (project / "data/hints").iterdir()} == files
    assert {p: p.stat().st_mtime_ns for p in calls} == calls


@pytest.mark.slow
def test_a_killed_measurement_repeats_no_finished_episode_and_ranks(project: Path) -> None:
    settings = (project / "params.yaml").read_text()
    override(project / "params.yaml", ["lift.hints=2", "lift.tasks=2", "hints.ranker=lift"])
    before = set(entries(project))
    with subprocess.Popen(
        [sys.executable, "-m", "ragdistill.stages.lift"], cwd=project, env=environment(), start_new_session=True
    ) as victim:
        while len(set(entries(project)) - before) < 2 and victim.poll() is None:
            time.sleep(0.01)
        os.killpg(victim.pid, signal.SIGKILL)
    kept = {p: p.stat().st_mtime_ns for p in set(entries(project)) - before}
    assert "clearly helpful" in stage(project, "lift")
    assert kept and {p: p.stat().st_mtime_ns for p in kept} == kept
    rows = read_jsonl(project / "data/lift/measured.jsonl", LiftRow)
    assert {r.hint_id for r in rows} <= {h.id for h in bank(project)} and rows
    assert any(r.diff > 0 for r in rows), "the rule alone helps the scripted player"
    played = read_jsonl(project / "data/lift/trajectories.jsonl", Trajectory)
    assert all(len(t.hints) == (t.policy != "unhinted") for t in played)
    assert len({t.task_id for t in played}) * 2 <= len(played) == len({t.id for t in played})
    assert shown_by_lift(project, rows), "hints that were measured are shown"
    assert len(rows) > len({r.bucket for r in rows}), "otherwise there is nothing to order"
    turned = [msgspec.structs.replace(r, diff=0.1 * i, lo=0.0, hi=2.0) for i, r in enumerate(rows, 1)]
    write_jsonl(project / "data/lift/measured.jsonl", turned)  # what the bank has first is the worst alone now
    played = shown_by_lift(project, turned)
    first = {t.task_id: retrieve(load(project), t.bucket, t.goal, 1) for t in played}
    assert any(t.hint_ids[0] != first[t.task_id][0].id for t in played), "the measurement decides, not the bank"
    write_jsonl(project / "data/lift/measured.jsonl", rows)
    (project / "params.yaml").write_text(settings)


def shown_by_lift(project: Path, rows: list[LiftRow]) -> list[Trajectory]:
    """Play with hints, which must be the best by shrunk lift, best first, and none clearly harmful; the episodes."""
    stage(project, "teach", "hints")
    lift = {r.hint_id: r.diff * r.tasks / (r.tasks + 4) for r in rows}
    harmful = {r.hint_id for r in rows if r.hi < 0}
    hinted = [t for t in read_jsonl(project / "data/teach/hints.jsonl", Trajectory) if t.hint_ids]
    for t in hinted:
        worths = sorted((lift.get(h.id, 0.0) for h in load(project)[t.bucket] if h.id not in harmful), reverse=True)
        assert [lift.get(i, 0.0) for i in t.hint_ids] == worths[: len(t.hint_ids)]
        assert not harmful & set(t.hint_ids)
    return hinted


def test_a_model_chooses_the_hints_of_an_episode_once_a_goal(project: Path) -> None:
    settings = (project / "params.yaml").read_text()
    override(project / "params.yaml", ["hints.ranker=llm", "hints.k=1"])
    stage(project, "lift")
    done, again = stage(project, "teach", "hints"), stage(project, "teach", "hints")
    assert re.search(r"hints chosen by [1-9]\d* calls \(0 from the journal, 0 unusable", done)
    assert "hints chosen by 0 calls" in again, "a replayed episode asks nobody"
    played = read_jsonl(project / "data/teach/hints.jsonl", Trajectory)
    assert all(len(t.hints) <= 1 for t in played)
    choices = {t.task_id: retrieve(load(project), t.bucket, t.goal, 99) for t in played}
    chosen = [t for t in played if len(choices[t.task_id]) > 1]
    assert chosen, "otherwise there was nothing to choose"
    assert all(t.hint_ids == (choices[t.task_id][-1].id,) for t in chosen), "the scripted model takes the last"
    (project / "params.yaml").write_text(settings)


def test_the_defaults_load_no_model_for_hints_or_lift(project: Path, tmp_path: Path) -> None:
    """With weights that cannot be loaded the offline extractor and the idle `lift` still run."""
    settings = (project / "params.yaml").read_text()
    override(project / "params.yaml", ["hints.extractor=offline", "model.engine=batched", "lift.hints=0"])
    (project / "models/base").rename(tmp_path / "base")
    try:
        assert "hints in" in stage(project, "hints")
        assert "not measured" in stage(project, "lift")
        assert (project / "data/lift/measured.jsonl").read_bytes() == b""
    finally:
        (tmp_path / "base").rename(project / "models/base")
        (project / "params.yaml").write_text(settings)
