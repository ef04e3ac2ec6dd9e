"""The whole DAG on WebShop with scripted shoppers: nothing downstream of the environment knows which one it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.commands.smoke import copy_project, override
from ragdistill.envs.webshop.domain import WITH_OPTIONS
from ragdistill.params import load_params
from ragdistill.records import (
    EvalEpisode,
    Hint,
    SftExample,
    StopReason,
    Task,
    Trajectory,
    read_jsonl,
    write_json,
    write_jsonl,
)  # fmt: skip
from ragdistill.stages import report
from tests.test_dag import OVERRIDES, ROOT, run
from tests.test_training import make_base

OWN = [
    "env.name=webshop",
    "env.max_steps=null",
    "model.script=tests.webshop_policy:play",
    "tasks.train=40",
    "tasks.test=20",
    "hints.k=1",
]


def test_the_report_says_how_many_goals_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    override(
        Path("params.yaml"), ["env.name=webshop", "evaluate.policies=[base]", "sft.variants=[]", "report.bootstrap=50"]
    )
    task = Task(id="t", env="webshop", split="test", kind=WITH_OPTIONS[0], group="g", data="d", sha256="0")
    played = EvalEpisode(
        policy="base", seed=0, task_id="t", kind=task.kind, bucket="b", group="g", success=True, score=1.0, steps=3,
        invalid=0, tokens_billed=9, tokens_computed=9, tokens_completion=1, seconds=1.0, stop=StopReason.SUCCESS,
    )  # fmt: skip
    write_jsonl(Path("data/tasks/eval.jsonl"), [task])
    write_jsonl(Path("results/eval/base-0/episodes.jsonl"), [played])
    for name in (
        "results/eval/base-0/trajectories",
        "data/rollouts",
        "data/hints/bank",
        "data/lift/measured",
        "data/teach/hints",
    ):
        write_jsonl(Path(f"{name}.jsonl"), [])
    write_json(Path("data/identity.json"), {"environment": "e"})
    write_json(Path("data/sft/report.json"), {})
    for infeasible in (234, 0):
        write_json(Path("data/games/eval/catalogue.json"), {"key": "k", "goals": 4008, "infeasible": infeasible})
        report.body(load_params(Path("params.yaml")))
        metrics, page = json.loads(Path("results/metrics.json").read_text()), Path("results/report.html").read_text()
        said = "234 of the 4,008 goals of this catalogue cannot earn the full reward; they are left out"
        assert (said in metrics.get("task_note", ""), said in page) == (bool(infeasible),) * 2
        assert ("task_note" in metrics) == bool(infeasible)
    assert "data/games" in msgspec.yaml.decode((ROOT / "dvc.yaml").read_bytes())["stages"]["report"]["deps"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("style", ["react", "stateact"])
def test_the_whole_dag_finds_the_withheld_rule_and_passes_it_on(tmp_path: Path, style: str) -> None:
    copy = tmp_path / "project"
    copy_project(copy)
    make_base(copy / "tiny", 0)
    override(copy / "params.yaml", [o for o in (*OVERRIDES.splitlines(), *OWN, f"agent.name={style}") if o])
    done = run(copy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    hints = read_jsonl(copy / "data/hints/bank.jsonl", Hint)
    assert any("click[{object}]" in h.text for h in hints)
    assert {h.bucket for h in hints} <= {"beauty", "electronics", "fashion", "garden", "grocery"}
    taught = read_jsonl(copy / "data/teach/hints.jsonl", Trajectory)
    assert any(t.hints and t.success for t in taught)
    examples = read_jsonl(copy / "data/sft/distilled.jsonl", SftExample)
    assert examples
    assert not any(h.text in m.content for e in examples for m in e.messages for h in hints)
    agent, fields = make_agent(style), ["goal", "current selection"] if style == "stateact" else []
    learnt = [*examples, *read_jsonl(copy / "data/demos.jsonl", SftExample)]
    said = [m.content for e in learnt for m in e.messages if m.role == "assistant"]
    assert all(list(agent.parse(text).state) == fields for text in said)
    metrics = json.loads((copy / "results/metrics.json").read_text())
    assert metrics["task_note"].startswith("234 of the 4,008 goals")
    policies = metrics["policies"]
    assert set(metrics["parts"]["distilled"]) == {"n", "type", "attributes", "options", "price"}
    assert policies["base"]["score"] > policies["base"]["success"]
    assert policies["raw"]["success"] == 0
    assert policies["distilled"]["success"] > policies["base"]["success"]
    assert {kind.split()[0] for kind in metrics["by_kind"]} == {"beauty", "electronics", "fashion", "garden", "grocery"}
    assert metrics["primary"]["kinds"] == list(WITH_OPTIONS) and 0 < metrics["primary"]["tasks"] < metrics["tasks"]
    again = run(copy, "-m", "dvc", "repro")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "rollouts" not in [line.split(":")[0] for line in again.stdout.splitlines()]
